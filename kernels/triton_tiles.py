# mypy: ignore-errors
# (these functions are Triton's language, which Python's types do not describe)
"""Building blocks of the Triton kernels of the selective scan and the convolution.

A program owns a block of channels, spread over its lanes, and walks over time in tiles of TILE tokens. A quantity per
token is a Python tuple of TILE vectors over the channels, so every thread holds whole time series of its own channels:
the recurrence needs no exchange between lanes, and a state, whose number is a plain loop, needs no power of two.
Time is scan time everywhere; ``_row`` maps it to memory, backwards for the groups that run in reverse.
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
def locate(per_group, groups, segments, BLOCK: tl.constexpr):
    """Batch row, segment, group, block in the group, channels (BLOCK,) and their mask of this program.

    Blocks of channels are next to each other in the launch: they share B and C. ``per_group`` channels in a group come
    from the launcher, which lets the compiler know their alignment.
    """
    blocks = tl.cdiv(per_group, BLOCK)
    pid = tl.program_id(0)
    block = pid % (blocks * groups)
    row = pid // (blocks * groups)
    group = block // blocks
    offsets = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
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
    """Pointer to the row of scan time ``start``, and the stride from there to the next row in scan time."""
    first = tl.where(direction > 0, 0, length - 1).to(tl.int64) + direction * start.to(tl.int64)
    return pointer + batch * stride_b + first * stride_t, direction * stride_t


@triton.jit
def load_rows(pointer, step, offsets, mask, count, TILE: tl.constexpr):
    """TILE rows as vectors, zeros from row ``count`` on."""
    tile = ()
    for j in tl.static_range(TILE):
        tile += (tl.load(pointer + offsets, mask=mask & (j < count), other=0.0),)
        pointer += step
    return tile


@triton.jit
def load_tile(pointer, step, offsets, mask, count, TILE: tl.constexpr):
    """TILE rows as float32 vectors, zeros from row ``count`` on."""
    tile = ()
    for j in tl.static_range(TILE):
        tile += (tl.load(pointer + offsets, mask=mask & (j < count), other=0.0).to(tl.float32),)
        pointer += step
    return tile


@triton.jit
def store_tile(pointer, step, offsets, mask, count, tile, TILE: tl.constexpr):
    """Write the first ``count`` rows of a tile."""
    for j in tl.static_range(TILE):
        tl.store(pointer + offsets, tile[j].to(pointer.dtype.element_ty), mask=mask & (j < count))
        pointer += step


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
def step_sizes(raw, bias, count, SOFTPLUS: tl.constexpr, TILE: tl.constexpr):
    """The step sizes of a tile from ``delta``; zero, which leaves a state as it is, from row ``count`` on."""
    steps = ()
    for j in tl.static_range(TILE):
        step = raw[j] + bias
        if SOFTPLUS:
            step = softplus(step)
        steps += (tl.where(j < count, step, 0.0),)
    return steps


@triton.jit
def products(a, b, TILE: tl.constexpr):
    """Elementwise products of two tiles."""
    result = ()
    for j in tl.static_range(TILE):
        result += (a[j] * b[j],)
    return result


@triton.jit
def zeros(TILE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of zeros."""
    tile = ()
    for _ in tl.static_range(TILE):
        tile += (tl.zeros([BLOCK], tl.float32),)
    return tile


@triton.jit
def opaque(x, INTERPRET: tl.constexpr):
    """The integer ``x``, hidden from the compiler: what is computed from it is not kept in registers until then."""
    if not INTERPRET:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)
    return x


def lane_sum_assembly(log: int, pack: int) -> tuple[str, str]:
    """PTX, and its register constraints, that sums 2**log vectors over the lanes of a warp with ``pack`` elements each.

    At each step a lane hands half of its vectors to its partner and takes over the sums of the other half: 31 shuffles
    for 32 sums, where one sum after another takes 160. Lane i ends with the sum of vector i >> (5 - log), in all
    ``pack`` elements. It uses registers only, so it holds for any layout without replication.
    """
    count = 1 << log
    inputs = [f"${pack + i}" for i in range(count * pack)]
    text = [f".reg .f32 v<{count}>, w;", ".reg .pred p;", ".reg .u32 lane, bit;", "mov.u32 lane, %laneid;"]
    for i in range(count):
        first, *rest = inputs[i * pack : (i + 1) * pack]
        text.append(f"mov.f32 v{i}, {first};")
        text += [f"add.f32 v{i}, v{i}, {x};" for x in rest]
    for level in range(5):
        offset = 16 >> level
        if level < log:
            count //= 2
            text += [f"and.b32 bit, lane, {offset};", "setp.ne.u32 p, bit, 0;"]
            for i in range(count):
                low, high = f"v{i}", f"v{i + count}"
                text += [f"selp.f32 w, {low}, {high}, p;", f"selp.f32 {low}, {high}, {low}, p;"]
                text += [f"shfl.sync.bfly.b32 w, w, {offset}, 31, -1;", f"add.f32 {low}, {low}, w;"]
        else:
            text += [f"shfl.sync.bfly.b32 w, v0, {offset}, 31, -1;", "add.f32 v0, v0, w;"]
    text += [f"mov.f32 ${i}, v0;" for i in range(pack)]
    constraints = ["=f"] * pack + ["f"] * len(inputs)
    return "{ " + " ".join(text) + " }", ",".join(constraints)


def lane_number_assembly(pack: int) -> tuple[str, str]:
    """PTX, and its register constraints, for the lane number in the first of ``pack`` elements, -1 in others."""
    text = ["mov.u32 $0, %laneid;"] + [f"mov.u32 ${i}, -1;" for i in range(1, pack)]
    return " ".join(text), ",".join(["=r"] * pack + ["r"] * pack)


@triton.jit
def lane_numbers(ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr):
    """For one warp, the lane that holds each element (BLOCK,), -1 for all but its first."""
    if ASSEMBLY is None:
        number = tl.arange(0, BLOCK)
        number = tl.where(number < 32, number, -1)
    else:
        number = tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, [tl.arange(0, BLOCK)], tl.int32, False, PACK)
    return number


@triton.jit
def sum_lanes(
    values, lane, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the channels of COUNT vectors (BLOCK,), over the lanes of one warp as in ``lane_sum_assembly``; the
    plain form, without ASSEMBLY, computes the same."""
    if ASSEMBLY is None:
        result = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(COUNT):
            result = tl.where(lane // (32 // COUNT) == i, tl.sum(values[i]), result)
    else:
        result = tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, values, tl.float32, False, PACK)
    return result


def reverse_mask(reverse: Sequence[bool]) -> int:
    """One bit for each group, set where it runs backwards."""
    if any(reverse) and len(reverse) > 63:
        raise ValueError(f"backend 'triton' takes at most 63 groups in mixed directions, got {len(reverse)}")
    return sum(1 << i for i, r in enumerate(reverse) if r)


def strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of ``x``, zeros for an absent one."""
    return (0,) * dims if x is None else x.stride()


def use_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
