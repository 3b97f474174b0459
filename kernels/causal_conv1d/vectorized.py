"""Backend "torch": the causal convolution as k shifted multiply-adds; gradients written by hand.

Each run of channels with one direction is done by itself. With the k-1 tokens of the state put before the first token
in scan order, output t is the sum over taps j of weight_j padded_{t+j}; a reversed part looks the other way.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.dispatch import state_dtype


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the final state (b, d, k-1)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = x.new_empty(x.shape[0], x.shape[2], weight.shape[1] - 1)
    for part, backwards in _parts(x.shape[2], reverse):
        conv = _Part(x, weight, bias, initial_state, seq_idx, part, backwards)
        out = conv.run()
        y[..., part] = conv.flip(F.silu(out) if activation else out)
        final_state[:, part] = conv.final_state()
    return y, final_state


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state."""
    b, l, d = x.shape
    k = weight.shape[1]
    dtype = state_dtype(x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight, dbias = weight.new_empty(d, k, dtype=dtype), weight.new_empty(d, dtype=dtype)
    dinitial_state = x.new_empty(b, d, k - 1, dtype=dtype)
    for part, backwards in _parts(d, reverse):
        conv = _Part(x, weight, bias, initial_state, seq_idx, part, backwards)
        dout = conv.flip(dy[..., part]).to(dtype)
        if activation:
            out = conv.run()
            sigmoid = torch.sigmoid(out)
            dout = dout * (sigmoid * (1 + out * (1 - sigmoid)))
        dpadded = torch.zeros_like(conv.padded)
        if dfinal_state is not None:
            dpadded[:, l:] = conv.hide_from_end(dfinal_state[:, part].to(dtype).mT)
        for j in range(k):
            dvisible = conv.hide(dout, j)
            dpadded[:, j : j + l].addcmul_(dvisible, conv.weight[:, j])
            dweight[part, j] = (dvisible * conv.padded[:, j : j + l]).sum((0, 1))
        dbias[part] = dout.sum((0, 1))
        dx[..., part] = conv.flip(dpadded[:, k - 1 :])
        dinitial_state[:, part] = dpadded[:, : k - 1].mT
    return dx, dweight, None if bias is None else dbias, None if initial_state is None else dinitial_state


def _parts(d: int, reverse: tuple[bool, ...]) -> Iterator[tuple[slice, bool]]:
    """Runs of channels with one direction, as few as there are."""
    width, start = d // len(reverse), 0
    for backwards, group in groupby(reverse):
        stop = start + width * len(list(group))
        yield slice(start, stop), backwards
        start = stop


class _Part:
    """The channels ``part``, which share one direction, in scan order and in the dtype of computation."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        part: slice,
        backwards: bool,
    ) -> None:
        dtype = state_dtype(x.dtype)
        b, self.l, _ = x.shape
        self.dtype, self.backwards = x.dtype, backwards
        self.weight = weight[part].to(dtype)
        self.bias = None if bias is None else bias[part].to(dtype)
        self.k = weight.shape[1]
        self.padded = x.new_empty(b, self.l + self.k - 1, self.weight.shape[0], dtype=dtype)
        self.padded[:, self.k - 1 :] = self.flip(x[..., part])
        self.padded[:, : self.k - 1] = 0 if initial_state is None else initial_state[:, part].mT
        self.segment: Tensor | None = None
        if seq_idx is not None:
            # Number the packed sequences; the state belongs to the first.
            idx = self.flip(seq_idx)
            change = F.pad((idx[:, 1:] != idx[:, :-1]).int(), (self.k, 0))
            self.segment = change.cumsum(1)

    def flip(self, x: Tensor) -> Tensor:
        """Between stored order and scan order."""
        return x.flip(1) if self.backwards else x

    def hide(self, x: Tensor, j: int) -> Tensor:
        """x (b, l, d), zero where padded token t+j lies in an earlier packed sequence than token t+k-1, its reader."""
        if self.segment is None:
            return x
        own, reader = self.segment[:, j : j + self.l], self.segment[:, self.k - 1 :]
        return x * (own == reader).unsqueeze(-1)

    def hide_from_end(self, x: Tensor) -> Tensor:
        """x (b, k-1, d), zero where the last k-1 tokens lie in an earlier packed sequence than the very last."""
        if self.segment is None:
            return x
        return x * (self.segment[:, self.l :] == self.segment[:, -1:]).unsqueeze(-1)

    def run(self) -> Tensor:
        """bias + sum_j weight_j padded_{t+j}, (b, l, d)."""
        out = self.hide(self.padded[:, : self.l], 0) * self.weight[:, 0]
        for j in range(1, self.k):
            out.addcmul_(self.hide(self.padded[:, j : j + self.l], j), self.weight[:, j])
        return out if self.bias is None else out.add_(self.bias)

    def final_state(self) -> Tensor:
        """The last k-1 tokens (b, d, k-1)."""
        return self.hide_from_end(self.padded[:, self.l :]).mT
