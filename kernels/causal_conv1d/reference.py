"""The depthwise causal convolution, one token after another: the oracle."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.dispatch import state_dtype


def _flip_parts(x: Tensor, reverse: Sequence[bool]) -> Tensor:
    """(b, l, d) with time turned round in the parts of the channels that run backwards."""
    parts = x.chunk(len(reverse), dim=-1)
    return torch.cat([part.flip(1) if r else part for part, r in zip(parts, reverse, strict=True)], dim=-1)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """``y_t = act(bias + sum_j weight_j x_{t-k+1+j})``, with SiLU for ``act`` when ``activation``.

    x (b, l, d); weight (d, k); bias (d,); initial_state (b, d, k-1), the tokens before the first in scan order, oldest
    first; seq_idx (b, l): tokens before a change count as zero; ``reverse`` has one bool for each equal part of the
    channels. Returns y (b, l, d) and the final state (b, d, k-1), both in x's dtype. Computes in float64 for float64 x,
    else in float32. Plain autograd differentiates it.
    """
    b, l, d = x.shape
    k = weight.shape[1]
    dtype = state_dtype(x.dtype)
    xs, weight = _flip_parts(x.to(dtype), reverse), weight.to(dtype)
    state = x.new_zeros(b, d, k - 1, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    idx = None if seq_idx is None else _flip_parts(seq_idx.unsqueeze(2).expand(b, l, d), reverse)
    ys = []
    for t in range(l):
        if idx is not None and t > 0:
            state = torch.where((idx[:, t] == idx[:, t - 1]).unsqueeze(-1), state, 0)
        window = torch.cat([state, xs[:, t, :, None]], dim=-1)  # (b, d, k)
        ys.append((window * weight).sum(-1))
        state = window[..., 1:]
    y = _flip_parts(torch.stack(ys, dim=1), reverse)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation:
        y = F.silu(y)
    return y.to(x.dtype), state.to(x.dtype)
