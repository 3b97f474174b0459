# mypy: ignore-errors
# (the kernels are Triton's language, which Python's types do not describe)
"""The forward selective scan on the GPU for so many sequences and channels that the length need not be cut."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqssm.kernels.launching import cdiv, launcher, next_power_of_2
from seqssm.kernels.triton_tiles import (
    LOG2E,
    load_channels,
    load_keeps,
    load_tile,
    locate,
    reverse_mask,
    rows,
    sigmoid,
    step_sizes,
    store_tile,
    strides,
    use_device,
    wide_offsets,
)

# Lanes that share the states of a channel, which are as many tokens as are prepared side by side.
LANES = tl.constexpr(4)
# Channels of a program; tokens that it reads ahead, in units of LANES; tokens of a program that packs B and C.
_BLOCK, _TILES, _PAIR_TOKENS = 8, 4, 128
# The programs that fill a GPU, and the numbers of states with which this is the fastest way: they stay in registers.
_ENOUGH_PROGRAMS, _STATES = 1024, (16,)
# A limit keeps what is read ahead in registers: without one the compiler puts the loads off until they are needed.
_REGISTERS = 128


def fits(u: Tensor, B: Tensor) -> bool:
    """Whether to scan sequences u (b, l, d) as whole ones, with B (b, l, g, n)."""
    b, _, d = u.shape
    g, n = B.shape[2:]
    return n in _STATES and b * g * cdiv(d // g, _BLOCK) >= _ENOUGH_PROGRAMS


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
    y: Tensor,
    final_state: Tensor,
) -> None:
    """Write y (b, l, d), contiguous, and the final state (b, d, n) float32; the other arguments are those of
    ``selective_scan``, with D and delta_bias contiguous. A program scans _BLOCK channels of one sequence."""
    b, l, d = u.shape
    n, g = A.shape[1], B.shape[2]
    share = next_power_of_2(cdiv(n, LANES.value))
    tokens = _TILES * LANES.value
    whole = l % tokens == 0 and d // g % _BLOCK == 0 and n == share * LANES.value
    mask = reverse_mask(reverse)
    A = A.contiguous()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    tensors = (u, delta, z, A, B, C, D, delta_bias, initial_state, seq_idx)
    launch = launcher("scan", "whole", delta_softplus, reverse, tensors=tensors)
    with use_device(u), launch.together():
        # Half the bytes where nothing is rounded by it.
        narrow = B.dtype == C.dtype == torch.bfloat16
        pairs = B.new_empty((b, g, l, n), dtype=torch.int32 if narrow else torch.int64)
        launch(
            pair_kernel, b * g * cdiv(l, _PAIR_TOKENS),
            B, C, pairs, *B.stride(), *C.stride(), l, g, n, mask, BLOCK_T=_PAIR_TOKENS, BLOCK_N=next_power_of_2(n),
        )  # fmt: skip
        launch(
            single_scan_kernel, b * g * cdiv(d // g, _BLOCK),
            u, delta, z, y, pairs, A, D, delta_bias, initial_state, final_state, seq_idx,
            *u.stride(), *delta.stride(), *strides(z, 3), *strides(seq_idx, 2), l, d, d // g, g, n, mask,
            SOFTPLUS=delta_softplus, WHOLE=whole, WIDE=wide_offsets(l, u, delta, z),
            TILES=_TILES, BLOCK=_BLOCK, SHARE=share, num_warps=1, maxnreg=_REGISTERS,
        )  # fmt: skip


@triton.jit
def _bits(x, pairs):
    """``x`` as the lower half of an integer of the type that ``pairs`` points to: rounded to bfloat16 in one of 32
    bits, to float32 in one of 64."""
    if pairs.dtype.element_ty == tl.int64:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True).to(tl.int64)
    else:
        bits = x.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
    return bits


@triton.jit(do_not_specialize=["length", "reverse_mask"])
def pair_kernel(
    B, C, pairs, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, length, groups, states, reverse_mask,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """B and C (b, l, g, n), B in the lower half, to integers ``pairs`` (b, g, l, n) in scan order."""
    blocks = tl.cdiv(length, BLOCK_T)
    pid = tl.program_id(0)
    group = ((pid // blocks) % groups).to(tl.int64)  # B and C may be state-major views of a long sequence
    batch = (pid // (blocks * groups)).to(tl.int64)
    time = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.where(((reverse_mask >> group) & 1) != 0, length - 1 - time, time).to(tl.int64)
    out = pairs + ((batch * groups + group) * length + time) * states
    SHIFT: tl.constexpr = pairs.dtype.element_ty.primitive_bitwidth // 2
    for n0 in range(0, states, BLOCK_N):
        n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (time < length)[:, None] & (n < states)[None, :]
        b = tl.load(B + batch * B_b + group * B_g + token[:, None] * B_t + n[None, :] * B_n, mask=inside, other=0.0)
        read = tl.load(C + batch * C_b + group * C_g + token[:, None] * C_t + n[None, :] * C_n, mask=inside, other=0.0)
        tl.store(out[:, None] + n[None, :], _bits(b, pairs) | (_bits(read, pairs) << SHIFT), mask=inside)


@triton.jit
def _load_tiles(pointer, step, offsets, t, mask, length, TILES: tl.constexpr, WHOLE: tl.constexpr):
    """TILES times LANES rows (LANES, BLOCK) from row ``t`` on."""
    tiles = ()
    for i in tl.static_range(TILES):
        first = t + i * LANES
        tiles += (load_tile(pointer, step, offsets, first, mask, length - first, LANES, WHOLE),)
    return tiles


@triton.jit
def _load_pairs(pairs, t, states, there, count, SHARE: tl.constexpr, WHOLE: tl.constexpr):
    """B and C of LANES tokens from ``t``, (LANES, SHARE) each."""
    tokens = ()
    for j in tl.static_range(LANES):
        if WHOLE:  # the offsets are constants
            tokens += (tl.load(pairs + t * (LANES * SHARE) + j * (LANES * SHARE)),)
        else:
            tokens += (tl.load(pairs + (t + j) * states, mask=there & (j < count), other=0),)
    return tokens


@triton.jit
def _unpack(pair):
    """B and C from what ``pair_kernel`` makes of them; a bfloat16 is the upper half of a float32."""
    if pair.dtype == tl.int64:
        b, read = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    else:
        b, read = pair << 16, pair & -65536
    return b.to(tl.float32, bitcast=True), read.to(tl.float32, bitcast=True)


@triton.jit
def _exchange(low, high, BIT: tl.constexpr):
    """``low`` (LANES, BLOCK) in the lanes without BIT and ``high`` in the others, each plus the other lane's."""
    lane = tl.arange(0, LANES)[:, None]
    other = tl.broadcast_to(lane ^ BIT, low.shape)
    upper = (lane & BIT) != 0
    return tl.where(upper, high, low) + tl.gather(tl.where(upper, low, high), other, 0)


