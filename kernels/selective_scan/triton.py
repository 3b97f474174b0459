"""Backend "triton": the selective scan on the GPU; the README derives it and states its cost against the limit."""

import functools
import math
import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from seqssm.kernels.launching import Launcher, cdiv, launcher, next_power_of_2
from seqssm.kernels.selective_scan import triton_single
from seqssm.kernels.selective_scan.op import CHUNK
from seqssm.kernels.selective_scan.triton_backward import gradient_kernel, history_kernel, unpack_kernel
from seqssm.kernels.selective_scan.triton_forward import pack_kernel, pass_states_kernel, scan_kernel, step_kernel
from seqssm.kernels.triton_tiles import reverse_mask, strides, sum_and_store_assembly, use_device, wide_offsets

_LOG2E = 1.4426950408889634
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Tokens of a tile and channels of a warp: fixed, so that no length is ever tuned again.
_TILE = 8
_BLOCK = 64
# Tokens of a program that packs B and C, and of one that adds up their gradients, whose work is more.
_PACK_TOKENS, _UNPACK_TOKENS = 128, 32
# Tokens of a forward segment: the most, and, where that many programs would not fill the GPU, the least. Both divide
# CHUNK, so that the states entering the chunks are among those entering the segments.
_SEGMENT, _SHORTEST_SEGMENT = 256, 64
_ENOUGH_PROGRAMS = 4096
# Bytes for the states entering each tile: the backward pass takes the length in slabs that fit.
_HISTORY_BYTES = 256 << 20
# The same for a part of a sequence, where a second slab means that the history is made twice.
_PART_HISTORY_BYTES = 2 << 30
# Registers a thread may have in the forward kernel, which set how many warps a multiprocessor holds. Those of the
# backward pass are left open.
_SUMMARY_REGISTERS, _SCAN_REGISTERS = 96, 128
# Segments through which a program passes states, where there are more than twice as many; and how many it reads ahead.
_SPAN, _PASS_UNROLL, _PASS_BLOCK = (8, 4, 32) if _INTERPRET else (32, 8, 32)
# States that a kernel takes together, where their number is a multiple of it.
_SUMMARY_UNROLL, _SCAN_UNROLL, _HISTORY_UNROLL = 2, 2, 2
# The cache into which a tile's memory is brought while the tile before it is computed: 1 or 2, or 0 for none.
_PREFETCH = 0 if _INTERPRET else 2

