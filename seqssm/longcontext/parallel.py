"""Context parallel: the length of a sequence split over processes, exactly, forward and backward.

Each process holds one part of the length. A state-space layer is linear in its state, so what one part does to the next
is told by two numbers a state: the state after the part when it starts from zero, and the decay over the part. The
processes gather these of each other, and each combines those of the parts before its own into the state that enters
it; gradients go the other way, the same way. A convolution gathers the last k - 1 tokens of each part instead. The
messages do not grow with the length.

Every layer exchanges by itself, since a layer's input depends on the whole of the layer below. The mixers do not know:
:func:`split_mixers` gives them other :class:`~seqssm.mixers.operations.Operations`.

A process computes gradients of the parts that it holds. The backward passes of :meth:`LengthSplit.gather` and of what
is built on it add the gradients of all processes: with a loss that is the same in all processes, or the mean over all
of them, the *mean* of the parameters' gradients over the processes, as
:class:`torch.nn.parallel.DistributedDataParallel` takes it, is the gradient of that loss in one process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.errors import UserError
from seqssm.kernels import dispatch
from seqssm.kernels.causal_conv1d.op import causal_conv1d
from seqssm.kernels.selective_scan.op import selective_scan
from seqssm.kernels.selective_scan.part import Join, scan_part
from seqssm.kernels.ssd.op import ssd
from seqssm.mixers import Attention, Mixer
from seqssm.mixers.operations import Operations, check_halo
from seqssm.mixers.segments import last_segment

LOST = (
    "another process of this run has stopped or does not answer, see its own message ({reason}); all have stopped: "
    "start them again, from the last checkpoint with --ckpt_path"
)


class LengthSplit:
    """The processes that share sequences, each holding one part of the length, in the order of their ranks.

    Args:
        group: the processes; all of the run when None. ``torch.distributed`` must have been initialised.

    Attributes:
        rank: which part this process holds.
        size: number of parts.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.shortest = 1
        """Tokens that a part must have at least: :func:`split_mixers` raises it to the widest convolution's halo."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LengthSplit:
        return self  # a copied model runs in the same processes, whose handles cannot be copied

    def bounds(self, length: int) -> tuple[int, int]:
        """First position of this process's part, and the one behind its last; parts differ by one position at most.

        Raises:
            UserError: a part would be too short. All processes raise it, none waits for the others.
        """
        if length // self.size < self.shortest:
            raise UserError(
                f"a length of {length} cannot be split over {self.size} processes: each needs {self.shortest} or more "
                "(the convolutions look that far into the neighbour's part); use longer windows or fewer processes"
            )
        return self.rank * length // self.size, (self.rank + 1) * length // self.size

    def gather(self, x: Tensor) -> Tensor:
        """x (...) of every process -> (size, ...), with gradients: each process gets the sum of what all have for it.

        All processes must call it in the same order with tensors of one shape, and use the result in what they
        differentiate: the backward pass is a common call, too.
        """
        if x.is_complex():
            return torch.view_as_complex(self.gather(torch.view_as_real(x)))
        return _Gather.apply(x, self)

    def all_gather(self, x: Tensor) -> Tensor:
        """:meth:`gather` without gradients."""
        x = x.contiguous()
        parts = x.new_empty(self.size, *x.shape)
        with lost_peers_named():
            dist.all_gather(list(parts.unbind(0)), x, group=self.group)
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the processes of x, without gradients."""
        x = x.clone(memory_format=torch.contiguous_format)
        with lost_peers_named():
            dist.all_reduce(x, group=self.group)
        return x


