"""What every mixer is, and the pieces they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.errors import UserError
from seqssm.kernels.rms_norm.op import add_rms_norm
from seqssm.mixers.operations import WHOLE, Operations

State = dict[str, Tensor]


class Reading(NamedTuple):
    """One of the readings whose outputs a layer adds up: a causal mixer, its strand, and its direction.

    Attributes:
        strand: which d of the layer's channels it reads, and writes.
        mixer: it carries a state in its direction.
        reverse: it reads from the last token to the first.
    """

    strand: int
    mixer: Mixer
    reverse: bool


def check_sizes(mixer: str, **sizes: float | None) -> None:
    """Raise UserError for a size that is given and below 1."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"{mixer}: {name} must be at least 1, got {size}")


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, size: int, eps: float, backend: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.backend = "auto" if backend == "numba" else backend

    def forward(
        self, x: Tensor, added: Tensor | None = None, *, strands: int = 1, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum of the residual stream x (..., strands·d) and ``added``, in x's dtype, and its norm a strand.

        The norm has the dtype asked for, else that of the weight.
        """
        if strands > 1:
            x, added = x.unflatten(-1, (strands, -1)), None if added is None else added.unflatten(-1, (strands, -1))
        total, y = add_rms_norm(x, added, self.weight, self.eps, dtype=dtype, backend=self.backend)
        return (total, y) if strands == 1 else (total.flatten(-2), y.flatten(-2))


class Normed(NamedTuple):
    """What a mixer's input was made of, detached: the residual stream (b, l, d) before the block's norm.

    It is there anyway, since the norm's own backward pass needs it; the input can be made from it again.
    """

    residual: Tensor
    weight: Tensor
    eps: float
    backend: str

    def compute(self, dtype: torch.dtype) -> Tensor:
        return add_rms_norm(self.residual, None, self.weight, self.eps, dtype=dtype, backend=self.backend)[1]


class Mixer(nn.Module):
    """Mixes along the sequence: ``forward(x (b, l, d), state) -> (y (b, l, d), state)``.

    A causal mixer that is given the state of one call continues it in the next, with gradients through the state, for
    any chunking. States are flat dicts of tensors whose first dimension is the batch; ``forward`` never writes to the
    one it is given, :meth:`step` always does.

    Attributes:
        causal: whether an output depends on its past alone, so that a state can be carried.
        backend: the kernels' backend, as in :func:`seqssm.kernels.selective_scan.selective_scan`.
        operations: the kernels, or what runs them over a sequence of which this process holds a part.
        recurrent: whether reading the other way needs a second run (attention looks both ways in one).
        state_keys: the keys of its state.
        shared_modules: submodules that the two directions of a tied bidirectional layer have in common.
        float32_parameters: parameters (dotted names) that keep at least float32 when the module is cast to 16 bit.
        no_weight_decay: parameters that take no weight decay although they are matrices.
    """

    recurrent: ClassVar[bool] = True
    state_keys: ClassVar[tuple[str, ...]] = ()
    shared_modules: ClassVar[tuple[str, ...]] = ("in_proj", "out_proj")
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.causal = True
        self.backend = "auto"
        self.operations: Operations = WHOLE

    def forward(
        self, x: Tensor, state: State | None = None, *, seq_idx: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, State]:
        """Mix a chunk.

        Args:
            x: (b, l, d).
            state: what the previous chunk returned, or None at the start.
            seq_idx: (b, l) integers; nothing flows across a change of the index (packed sequences, padding). The first
                token in reading order continues ``state``.
            reverse: read from the last token to the first: equals flip, mix, flip.

        Returns:
            y (b, l, d) and the state after the last token in reading order.
        """
        raise NotImplementedError

    def output(self, x: Tensor, *, seq_idx: Tensor | None = None, reverse: bool = False) -> Tensor:
        """:meth:`forward` from the start, for those who drop the state: a mixer that can skip it does."""
        return self(x, seq_idx=seq_idx, reverse=reverse)[0]

    def recomputes(self, x: Tensor) -> bool:
        """Whether :meth:`forward_recomputed` is there for inputs on the device of x and of its dtype."""
        return False

    def forward_recomputed(
        self, x: Tensor, source: Normed, state: State | None = None, *, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """:meth:`forward` for training in little memory: the backward pass computes again what is cheap to compute.

        Args:
            x: (b, l, d), the norm of ``source``, from which the backward pass makes it again.
        """
        raise NotImplementedError

    def chunks(self, x: Tensor) -> bool:
        """Whether :meth:`residual_chunk` is there for chunks of x's shape, dtype and device."""
        return False

    def residual_chunk(
        self, x: Tensor, norm: RMSNorm, state: State, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x (b, l, d) + :meth:`forward` of its norm, at once and without gradients.

        A row's result does not depend, to the bit, on the rest of the batch.
        """
        raise NotImplementedError

    def residual_step(self, x: Tensor, norm: RMSNorm, state: State) -> Tensor:
        """x (b, d) + :meth:`step` of its norm: a subclass may do both at once."""
        return x + self.step(norm(x)[1], state)

    def step(self, x: Tensor, state: State) -> Tensor:
        """Mix one token, x (b, d) -> y (b, d), updating ``state`` in place. For inference: no gradients."""
        raise NotImplementedError

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token.

        Args:
            batch: number of sequences.
            device: where; the parameters' when None.
            dtype: of the activations that the state holds; the parameters' when None. Scan states are float32 anyway.
        """
        raise NotImplementedError

    def readings(self, reverse: bool = False) -> list[Reading]:
        """What the layer is the sum of, each with a state of its own, so that all can be run a chunk at a time.

        Args:
            reverse: turn all directions around.

        Raises:
            UserError: it has no state of bounded size.
        """
        return [Reading(0, self, reverse)]

    def run_streams(
        self,
        backward: Mixer | None,
        x: Tensor,
        *,
        strands: int = 1,
        seq_idx: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """Read each strand with this mixer and, the other way, with ``backward``; add the two.

        Args:
            backward: the mixer of the other direction, of the same class and sizes, or None for one direction.
            x: (b, l, strands·d). The first strand is read from the first token to the last, the second against it.
            strands: 1, or 2 with the strands side by side in the channels.
            seq_idx: as in :meth:`forward`.
            reverse: turn all directions around.

        Returns:
            y (b, l, strands·d). A subclass does all of it in one launch where its kernel can.
        """
        outputs = []
        for strand, part in enumerate(x.chunk(strands, dim=-1)):
            against = reverse != (strand == 1)
            y = self.output(part, seq_idx=seq_idx, reverse=against)
            if backward is not None:
                y = y + backward.output(part, seq_idx=seq_idx, reverse=not against)
            outputs.append(y)
        return outputs[0] if strands == 1 else torch.cat(outputs, dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixer:
        # Casting to 16 bit passes these by: rounding A or the step size would change the time constants.
        kept = [self.get_parameter(name) for name in self.float32_parameters if self._has_parameter(name)]
        ids = {id(t) for p in kept for t in (p, p.grad) if t is not None}

        def guarded(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if id(tensor) in ids and out.is_floating_point() and out.element_size() < 4:
                out = tensor.to(device=out.device, dtype=torch.float32)
            return out

        return super()._apply(guarded, recurse)

    def _has_parameter(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(module), leaf, None) is not None


def float32_parameter(values: Tensor) -> nn.Parameter:
    """A parameter in float32, or wider when that is torch's default dtype."""
    return nn.Parameter(values.to(torch.promote_types(torch.float32, torch.get_default_dtype())))


def init_dt_bias(size: int, dt_min: float, dt_max: float, dt_floor: float) -> Tensor:
    """(size,) inverse softplus of step sizes drawn log-uniformly from [dt_min, dt_max] (Mamba, section 3.6)."""
    dt = torch.exp(torch.empty(size).uniform_(math.log(dt_min), math.log(dt_max))).clamp(min=dt_floor)
    return dt + torch.log(-torch.expm1(-dt))


def stream_directions(strands: int, mixers: int, reverse: bool) -> tuple[bool, ...]:
    """The reading direction of each (strand, mixer) pair, strand by strand: True is against the sequence."""
    return tuple(reverse ^ (strand == 1) ^ (mixer == 1) for strand in range(strands) for mixer in range(mixers))


def join(parameters: Sequence[Tensor], strands: int) -> Tensor:
    """One parameter per mixer -> their concatenation along dim 0, once a strand."""
    return parameters[0] if len(parameters) * strands == 1 else torch.cat(list(parameters) * strands)


def project_streams(x: Tensor, linears: Sequence[nn.Linear], sizes: Sequence[int], strands: int) -> list[Tensor]:
    """Project x (b, l, strands·d) by the fused projections of one or two mixers.

    Args:
        linears: one a mixer, with sum(sizes) rows; twice the same one for tied mixers.
        sizes: the widths of the parts that a projection yields.

    Returns:
        One tensor a part, (b, l, strands·mixers·size), streams side by side, so that one kernel takes them all.
    """
    mixers = len(linears)
    if strands == 1 and mixers == 1:
        return list(linears[0](x).split(list(sizes), dim=-1))
    if strands > 1:
        x = x.unflatten(-1, (strands, -1))  # (b, l, s, d)
    if mixers > 1 and linears[0] is linears[1]:
        # One product for both directions, then its parts written twice.
        parts = linears[0](x).split(list(sizes), dim=-1)
        return [torch.cat([part, part], dim=-1).flatten(2) for part in parts]
    rows = [linear.weight.split(list(sizes)) for linear in linears]
    biases = [linear.bias.split(list(sizes)) if linear.bias is not None else None for linear in linears]
    weights = [torch.cat([row[i] for row in rows]) for i in range(len(sizes))]  # [(mixers·size, d)]
    bias = [
        torch.cat([b[i] for b in biases if b is not None]) if biases[0] is not None else None for i in range(len(sizes))
    ]
    if strands == 1:
        joint = torch.cat([b for b in bias if b is not None]) if bias[0] is not None else None
        return list(F.linear(x, torch.cat(weights), joint).split([mixers * size for size in sizes], dim=-1))
    return [F.linear(x, w, b).flatten(2) for w, b in zip(weights, bias, strict=True)]


def merge_streams(y: Tensor, linears: Sequence[nn.Linear], strands: int) -> Tensor:
    """Output projections of all streams, y (b, l, strands·mixers·e), added over mixers -> (b, l, strands·d)."""
    if len(linears) == 1:
        return linears[0](y) if strands == 1 else linears[0](y.unflatten(-1, (strands, -1))).flatten(2)
    bias = None if linears[0].bias is None else linears[0].bias + linears[1].bias
    if linears[0] is linears[1]:
        y = y.unflatten(-1, (strands, 2, -1)).sum(-2)  # (b, l, s, e)
        weight = linears[0].weight
    else:
        y = y.unflatten(-1, (strands, -1))  # (b, l, s, 2e)
        weight = torch.cat([linear.weight for linear in linears], dim=1)  # the product adds the directions
    return F.linear(y, weight, bias).flatten(2)