# From what a part of a sequence yields by itself, (b, d, n), and its total step size, (b, d), infinite where a reset
# cuts the past off, to what enters it, (b, d, n) float32.
Join = Callable[[Tensor, Tensor], Tensor]


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
    save_states: bool,
    join: Join | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), the final state (b, d, n) and the states entering every CHUNK tokens.

    The latter have the shape (b, chunks, d, n) but lie in memory as ``backward`` reads them, (b, chunks, n, d). With
    ``join`` the tokens are a part of a sequence: the initial state is what it makes of the part's own end.
    """
    b, l, d = u.shape
    n = A.shape[1]
    g = B.shape[2]
    mask = reverse_mask(reverse)
    D, delta_bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    final_state = _float32(b, d, n, like=u)
    states = _float32(b, cdiv(l, CHUNK), d, n, like=u) if save_states else _float32(0, like=u)
    if not save_states and join is None and triton_single.fits(u, B):
        triton_single.forward(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, reverse, y, final_state
        )
        return y, final_state, states
    block = _fit_block(d // g)
    programs = b * g * cdiv(d // g, block)  # a segment
    segment = _SEGMENT
    while segment > _SHORTEST_SEGMENT and programs * cdiv(l, segment) < _ENOUGH_PROGRAMS:
        segment //= 2
    segments = cdiv(l, segment)
    ends = segments + (join is not None)  # a part's own end is the state that enters one more segment, without tokens
    A2 = _transposed_log2(A)
    carry = _float32(b, ends, n, d, like=u, spare=d)
    initial_state = _contiguous32(initial_state)
    whole = l % _TILE == 0 and d // g % block == 0
    wide = wide_offsets(CHUNK, u, delta, z)
    tensors = (u, delta, z, B, C, D, delta_bias, initial_state, seq_idx)
    launch = launcher("scan", "forward", delta_softplus, reverse, save_states, join is None, n, tensors=tensors)
    with use_device(u), launch.together() if join is None else nullcontext():
        packed, tiles = _pack(launch, B, C, 0, l, l, mask, _TILE)
        total_steps = _float32(b, ends, d, like=u)

        def scan(segments: int, summary: bool) -> None:
            unroll = _SUMMARY_UNROLL if summary else _SCAN_UNROLL
            launch(
                scan_kernel, programs * (segments - 1 if summary else segments),
                u, delta, z, y, packed, A2, D, delta_bias, carry, total_steps, initial_state, final_state,
                states if save_states and segments == 1 else None, seq_idx,
                *u.stride(), *delta.stride(), *strides(z, 3), *strides(seq_idx, 2),
                l, d, d // g, g, n, segment, segments, tiles, mask,
                SOFTPLUS=delta_softplus, SUMMARY=summary, CARRIED=segments > 1, WHOLE=whole, WIDE=wide,
                TILE=_TILE, BLOCK=block, UNROLL=unroll if n % unroll == 0 else 1, PREFETCH=_PREFETCH,
                num_warps=1, maxnreg=_SUMMARY_REGISTERS if summary else _SCAN_REGISTERS,
            )  # fmt: skip

        if ends > 1:
            scan(ends, True)
        if join is not None:
            own = carry.clone()
            _pass_states(launch, own, total_steps, A2, None, None, None, ends, 1)
            entering = join(own[:, -1].mT.contiguous(), total_steps[:, :-1].sum(1))
            # A copy in any case: the launcher knows the alignment of tensors of its own only.
            initial_state = entering.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            total_steps = total_steps[:, :-1].contiguous()
            carry = _float32(b, segments, n, d, like=u, spare=d).copy_(carry[:, :-1])
        if segments > 1:
            saved = states if save_states else None
            _pass_states(launch, carry, total_steps, A2, initial_state, None, saved, segments, CHUNK // segment)
        scan(segments, False)
    return y, final_state, states


def backward(
    dy: Tensor,
    dfinal_state: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
    dz: Tensor | None = None,
    y: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    join: Join | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state; slabs of chunks, last to first.

    With z, the gradient of z goes into ``dz``, of any strides, where it is given, and ``y`` (contiguous) takes the
    output of the forward pass, which is at hand on the way. Those of B and C go into ``dB`` and ``dC`` where both are
    given, of the same strides, states side by side. With ``join`` the tokens are a part of a sequence: what it
    makes of the gradient that the part gives to the state entering it comes on top of ``dfinal_state``.
    """
    b, l, d = u.shape
    n = A.shape[1]
    g = B.shape[2]
    mask = reverse_mask(reverse)
    D, delta_bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
    tile, block = _TILE, _fit_block(d // g)
    whole = l % tile == 0 and d // g % block == 0
    wide = wide_offsets(CHUNK, u, delta, z, dy, dz)
    chunks = cdiv(l, CHUNK)
    room = _HISTORY_BYTES if join is None else _PART_HISTORY_BYTES
    slab = max(1, min(chunks, room // (4 * b * (CHUNK // tile) * n * d)))
    A2 = _transposed_log2(A)
    du, ddelta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    if dz is None and z is not None:
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    if dB is None or dC is None:
        dB, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (B, C))
    blocks = cdiv(d // g, block)
    history = _float32(b, slab * (CHUNK // tile), n, d, like=u, spare=d)
    adjoint, dA = (_float32(b, slab, n, d, like=u, spare=d) for _ in range(2))
    total_steps, dD, dbias = (_float32(b, slab, d, like=u) for _ in range(3))
    dpacked = _float32(b, g, blocks, slab * (CHUNK // tile), n, 2, tile, like=u)
    dstate = dfinal_state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    all_strides = (*u.stride(), *delta.stride(), *strides(z, 3), *dy.stride(), *strides(seq_idx, 2))
    # From the last slab to the first, which takes the odd rest: what it adds to is there by then.
    slabs = [(max(0, end - slab), min(slab, end)) for end in range(chunks, 0, -slab)]  # (first chunk, chunks)

    def make_history(first: int, count: int) -> tuple[Tensor, int]:
        packed, tiles = _pack(launch, B, C, first * CHUNK, count * CHUNK, l, mask, tile)
        launch(
            history_kernel, b * count * g * blocks,
            u, delta, z, dy, packed, A2, D, delta_bias, states, history, adjoint, total_steps, seq_idx, dz, y,
            *all_strides, *strides(dz, 3),
            l, d, d // g, g, n, first, chunks, count, mask,
            SOFTPLUS=delta_softplus, WHOLE=whole, WIDE=wide, CHUNK=CHUNK,
            TILE=tile, BLOCK=block, UNROLL=_HISTORY_UNROLL if n % _HISTORY_UNROLL == 0 else 1,
            PREFETCH=_PREFETCH,
            num_warps=1,
        )  # fmt: skip
        return packed, tiles

    tensors = (u, delta, z, dy, B, C, D, delta_bias, initial_state, seq_idx, dz, y, dB, dC)
    launch = launcher("scan", "backward", delta_softplus, reverse, join is None, n, tensors=tensors)
    with use_device(u), launch.together() if join is None else nullcontext():
        made: tuple[Tensor, int] | None = None
        if join is not None:
            own, total = dstate.clone(), torch.zeros_like(total_steps[:, 0])
            for first, count in slabs:
                made = make_history(first, count)
                # With one slab, its history and what its chunks yield serve again below.
                passing = adjoint.clone() if len(slabs) == 1 else adjoint
                _pass_states(launch, passing, total_steps, A2, own, own, None, count, 1, backward=True)
                total += total_steps.flatten(0, 1)[: b * count].unflatten(0, (b, count)).sum(1)
            dstate += join(own, total)
        for first, count in slabs:
            packed, tiles = made if made is not None and len(slabs) == 1 else make_history(first, count)
            inputs = (u, delta, z, dy, packed, A2)
            _pass_states(launch, adjoint, total_steps, A2, dstate, dstate, None, count, 1, backward=True)
            launch(
                gradient_kernel, b * count * g * blocks,
                *inputs, D, delta_bias, history, adjoint, seq_idx, du, ddelta, dpacked, dA, dD, dbias, *all_strides,
                l, d, d // g, g, n, first, count, int(first + count < chunks), mask,
                SOFTPLUS=delta_softplus, WHOLE=whole, WIDE=wide, CHUNK=CHUNK,
                TILE=tile, BLOCK=block, UNROLL=1, PREFETCH=_PREFETCH, **_warp_sums(tile, block),
                num_warps=1,
            )  # fmt: skip
            block_t, block_n = _UNPACK_TOKENS, _state_block(n)
            launch(
                unpack_kernel, b * g * cdiv(count * CHUNK, block_t),
                dpacked, dB, dC, *dB.stride()[:3], first * CHUNK, tiles, l, g, blocks, n, mask,
                TILE=tile, BLOCK_T=block_t, BLOCK_N=block_n,
            )  # fmt: skip
    return (
        du,
        ddelta,
        dA.sum((0, 1)).t(),
        dB,
        dC,
        None if D is None else dD.sum((0, 1)),
        dz,
        None if delta_bias is None else dbias.sum((0, 1)),
        None if initial_state is None else dstate,
    )


def step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """One token: the state (b, d, n) in place, returns y (b, d). One launch, so a CUDA graph can hold it."""
    b, d = u.shape
    n, g = A.shape[1], B.shape[1]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    D, delta_bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
    block_n = min(next_power_of_2(n), 32)
    block = 1024 // block_n if d > 4096 else 256 // block_n
    with use_device(u):
        launcher("scan", "step", delta_softplus, tensors=(state, u, delta, A, B, C, D, z, delta_bias))(
            step_kernel, b * cdiv(d, block),
            state, u, delta, A, B, C, D, z, delta_bias, y,
            *state.stride(), *u.stride(), *delta.stride(), *A.stride(), *B.stride(), *C.stride(), *strides(z, 2),
            d, g, n, SOFTPLUS=delta_softplus, BLOCK=block, BLOCK_N=block_n, num_warps=2,
        )  # fmt: skip
    return y


def _pass_states(
    launch: Launcher,
    carry: Tensor,
    total_steps: Tensor,
    A2: Tensor,
    entering: Tensor | None,
    leaving: Tensor | None,
    saved: Tensor | None,
    segments: int,
    share: int,
    backward: bool = False,
) -> None:
    """Turn what segments yield into what enters them: where there are many, by spans of them side by side."""
    b, _, n, d = carry.shape
    blocks = cdiv(n * d, _PASS_BLOCK)
    spans = cdiv(segments, _SPAN) if segments > 2 * _SPAN else 1
    options = {"UNROLL": _PASS_UNROLL, "BLOCK": _PASS_BLOCK, "num_warps": 1}
    outer = outer_steps = None
    if spans > 1:
        outer = _float32(b, spans, n, d, like=carry)
        outer_steps = _float32(b, spans, d, like=carry)
        launch(
            pass_states_kernel, b * spans * blocks,
            carry, total_steps, A2, None, None, None, outer, outer_steps, segments, _SPAN, d, n,
            BACKWARD=backward, SUMMARY=True, SHARE=1, **options,
        )  # fmt: skip
        launch(
            pass_states_kernel, b * blocks,
            outer, outer_steps, A2, entering, None, None, None, None, spans, spans, d, n,
            BACKWARD=False, SUMMARY=False, SHARE=1, **options,
        )  # fmt: skip
    launch(
        pass_states_kernel, b * spans * blocks,
        carry, total_steps, A2, entering, leaving, saved, outer, None, segments, _SPAN if spans > 1 else segments, d, n,
        BACKWARD=backward, SUMMARY=False, SHARE=share, **options,
    )  # fmt: skip


def _pack(
    launch: Launcher,
    B: Tensor,
    C: Tensor,
    start: int,
    tokens: int,
    length: int,
    reverse_mask: int,
    tile: int,
) -> tuple[Tensor, int]:
    """B and C (b, l, g, n) of ``tokens`` tokens from ``start``, in scan order and float32, (b, g, tiles, n, 2 tile),
    as integers of two each; and the number of tiles."""
    b, _, g, n = B.shape
    tiles = cdiv(tokens, tile)
    size = b * g * tiles * n * 2 * tile
    packed = B.new_empty(size + 2 * tile, dtype=torch.float32)  # the kernels read one row too many
    block_t, block_n = _PACK_TOKENS, _state_block(n)
    launch(
        pack_kernel, b * g * cdiv(tiles * tile, block_t),
        B, C, packed, *B.stride(), *C.stride(), start, tiles, length, g, n, reverse_mask,
        TILE=tile, BLOCK_T=block_t, BLOCK_N=block_n,
    )  # fmt: skip
    return packed.view(torch.int64), tiles


@functools.cache
def _warp_sums(tile: int, block: int) -> dict[str, str | int | None]:
    """The assembly with which ``gradient_kernel`` sums over channels; none in the interpreter, which has no warps."""
    pack = block // 32
    if _INTERPRET:
        return {"PACK": pack, "SUM": None, "SUM_REGISTERS": None}
    text, registers = sum_and_store_assembly(2 * tile, pack)
    return {"PACK": pack, "SUM": text, "SUM_REGISTERS": registers}


def _state_block(states: int) -> int:
    """States that a program of the pack and unpack kernels takes at a time."""
    return min(next_power_of_2(states), 32)


def _fit_block(channels: int) -> int:
    """Channels of a program for groups of so many: one or two a lane."""
    return 32 if channels <= 32 else _BLOCK


def _transposed_log2(A: Tensor) -> Tensor:
    """A log2(e) as (n, d) float32: the kernels exponentiate to base 2, and read one state of many channels at once."""
    d, n = A.shape
    result = _float32(n, d, like=A, spare=d)
    return torch.mul(A.t(), _LOG2E, out=result)


def _float32(*shape: int, like: Tensor, spare: int = 0) -> Tensor:
    """Uninitialised, with memory for ``spare`` more numbers behind it: the kernels read one row too many."""
    if spare == 0:
        return like.new_empty(shape, dtype=torch.float32)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return like.new_empty((math.prod(shape) + spare,), dtype=torch.float32).as_strided(shape, strides)


def _contiguous32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()
