# mypy: ignore-errors
# (these functions are Triton's language, which Python's types do not describe)
"""Building blocks of the Triton kernels of the selective scan and the convolution.

A program owns a block of channels, spread over its lanes, and walks over time in tiles of TILE tokens. A tile is one
tensor (TILE, BLOCK) where it is loaded and computed with; for the recurrence it is split into a tuple of TILE vectors
over the channels. Every thread holds whole time series of its own channels: nothing moves between lanes, and a state,
whose number is a plain loop, needs no power of two.
Time is scan time everywhere; ``rows`` maps it to memory, backwards for the groups that run in reverse.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(per_group, groups, segments, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Batch row, segment, group, block in the group, channels (BLOCK,) and their mask of this program.

    Blocks of channels are next to each other in the launch: they share B and C. ``per_group`` channels in a group come
    from the launcher, which lets the compiler know their alignment. With WIDE (see ``wide_offsets``) the group has
    64 bits, and with it all that is made from it: the channels, and the direction, which the stride over time takes up.
    """
    blocks = tl.cdiv(per_group, BLOCK)
    pid = tl.program_id(0)
    block = pid % (blocks * groups)
    row = pid // (blocks * groups)
    group = block // blocks
    if WIDE:
        group = group.to(tl.int64)
    offsets = tl.max_contiguous((block % blocks) * BLOCK + tl.arange(0, BLOCK), BLOCK // 32)
    return (
        (row // segments).to(tl.int64),
        row % segments,
        group,
        block % blocks,
        (group * per_group + offsets),
        offsets < per_group,
    )


@triton.jit
def rows(pointer, batch, start, length, direction, stride_b, stride_t):
    """Pointer to the row of scan time ``start``, and the stride from there to the next row in scan time.

    Rows are then taken by their number, not by a pointer that moves on: their offsets from a pointer that moves would
    be the same in every round, and all be kept in registers.
    """
    first = tl.where(direction > 0, 0, length - 1).to(tl.int64) + direction * start.to(tl.int64)
    return pointer + batch * stride_b + first * stride_t, direction * stride_t


@triton.jit
def unstack(tile, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of ``tile`` (TILE, BLOCK) as a tuple; nothing moves where a lane has all rows of its channels."""
    if TILE == 4:
        halves = (tl.permute(tl.reshape(tile, [2, 2, BLOCK]), [2, 1, 0]),)
    elif TILE == 8:
        halves = (tl.permute(tl.reshape(tile, [2, 2, 2, BLOCK]), [3, 2, 1, 0]),)
    else:
        tl.static_assert(TILE == 16, "a tile has 4, 8 or 16 tokens")
        halves = (tl.permute(tl.reshape(tile, [2, 2, 2, 2, BLOCK]), [4, 3, 2, 1, 0]),)
    for _ in tl.static_range(4):
        if len(halves) < TILE:
            parts = ()
            for i in tl.static_range(len(halves)):
                parts += tl.split(halves[i])
            halves = parts
    return halves


@triton.jit
def stack(rows, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of ``unstack``."""
    for _ in tl.static_range(4):
        if len(rows) > 1:
            pairs = ()
            for i in tl.static_range(len(rows) // 2):
                pairs += (tl.join(rows[2 * i], rows[2 * i + 1]),)
            rows = pairs
    if TILE == 4:
        tile = tl.permute(rows[0], [2, 1, 0])
    elif TILE == 8:
        tile = tl.permute(rows[0], [3, 2, 1, 0])
    else:
        tile = tl.permute(rows[0], [4, 3, 2, 1, 0])
    return tl.reshape(tile, [TILE, BLOCK])


@triton.jit
def load_tile(pointer, step, offsets, t, mask, count, TILE: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows t to t + TILE from ``pointer`` on as (TILE, BLOCK), zeros from the ``count``-th of them on; WHOLE says that
    all rows and channels are there."""
    j = tl.arange(0, TILE)
    at = (pointer + (t + j) * step)[:, None] + offsets[None, :]
    if WHOLE:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=mask[None, :] & (j < count)[:, None], other=0.0)
    return tile


@triton.jit
def store_tile(pointer, step, offsets, t, mask, count, tile, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Write the first ``count`` of rows t to t + TILE."""
    j = tl.arange(0, TILE)
    at = (pointer + (t + j) * step)[:, None] + offsets[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    if WHOLE:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=mask[None, :] & (j < count)[:, None])


@triton.jit
def load_channels(pointers, mask):
    """One value a channel, zero outside the mask if there is one."""
    if mask is None:
        value = tl.load(pointers)
    else:
        value = tl.load(pointers, mask=mask, other=0.0)
    return value


@triton.jit
def load_numbers(pointer, COUNT: tl.constexpr):
    """COUNT float32 scalars, the same for all lanes, from a pointer to pairs of them: half the loads."""
    numbers = ()
    for j in tl.static_range(COUNT // 2):
        pair = tl.load(pointer + j)
        numbers += (
            pair.to(tl.int32).to(tl.float32, bitcast=True),
            (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True),
        )
    return numbers


@triton.jit
def prefetch(pointers, LEVEL: tl.constexpr):
    """Ask for the cache lines at 32 ``pointers``, one a lane, long before they are loaded; nothing at LEVEL 0."""
    if LEVEL == 1:
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, False, 1
        )
    if LEVEL == 2:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, False, 1
        )


@triton.jit
def prefetch_rows(
    pointer, step, stride_c, t, first, last, per_group_end, TILE: tl.constexpr, BLOCK: tl.constexpr, LEVEL: tl.constexpr
):  # fmt: skip
    """``prefetch`` for BLOCK channels from ``first`` of rows t to t + TILE from ``pointer``: a row is asked for at
    32 / TILE places. Rows after t + ``last`` and channels from ``per_group_end`` on, which may not exist, become the
    nearest one."""
    pointer += t * step
    if LEVEL > 0:
        lane = tl.arange(0, 32)
        channel = tl.minimum(first + lane // TILE * (BLOCK * TILE // 32), per_group_end - 1)
        prefetch(pointer + tl.minimum(lane % TILE, last) * step + channel * stride_c, LEVEL)


@triton.jit
def prefetch_numbers(pointer, size, LEVEL: tl.constexpr):
    """``prefetch`` for ``size`` int64 from ``pointer`` on, by sectors of 32 bytes."""
    if LEVEL > 0:
        for i in range(0, size, 128):
            prefetch(pointer + tl.minimum(i + tl.arange(0, 32) * 4, size - 1), LEVEL)


@triton.jit
def load_keeps(seq_idx, batch, start, length, direction, stride_b, stride_t, count, TILE: tl.constexpr):
    """TILE scalars: 0.0 where the state is reset before the token, else 1.0."""
    pointer, step = rows(seq_idx, batch, start, length, direction, stride_b, stride_t)
    keeps = ()
    for j in tl.static_range(TILE):
        follows = (j < count) & (start + j > 0)
        current = tl.load(pointer + j * step, mask=follows, other=0)
        before = tl.load(pointer + (j - 1) * step, mask=follows, other=0)
        keeps += (tl.where(current == before, 1.0, 0.0),)
    return keeps


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); the square of a reciprocal root, because a division costs four times as much."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with a small relative error for every x: log1p by a polynomial, which has no cancellation."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = 0.005253457929939032 * e - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def step_sizes(raw, bias, count, SOFTPLUS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """The step sizes of a tile from ``delta``; zero, which leaves a state as it is, from row ``count`` on."""
    steps = raw.to(tl.float32) + bias[None, :]
    if SOFTPLUS:
        steps = softplus(steps)
    if not WHOLE:
        steps = tl.where((tl.arange(0, TILE) < count)[:, None], steps, 0.0)
    return steps


@triton.jit
def zeros(TILE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of zeros."""
    tile = ()
    for _ in tl.static_range(TILE):
        tile += (tl.zeros([BLOCK], tl.float32),)
    return tile


def sum_and_store_assembly(count: int, pack: int) -> tuple[str, str]:
    """PTX, and its register constraints, that sums ``count`` vectors over the lanes of a warp, with ``pack`` elements
    in each, and stores the sums as float32 at the address in the last operand.

    It stores by itself so that no value has to keep its place among the lanes: it holds for any layout that has no
    replication. A lane hands half of its vectors to its partner at each step and takes over the sums of the other half:
    31 shuffles for 32 sums, where one sum after another takes 160.
    """
    inputs = [f"${pack + i}" for i in range(count * pack)]
    address = f"${pack + count * pack}"
    log = count.bit_length() - 1
    text = [f".reg .f32 v<{count}>, w;", ".reg .pred p;", ".reg .u32 lane, bit;", ".reg .u64 at;"]
    text += ["mov.u32 lane, %laneid;"]
    for i in range(count):
        first, *rest = inputs[i * pack : (i + 1) * pack]
        text.append(f"mov.f32 v{i}, {first};")
        text += [f"add.f32 v{i}, v{i}, {x};" for x in rest]
    left = count
    for offset in (16, 8, 4, 2, 1):
        if left > 1:
            left //= 2
            text += [f"and.b32 bit, lane, {offset};", "setp.ne.u32 p, bit, 0;"]
            for i in range(left):
                low, high = f"v{i}", f"v{i + left}"
                text += [f"selp.f32 w, {low}, {high}, p;", f"selp.f32 {low}, {high}, {low}, p;"]
                text += [f"shfl.sync.bfly.b32 w, w, {offset}, 31, -1;", f"add.f32 {low}, {low}, w;"]
        else:
            text += [f"shfl.sync.bfly.b32 w, v0, {offset}, 31, -1;", "add.f32 v0, v0, w;"]
    # The number of the vector whose sum this lane holds, and whether it is the one to store it.
    text += [f"and.b32 bit, lane, {(32 >> log) - 1};", "setp.eq.u32 p, bit, 0;", f"shr.u32 bit, lane, {5 - log};"]
    text += ["mul.wide.u32 at, bit, 4;", f"add.s64 at, at, {address};", "@p st.global.f32 [at], v0;"]
    text += [f"mov.u32 ${i}, 0;" for i in range(pack)]
    constraints = ["=r"] * pack + ["f"] * len(inputs) + ["l"] * pack
    return "{ " + " ".join(text) + " }", ",".join(constraints)


@triton.jit
def sum_and_store(
    values, at, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Store at the scalar pointer ``at`` the sums of COUNT vectors, of one warp, as in ``sum_and_store_assembly``; the
    plain form, without ASSEMBLY, does the same."""
    if ASSEMBLY is None:
        for i in tl.static_range(COUNT):
            tl.store(at + i, tl.sum(values[i]))
    else:
        operands = values + (at.to(tl.int64),)  # noqa: RUF005  (Triton has no starred tuples)
        tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, operands, tl.int32, False, PACK)


def reverse_mask(reverse: Sequence[bool]) -> int:
    """One bit for each group, set where it runs backwards."""
    if any(reverse) and len(reverse) > 63:
        raise ValueError(f"backend 'triton' takes at most 63 groups in mixed directions, got {len(reverse)}")
    return sum(1 << i for i, r in enumerate(reverse) if r)


def wide_offsets(span: int, *tensors: Tensor | None) -> bool:
    """Whether the last channel of the token ``span`` tokens on is 2^31 elements or more away in one of the tensors
    (b, l, d), or in a contiguous one of the same shape: so it is in a channel-major view of a long sequence. Offsets of
    32 bits, which a program takes from its first token, would wrap round."""
    for x in tensors:
        if x is None or (x.untyped_storage().nbytes() < 2**31 and (span + 1) * x.shape[2] < 2**31):
            continue
        if max((x.shape[2] - 1) * x.stride(2) + span * x.stride(1), (span + 1) * x.shape[2]) >= 2**31:
            return True
    return False


def strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of ``x``, zeros for an absent one."""
    return (0,) * dims if x is None else x.stride()


def use_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of ``x``."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()