@triton.jit(do_not_specialize=["length", "reverse_mask"])
def single_scan_kernel(
    u, delta, z, y, pairs, A, D, bias, initial_state, final_state, seq_idx,
    u_b, u_t, u_c, delta_b, delta_t, delta_c, z_b, z_t, z_c, seq_b, seq_t,
    length, channels, per_group, groups, states, reverse_mask,
    SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    """Scan a whole sequence of BLOCK channels: y (b, l, d) and the final state (b, d, n).

    A tensor (LANES, BLOCK) holds, for what belongs to a token, LANES tokens; and (LANES, BLOCK, SHARE) the states of a
    channel. ``A`` (d, n) is contiguous; ``pairs`` (b, g, l, n) are of ``pair_kernel``. WHOLE says that the length is a
    multiple of TILES * LANES, the channels of a group one of BLOCK, and n = LANES * SHARE.
    """
    batch, _, group, _, c, mask = locate(per_group, groups, 1, BLOCK, WIDE)
    direction = 1 - 2 * ((reverse_mask >> group) & 1)
    lane = tl.arange(0, LANES)[:, None]
    n = lane * SHARE + tl.arange(0, SHARE)[None, :]  # (LANES, SHARE)
    there = n < states
    inside = mask[None, :, None] & there[:, None, :]
    start = tl.zeros((), tl.int32)
    u_row, u_step = rows(u, batch, start, length, direction, u_b, u_t)
    delta_row, delta_step = rows(delta, batch, start, length, direction, delta_b, delta_t)
    y_row, y_step = rows(y, batch, start, length, direction, length.to(tl.int64) * channels, channels)
    at = c[None, :, None] * states + n[:, None, :]
    a2 = tl.load(A + at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    h = tl.zeros([LANES, BLOCK, SHARE], tl.float32)
    if initial_state is not None:
        h = tl.load(initial_state + batch * channels * states + at, mask=inside, other=0.0)
    offset = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = load_channels(bias + c, mask).to(tl.float32)
    skip = tl.zeros([BLOCK], tl.float32)
    if D is not None:
        skip = load_channels(D + c, mask).to(tl.float32)
    pairs += (batch * groups + group) * length * states + n
    next_inputs = _load_tiles(u_row, u_step, c * u_c, start, mask, length, TILES, WHOLE)
    next_raws = _load_tiles(delta_row, delta_step, c * delta_c, start, mask, length, TILES, WHOLE)
    next_pairs = _load_pairs(pairs, start, states, there, length, SHARE, WHOLE)
    next_gates = next_raws
    if z is not None:
        z_row, z_step = rows(z, batch, start, length, direction, z_b, z_t)
        next_gates = _load_tiles(z_row, z_step, c * z_c, start, mask, length, TILES, WHOLE)
    for t in range(0, length, TILES * LANES):
        inputs, raws, gates = next_inputs, next_raws, next_gates
        # The next tokens are read ahead; behind the last ones they are the last ones again.
        ahead = tl.minimum(t + TILES * LANES, (tl.cdiv(length, TILES * LANES) - 1) * TILES * LANES)
        next_inputs = _load_tiles(u_row, u_step, c * u_c, ahead, mask, length, TILES, WHOLE)
        next_raws = _load_tiles(delta_row, delta_step, c * delta_c, ahead, mask, length, TILES, WHOLE)
        if z is not None:
            next_gates = _load_tiles(z_row, z_step, c * z_c, ahead, mask, length, TILES, WHOLE)
        for i in tl.static_range(TILES):
            first = t + i * LANES
            count = length - first
            now = next_pairs
            next_first = first + LANES if i + 1 < TILES else ahead
            next_pairs = _load_pairs(pairs, next_first, states, there, length - next_first, SHARE, WHOLE)
            x = inputs[i].to(tl.float32)
            steps = step_sizes(raws[i], offset, count, SOFTPLUS, LANES, WHOLE)
            drives = steps * x
            if seq_idx is not None:
                keeps = load_keeps(seq_idx, batch, first, length, direction, seq_b, seq_t, count, LANES)
            parts = ()
            for j in tl.static_range(LANES):
                token = tl.full([LANES, BLOCK], j, tl.int32)
                step = tl.gather(steps, token, 0)[:, :, None]
                drive = tl.gather(drives, token, 0)[:, :, None]
                b, read = _unpack(now[j])
                b, read = b[:, None, :], read[:, None, :]
                decay = tl.exp2(step * a2)
                if seq_idx is not None:
                    decay *= keeps[j]
                h = decay * h + drive * b
                parts += (tl.sum(h * read, axis=2),)
            out = _exchange(_exchange(parts[0], parts[2], 2), _exchange(parts[1], parts[3], 2), 1) + skip[None, :] * x
            if z is not None:
                gate = gates[i].to(tl.float32)
                out = out * gate * sigmoid(gate)
            store_tile(y_row, y_step, c, first, mask, count, out, LANES, WHOLE)
    tl.store(final_state + batch * channels * states + at, h, mask=inside)
