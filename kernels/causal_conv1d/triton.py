"""Backend "triton": the depthwise causal convolution on the GPU, one pass over memory forwards and one back."""

import os

import torch
from torch import Tensor

from seqssm.kernels.causal_conv1d.triton_kernels import backward_kernel, forward_kernel, step_kernel, sum_taps_kernel
from seqssm.kernels.launching import cdiv, launcher, next_power_of_2
from seqssm.kernels.triton_tiles import reverse_mask, strides, use_device, wide_offsets

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Tokens in flight, forwards and backwards; channels of a program, which is one warp.
_TILE, _BACKWARD_TILE = (4, 4) if _INTERPRET else (8, 16)
_BLOCK = 128
# Tokens of a program: the most, and, where that many programs would not fill the GPU, the least.
_SEGMENT, _SHORTEST_SEGMENT = 256, 64
_ENOUGH_PROGRAMS = 4096
# Shares of the weight's gradient that a program adds at a time: of so many programs, and so many numbers of each.
_SUM_ROWS, _SUM_COLUMNS = (16, 8) if _INTERPRET else (256, 8)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the final state (b, d, k-1); ``activation`` is SiLU."""
    b, l, d = x.shape
    k = weight.shape[1]
    parts = len(reverse)
    bias = None if bias is None else bias.contiguous()
    blocks = b * parts * cdiv(d // parts, _BLOCK)
    segment = _segment(blocks, l, k)
    segments = cdiv(l, segment)
    wide = wide_offsets(segment + k, x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = x.new_empty((b, d, k - 1))
    initial_state = None if initial_state is None else initial_state.contiguous()
    with use_device(x):
        launch = launcher("conv", "forward", activation, reverse, tensors=(x, weight, bias, initial_state, seq_idx))
        launch(
            forward_kernel, blocks * segments,
            x, weight.contiguous(), bias, initial_state, seq_idx, y, final_state, *x.stride(), *strides(seq_idx, 2),
            l, d, d // parts, parts, segments, reverse_mask(reverse),
            WIDTH=k, SILU=activation, WIDE=wide, SEGMENT=segment, TILE=_TILE, BLOCK=_BLOCK, num_warps=1,
        )  # fmt: skip
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
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state; that of x in ``dx``, of any strides, where it is given."""
    b, l, d = x.shape
    k = weight.shape[1]
    parts = len(reverse)
    bias = None if bias is None else bias.contiguous()
    blocks = b * parts * cdiv(d // parts, _BLOCK)
    segment = _segment(blocks, l, k) - (k - 1)  # with the tokens beyond its end, a program then takes whole tiles
    segments = cdiv(l, segment)
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = wide_offsets(segment + _BACKWARD_TILE + k, x, dy, dx)
    dinitial_state = None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
        dinitial_state = torch.empty_like(initial_state)
    dtaps = x.new_empty((b * segments, k + 1, d), dtype=torch.float32)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    tensors = (dy, dfinal_state, dx, x, weight, bias, initial_state, seq_idx)
    launch = launcher("conv", "backward", activation, reverse, tensors=tensors)
    with use_device(x), launch.together():
        launch(
            backward_kernel, blocks * segments,
            dy, dfinal_state, x, weight.contiguous(), bias, initial_state, seq_idx, dx, dtaps,
            dinitial_state, *dy.stride(), *x.stride(), *dx.stride(), *strides(seq_idx, 2),
            l, d, d // parts, parts, segments, reverse_mask(reverse),
            WIDTH=k, SILU=activation, WIDE=wide, SEGMENT=segment, TILE=_BACKWARD_TILE, BLOCK=_BLOCK, num_warps=1,
        )  # fmt: skip
        launch(
            sum_taps_kernel, cdiv((k + 1) * d, _SUM_COLUMNS),
            dtaps, dweight, dbias, b * segments, d, WIDTH=k, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS, num_warps=4,
        )  # fmt: skip
    return dx, dweight, dbias, dinitial_state


def _segment(blocks: int, length: int, taps: int) -> int:
    """Tokens of a program, where ``blocks`` programs take a segment: at least twice the taps, which are read twice."""
    segment = max(_SEGMENT, next_power_of_2(2 * taps))
    while segment // 2 >= max(_SHORTEST_SEGMENT, 2 * taps) and blocks * cdiv(length, segment) < _ENOUGH_PROGRAMS:
        segment //= 2
    return segment


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool) -> Tensor:
    """One token: shifts the state (b, d, k-1) in place, returns y (b, d). One launch, so a CUDA graph can hold it."""
    b, d = x.shape
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = 128
    with use_device(x):
        launcher("conv", "step", activation, tensors=(state, x, weight, bias))(
            step_kernel, b * cdiv(d, block),
            state, x, weight.contiguous(), bias, y, *state.stride(), *x.stride(), d,
            WIDTH=weight.shape[1], SILU=activation, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y