@contextmanager
def lost_peers_named() -> Iterator[None]:
    """Turn what the communication library says of a process that has gone into one line that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        # "[file of the library:line] Connection closed by peer [address]. Advice ..."
        reason = re.sub(r"^\[[^\]]*\]\s*", "", str(error).splitlines()[0]).split(". ")[0]
        raise UserError(LOST.format(reason=reason)) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error comes from communication between processes, rather than from the computation."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(name in text for name in ("gloo/", "NCCL", "ProcessGroup"))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, split):  # type: ignore[no-untyped-def]
        ctx.split = split
        return split.all_gather(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return ctx.split.all_reduce(gradient)[ctx.split.rank], None


class SplitOperations(Operations):
    """The kernels over sequences whose parts lie in the processes of a :class:`LengthSplit`.

    Each method takes this process's part and gives the part of the result that the kernel would give over the whole
    sequence, for any mixture of directions. The final states are those after this part in reading order. A whole
    sequence always starts from zero: no initial state is taken.
    """

    split = True

    def __init__(self, length_split: LengthSplit) -> None:
        self.length_split = length_split

    def causal_conv1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str | None = "silu",
        initial_state: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reverse: bool | Sequence[bool] = False,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """:func:`seqssm.kernels.causal_conv1d.causal_conv1d` with the neighbours' tokens in front."""
        _refuse_state(initial_state)
        halo = weight.shape[1] - 1
        if halo:
            initial_state = self._halo(x, halo, seq_idx, dispatch.directions(reverse))
        options: dict[str, Any] = {"activation": activation, "seq_idx": seq_idx, "backend": backend}
        return causal_conv1d(x, weight, bias, initial_state=initial_state, reverse=reverse, **options)

    def selective_scan(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        *,
        delta_softplus: bool = False,
        initial_state: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reverse: bool | Sequence[bool] = False,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """:func:`seqssm.kernels.selective_scan.selective_scan` from the state that the parts before leave.

        With the Triton backend nothing is computed twice; others first run once for the summary of the part.
        """
        _refuse_state(initial_state)
        B, C = (x.unsqueeze(2) if x.dim() == 3 else x for x in (B, C))
        directions = dispatch.directions(reverse, B.shape[2])
        if dispatch.choose_backend("selective_scan", backend, u) == "triton":
            join = self.join(seq_idx, directions)
            return scan_part(u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, directions, join)
        options: dict[str, Any] = {
            "delta_bias": delta_bias,
            "delta_softplus": delta_softplus,
            "seq_idx": seq_idx,
            "reverse": directions,
            "backend": backend,
        }
        _, end = selective_scan(u, delta, A, B, C, **options)
        steps = _total_steps(delta, delta_bias, delta_softplus, end.dtype)  # (b, d)
        decay = _keep_whole(torch.exp(steps[..., None] * A.to(end.dtype)), seq_idx)
        entering = self.enter(end, decay, seq_idx=seq_idx, reverse=directions)
        return selective_scan(u, delta, A, B, C, D, z, initial_state=entering, **options)

    def join(self, seq_idx: Tensor | None, reverse: Sequence[bool]) -> Join:
        """As :meth:`Operations.join`: all processes must call what it gives in the same order."""
        meeting = self._meeting(seq_idx)

        def join(own: Tensor, decay: Tensor, backward: bool) -> Tensor:
            ways = [way != backward for way in reverse]
            owns, decays = self.length_split.all_gather(torch.stack([own, decay])).unbind(1)
            return self._combine(owns, decays, ways, meeting)

        return join

    def before(self, x: Tensor, count: int, *, seq_idx: Tensor | None = None, reverse: bool = False) -> Tensor:
        """As :meth:`Operations.before`, with gradients."""
        return self._halo(x, count, seq_idx, (reverse,)).mT

    def ssd(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        *,
        dt_softplus: bool = False,
        initial_state: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reverse: bool | Sequence[bool] = False,
        chunk: int | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """:func:`seqssm.kernels.ssd.ssd` from the state that the parts before leave.

        The part runs once more for its summary, in the forward and in the backward pass.
        """
        _refuse_state(initial_state)
        directions = dispatch.directions(reverse, B.shape[2])
        options: dict[str, Any] = {
            "dt_bias": dt_bias,
            "dt_softplus": dt_softplus,
            "seq_idx": seq_idx,
            "reverse": directions,
            "chunk": chunk,
            "backend": backend,
        }
        _, end = ssd(x, dt, A, B, C, **options)
        steps = _total_steps(dt, dt_bias, dt_softplus, end.dtype)  # (b, h)
        decay = _keep_whole(torch.exp(steps * A.to(end.dtype))[..., None, None], seq_idx)
        entering = self.enter(end, decay, seq_idx=seq_idx, reverse=directions)
        return ssd(x, dt, A, B, C, D, z, initial_state=entering, **options)

    def enter(
        self, end: Tensor, decay: Tensor, *, seq_idx: Tensor | None = None, reverse: bool | Sequence[bool] = False
    ) -> Tensor:
        both = torch.stack([end, decay.to(end.dtype).expand_as(end)])
        ends, decays = self.length_split.gather(both).unbind(1)  # (size, b, c, ...) each
        return self._combine(ends, decays, dispatch.directions(reverse), self._meeting(seq_idx))

    def _combine(self, ends: Tensor, decays: Tensor, directions: Sequence[bool], meeting: Tensor | None) -> Tensor:
        """(b, c, ...): what the parts before this one leave to it, by direction; ``meeting`` (size - 1, b) is zero
        where nothing goes from a part to the next."""
        rank, size = self.length_split.rank, self.length_split.size
        directions = directions if any(directions) and not all(directions) else directions[:1]
        count = len(directions)
        entering = []
        for against, end, decay in zip(directions, ends.chunk(count, 2), decays.chunk(count, 2), strict=True):
            # Not plain zeros: all processes must take part in the backward pass, the first one, too.
            state = 0 * end[rank]
            for part in range(size - 1, rank, -1) if against else range(rank):
                state = decay[part] * state + end[part]
                if meeting is not None:
                    passes = meeting[part - 1 if against else part]
                    state = state * passes.reshape(-1, *[1] * (state.dim() - 1))
            entering.append(state)
        return torch.cat(entering, dim=1)

    def _meeting(self, seq_idx: Tensor | None) -> Tensor | None:
        """(size - 1, b): whether the index goes on unchanged from each part to the next."""
        if seq_idx is None:
            return None
        edges = self.length_split.all_gather(seq_idx[:, [0, -1]])  # (size, b, 2)
        return edges[:-1, :, 1] == edges[1:, :, 0]

    def _halo(self, x: Tensor, halo: int, seq_idx: Tensor | None, directions: Sequence[bool]) -> Tensor:
        """(b, d, halo): the tokens before this part's first one in reading order, oldest first, zeros where none."""
        rank, size = self.length_split.rank, self.length_split.size
        check_halo(x.shape[1], halo)
        edges = self.length_split.gather(torch.cat([x[:, :halo], x[:, -halo:]], dim=1))  # (size, b, 2 halo, d)
        parts = []
        for against, channels in zip(directions, edges.chunk(len(directions), dim=-1), strict=True):
            neighbour = rank + 1 if against else rank - 1
            if 0 <= neighbour < size:
                parts.append(channels[neighbour, :, :halo].flip(1) if against else channels[neighbour, :, halo:])
            else:
                parts.append(0 * channels[rank, :, :halo])  # zeros that take part in the backward pass
        if seq_idx is not None:
            parts = self._hide(parts, halo, seq_idx, directions)
        return torch.cat(parts, dim=-1).mT

    def _hide(self, parts: Sequence[Tensor], halo: int, seq_idx: Tensor, directions: Sequence[bool]) -> list[Tensor]:
        """Zero the tokens of the halo that a change of the index separates from this part."""
        rank, size = self.length_split.rank, self.length_split.size
        edges = self.length_split.all_gather(torch.cat([seq_idx[:, :halo], seq_idx[:, -halo:]], dim=1))
        hidden = []
        for against, part in zip(directions, parts, strict=True):
            neighbour = rank + 1 if against else rank - 1
            if 0 <= neighbour < size:
                before = edges[neighbour, :, :halo].flip(1) if against else edges[neighbour, :, halo:]
                own = seq_idx[:, -1:] if against else seq_idx[:, :1]
                same = torch.cat([before[:, 1:], own], dim=1) == before  # (b, halo)
                part = part * same.flip(1).cumprod(1).flip(1)[..., None].to(part.dtype)
            hidden.append(part)
        return hidden


def split_mixers(module: nn.Module, length_split: LengthSplit) -> None:
    """Let the mixers of a module run over a length that is split over processes.

    From then on the module takes this process's part of each sequence, as :meth:`LengthSplit.bounds` has it, and gives
    this part of the output, in training and outside it.

    Args:
        module: a :class:`~seqssm.backbone.Backbone`, or anything that holds one.
        length_split: the processes, each with a copy of the module.

    Raises:
        UserError: the module has attention layers, which look at all tokens at once.
    """
    mixers = [mixer for mixer in module.modules() if isinstance(mixer, Mixer)]
    if any(isinstance(mixer, Attention) for mixer in mixers):
        raise UserError(
            "an attention layer looks at all tokens at once, and cannot have its length split over processes: "
            "train a model without attention (backbone.pattern), or drop the context-parallel strategy"
        )
    operations = SplitOperations(length_split)
    for mixer in mixers:
        mixer.operations = operations
        convolution = getattr(mixer, "conv1d", None)
        if convolution is not None:
            length_split.shortest = max(length_split.shortest, convolution.kernel_size[0] - 1)


def _refuse_state(initial_state: Tensor | None) -> None:
    if initial_state is not None:
        raise UserError("a sequence whose length is split over processes starts without a state: give it whole")


def _total_steps(delta: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """(b, l, c) -> (b, c): the sum of the step sizes."""
    steps = delta.to(dtype)
    if bias is not None:
        steps = steps + bias.to(dtype)
    return (F.softplus(steps) if softplus else steps).sum(1)


def _keep_whole(decay: Tensor, seq_idx: Tensor | None) -> Tensor:
    """The decay (b, ...), zero for the rows in which a change of the index cuts the past off."""
    if seq_idx is None:
        return decay
    return decay * last_segment(seq_idx)[1].reshape(-1, *[1] * (decay.dim() - 1))
