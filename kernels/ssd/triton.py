"""Backend "triton": the SSD scan on the GPU; the README derives it and states its plan and cost."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqssm.kernels.launching import Launcher, cdiv, launcher, next_power_of_2
from seqssm.kernels.ssd.triton_backward import input_kernel, keep_kernel, reduce_kernel, sum_kernel
from seqssm.kernels.ssd.triton_forward import output_kernel, pass_kernel, prepare_kernel, step_kernel, walk_kernel
from seqssm.kernels.triton_tiles import reverse_mask, strides, use_device

# Tokens of a chunk and channels of a program, for products of 16-bit inputs and of float32 ones (True): those run
# without matrix units, and hold whole rows and columns of their operands in registers.
_CHUNK = {False: 64, True: 16}
_BLOCK_P = {False: 64, True: 32}
# Channels of a program, at least, by padded states: the warp-group products of 16-bit inputs start at 64 states, and on
# an H200 those with 16 channels gave a wrong gradient of the initial state.
_NARROWEST = {16: 16, 32: 16}
# Tokens of a segment: the most, and, where that many programs would not fill the GPU, the least.
_SEGMENT, _SHORTEST_SEGMENT = 2048, 256
_ENOUGH_PROGRAMS = 192
# Bytes for the states entering and the adjoints leaving each chunk: the backward pass takes slabs that fit.
_KEPT_BYTES = 768 << 20
# States of a program of the sums over heads, and how many programs there should be: else a group's heads are split.
_SUM_BLOCK_N = {False: 128, True: 64}
_ENOUGH_SUMS = 256
# Chosen by the registers, spills and shared memory of the compiled kernels. Left to itself, the assembler compiles some
# float32 kernels for 32 or 128 registers and spills thousands of values.
_WALK = {False: {"num_warps": 4, "num_stages": 3}, True: {"num_warps": 4, "num_stages": 1}}
_OUTPUT = {False: {"num_warps": 4, "num_stages": 2}, True: {"num_warps": 8, "num_stages": 1, "maxnreg": 255}}
_INPUT = {False: {"num_warps": 4, "num_stages": 1}, True: {"num_warps": 8, "num_stages": 1, "maxnreg": 255}}
_SUM = {False: {"num_warps": 4, "num_stages": 2}, True: {"num_warps": 4, "num_stages": 1}}


class _Plan(NamedTuple):
    """How a scan is cut up: it follows from shapes and dtypes."""

    exact: bool  # products of float32
    chunk: int  # tokens
    chunks: int
    per_segment: int  # chunks
    segments: int
    block_n: int
    block_p: int
    blocks: int  # of channels in a head

    @property
    def state_size(self) -> int:
        """Elements of a head's state, padded."""
        return self.blocks * self.block_n * self.block_p


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
    chunk: int | None,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, h, p), the final state (b, h, p, n) and the states entering the segments (empty unless saved)."""
    b, l, h, p = x.shape
    n = B.shape[3]
    plan = _plan(x, B, C, chunk)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state = _float32(b, h, p, n, like=x)
    states = _float32(b, plan.segments, h, n, p, like=x) if plan.segments > 1 else _float32(0, like=x)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    launch = launcher("ssd", "forward", plan, dt_softplus, reverse, tensors=tensors)
    with use_device(x), launch.together():
        scan = _Scan(plan, launch, x, dt, A, B, dt_bias, dt_softplus, seq_idx, reverse)
        if plan.segments > 1:
            totals = _float32(b, plan.segments, h, like=x)
            scan.walk(x, None, B, states[:, :-1], totals[:, :-1], 0, adjoint=False)
            _pass_states(launch, states, totals, initial_state, backward=False)
        carry, *carry_strides = _carried(states, initial_state)
        launch(
            output_kernel, b * plan.segments * h * plan.blocks,
            x, B, C, D, z, *scan.decays, carry, y, final_state,
            *x.stride(), *B.stride(), *C.stride(), *_skip_strides(D), *strides(z, 4), *carry_strides,
            l, plan.chunks, plan.segments, plan.per_segment, *scan.sizes, **scan.blocks, **_OUTPUT[plan.exact],
        )  # fmt: skip
    return y, final_state, states if save_states else _float32(0, like=x)


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
    chunk: int | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state (None for what is absent), by slabs of segments."""
    b, l, h, p = x.shape
    g = B.shape[2]
    plan = _plan(x, B, C, chunk)
    dx, ddt, dA = (torch.empty(v.shape, dtype=v.dtype, device=x.device) for v in (x, dt, A))
    dz, dbias, dinitial = (
        None if v is None else torch.empty(v.shape, dtype=v.dtype, device=x.device) for v in (z, dt_bias, initial_state)
    )
    rows = b * plan.chunks
    sums = _float32(3, h, rows, like=x)
    channels = D is not None and D.dim() == 2
    dD_parts = _float32(rows, h, plan.blocks * plan.block_p, like=x) if channels else None
    dD = None if D is None or channels else torch.empty(D.shape, dtype=D.dtype, device=x.device)
    sum_block_n = min(plan.block_n, _SUM_BLOCK_N[plan.exact])
    sum_programs = b * g * plan.block_n // sum_block_n  # a chunk
    splits = _head_splits(sum_programs * plan.chunks, h // g)
    dB, dC = (
        torch.empty((splits, *v.shape), dtype=v.dtype, device=x.device)
        if splits == 1
        else _float32(splits, *v.shape, like=x)
        for v in (B, C)
    )
    kept_dtype = torch.float32 if plan.exact else x.dtype
    segment_bytes = 2 * kept_dtype.itemsize * b * plan.per_segment * h * plan.state_size
    slabs = cdiv(plan.segments, max(1, _KEPT_BYTES // segment_bytes))
    slab = cdiv(plan.segments, slabs)
    kept_size = b * slab * plan.per_segment * h * plan.state_size
    entering, leaving = (torch.empty(kept_size, dtype=kept_dtype, device=x.device) for _ in range(2))
    tensors = (dy, dfinal_state, states, x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    launch = launcher("ssd", "backward", plan, dt_softplus, reverse, splits, slab, tensors=tensors)
    with use_device(x), launch.together():
        scan = _Scan(plan, launch, x, dt, A, B, dt_bias, dt_softplus, seq_idx, reverse)
        adjoints = states
        if plan.segments > 1:
            adjoints, totals = torch.empty_like(states), _float32(b, plan.segments, h, like=x)
            # Nothing needs what the first segment makes.
            scan.walk(dy, z, C, adjoints[:, 1:], totals[:, 1:], 1, adjoint=True)
            _pass_states(launch, adjoints, totals, dfinal_state, backward=True)
        S, *S_strides = _carried(states, initial_state)
        R, *R_strides = _carried(adjoints, dfinal_state)
        layout = (*x.stride(), *dy.stride())
        groups = (*B.stride(), *C.stride())
        for first in range(0, plan.segments, slab):
            count = min(slab, plan.segments - first)
            launch(
                keep_kernel, 2 * b * count * h * plan.blocks,
                x, dy, B, C, z, *scan.decays, S, R, entering, leaving, dinitial,
                *layout, *groups, *strides(z, 4), *S_strides, *R_strides,
                l, plan.chunks, first, count, plan.per_segment, *scan.sizes, **scan.blocks, **_WALK[plan.exact],
            )  # fmt: skip
            first_chunk, kept_chunks = first * plan.per_segment, count * plan.per_segment
            launch(
                input_kernel, b * kept_chunks * h,
                x, dy, A, B, C, D, z, *scan.decays, entering, leaving, dx, dz, ddt, sums, dD_parts,
                *layout, *A.stride(), *groups, *_skip_strides(D), *strides(z, 4),
                l, plan.chunks, first_chunk, kept_chunks, rows, *scan.sizes,
                SOFTPLUS=dt_softplus, CHANNELS=channels, **scan.blocks, **_INPUT[plan.exact],
            )  # fmt: skip
            launch(
                sum_kernel, sum_programs * kept_chunks * splits,
                x, dy, B, C, z, *scan.decays, entering, leaving, dB, dC,
                *layout, *groups, *strides(z, 4), dB.stride(0),
                l, plan.chunks, first_chunk, kept_chunks, splits, *scan.sizes,
                **scan.blocks | {"BLOCK_N": sum_block_n}, PADDED_N=plan.block_n, **_SUM[plan.exact],
            )  # fmt: skip
        launch(reduce_kernel, 3 * h, sums, dA, dbias, dD, rows, h, BLOCK=1024, num_warps=4)
    if dD_parts is not None:
        dD = dD_parts.sum(0)[:, :p]
    dB, dC = (v[0] if splits == 1 else v.sum(0) for v in (dB, dC))
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def empty_states(x: Tensor, B: Tensor, chunk: int | None) -> Tensor:
    """Room for the states that enter the segments: (b, segments, h, n, p) float32, empty for a single segment."""
    b, _, h, p = x.shape
    segments = _segments(x)[1]
    return _float32(b, segments, h, B.shape[3], p, like=x) if segments > 1 else _float32(0, like=x)


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """One token: the state (b, h, p, n) in place, returns y (b, h, p). One launch, so a CUDA graph can hold it."""
    b, h, p = x.shape
    g, n = B.shape[1:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = next_power_of_2(n)
    block_p = min(next_power_of_2(p), max(1, 2048 // block_n))
    with use_device(x):
        launch = launcher("ssd", "step", dt_softplus, tensors=(state, x, dt, A, B, C, D, z, dt_bias))
        launch(
            step_kernel, b * h * cdiv(p, block_p),
            state, x, dt, A, B, C, D, z, dt_bias, y,
            *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(),
            *_skip_strides(D), *strides(z, 3), *strides(dt_bias, 1), h, h // g, p, n,
            SOFTPLUS=dt_softplus, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    return y


class _Scan:
    """What all launches of one pass share; preparing it computes the step sizes and the decays."""

    def __init__(
        self,
        plan: _Plan,
        launch: Launcher,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        seq_idx: Tensor | None,
        reverse: tuple[bool, ...],
    ) -> None:
        self.plan, self.launch = plan, launch
        self.b, self.l, self.h, p = x.shape
        g, n = B.shape[2:]
        self.sizes = (self.h, self.h // g, p, n, reverse_mask(reverse))
        self.blocks: dict[str, Any] = {
            "EXACT": plan.exact,
            "CHUNK": plan.chunk,
            "BLOCK_N": plan.block_n,
            "BLOCK_P": plan.block_p,
            "BLOCKS": plan.blocks,
        }
        block_h = min(next_power_of_2(self.h), 16)
        padded = plan.chunks * plan.chunk
        steps = _float32(self.b, self.h, padded, like=x)
        logs = torch.empty_like(steps, dtype=torch.float64 if plan.exact else torch.float32)
        resets = None if seq_idx is None else torch.empty_like(steps, dtype=torch.int32)
        self.decays = (steps, logs, resets)
        self.launch(
            prepare_kernel, self.b * plan.chunks * cdiv(self.h, block_h),
            dt, A, dt_bias, seq_idx, *self.decays,
            *dt.stride(), *A.stride(), *strides(dt_bias, 1), *strides(seq_idx, 2),
            self.l, padded, self.h, self.h // g, self.sizes[-1],
            SOFTPLUS=dt_softplus, CHUNK=plan.chunk, BLOCK=block_h, num_warps=2,
        )  # fmt: skip

    def walk(
        self,
        values: Tensor,
        gate: Tensor | None,
        keys: Tensor,
        carry: Tensor,
        totals: Tensor,
        first: int,
        adjoint: bool,
    ) -> None:
        """What the segments of ``carry`` (b, segments, h, n, p), of which ``first`` is the first, make from zero."""
        segments = carry.shape[1]
        self.launch(
            walk_kernel, self.b * segments * self.h * self.plan.blocks,
            values, gate, keys, *self.decays, carry, totals,
            *values.stride(), *strides(gate, 4), *keys.stride(), carry.stride(0), totals.stride(0),
            self.l, self.plan.chunks, first, segments, self.plan.per_segment, *self.sizes,
            ADJOINT=adjoint, **self.blocks, **_WALK[self.plan.exact],
        )  # fmt: skip


def _pass_states(launch: Launcher, carry: Tensor, totals: Tensor, entering: Tensor | None, backward: bool) -> None:
    b, segments, h, n, p = carry.shape
    block = 64
    at = (0, 0, 0, 0) if entering is None else (*entering.stride()[:2], entering.stride(3), entering.stride(2))
    launch(
        pass_kernel, b * h * cdiv(n * p, block),
        carry, totals, entering, *at, segments, h, p, n * p, BACKWARD=backward, UNROLL=16, BLOCK=block, num_warps=1,
    )  # fmt: skip


def _carried(states: Tensor, single: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """States (b, segments, h, n, p) and their strides; where there is one segment, ``single`` (b, h, p, n) as such."""
    if states.numel():
        return (states, *states.stride())
    if single is None:
        return (None, 0, 0, 0, 0, 0)
    b, h, p, n = single.stride()
    return single, b, 0, h, n, p


def _plan(x: Tensor, B: Tensor, C: Tensor, chunk: int | None) -> _Plan:
    l, p = x.shape[1], x.shape[3]
    exact = x.dtype == torch.float32 or not x.dtype == B.dtype == C.dtype
    q = min(_CHUNK[exact], max(16, next_power_of_2(min(chunk or _CHUNK[exact], l))))
    segment, segments = _segments(x)
    chunks = cdiv(l, q)
    block_n = max(16, next_power_of_2(B.shape[3]))
    narrowest = 16 if exact else _NARROWEST.get(block_n, 64)
    block_p = min(_BLOCK_P[exact], max(narrowest, next_power_of_2(p)))
    return _Plan(
        exact=exact,
        chunk=q,
        chunks=chunks,
        per_segment=segment // q if segments > 1 else chunks,
        segments=segments,
        block_n=block_n,
        block_p=block_p,
        blocks=cdiv(p, block_p),
    )


def _segments(x: Tensor) -> tuple[int, int]:
    """Tokens of a segment, the same for any dtype, and the number of segments."""
    b, l, h, p = x.shape
    segment = _SEGMENT
    while segment > _SHORTEST_SEGMENT and b * h * cdiv(p, 64) * cdiv(l, segment) < _ENOUGH_PROGRAMS:
        segment //= 2
    return segment, cdiv(l, segment)


def _head_splits(programs: int, heads: int) -> int:
    """Equal parts of a group's heads, as few as fill the GPU with ``programs`` times as many programs."""
    return next((s for s in range(1, heads + 1) if heads % s == 0 and programs * s >= _ENOUGH_SUMS), heads)


def _skip_strides(D: Tensor | None) -> tuple[int, int]:
    """Strides of D (h,) or (h, p) over heads and channels."""
    return (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)


def _float32(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
