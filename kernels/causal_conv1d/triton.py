"""Backend "triton": the depthwise causal convolution on the GPU, one pass over memory forwards and one back.

A program walks along time with the last k-1 tokens of its channels in registers, so that each token is read once, from
whatever strides the input has.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqssm.kernels.triton_tiles import load_keeps, load_rows, locate, reverse_mask, rows, sigmoid, strides, use_device

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Tokens in flight, channels of a program, its warps, and its tokens.
_TILE = 4 if _INTERPRET else 8
_FORWARD = (128, 1, 256)
_BACKWARD = (128, 1, 256)


@triton.jit
def _window(
    x, initial_state, seq_idx, batch, begin, length, direction, c, mask, channels,
    x_b, x_t, x_c, seq_b, seq_t, WIDTH: tl.constexpr,
):  # fmt: skip
    """The WIDTH - 1 tokens before scan time ``begin``, zero before a reset, and as many flags: 1.0 unless reset."""
    window = ()
    alive = ()
    x_row, x_step = rows(x, batch, begin - (WIDTH - 1), length, direction, x_b, x_t)
    if seq_idx is not None and WIDTH > 1:
        keeps = load_keeps(seq_idx, batch, begin - (WIDTH - 1), length, direction, seq_b, seq_t, WIDTH, WIDTH - 1)
    for j in tl.static_range(WIDTH - 1):
        time = begin - (WIDTH - 1) + j
        token = tl.load(x_row + j * x_step + c * x_c, mask=mask & (time >= 0), other=0.0).to(tl.float32)
        if initial_state is not None:
            at = initial_state + (batch * channels + c) * (WIDTH - 1) + time + (WIDTH - 1)
            token += tl.load(at, mask=mask & (time < 0), other=0.0).to(tl.float32)
        if seq_idx is not None:
            cut = ()
            still = ()
            for i in tl.static_range(j):
                cut += (tl.where(keeps[j] > 0, window[i], 0.0),)
                still += (alive[i] * keeps[j],)
            window = cut
            alive = still
            alive += (tl.full((), 1.0, tl.float32),)
        window += (token,)
    return window, alive


@triton.jit
def _apply(window, token, taps, offset, WIDTH: tl.constexpr):
    """The convolution of a window and its newest token, before the activation."""
    out = offset + taps[WIDTH - 1] * token
    for i in tl.static_range(WIDTH - 1):
        out += taps[i] * window[i]
    return out


@triton.jit
def _load_taps(weight, c, mask, WIDTH: tl.constexpr):
    taps = ()
    for i in tl.static_range(WIDTH):
        taps += (tl.load(weight + c * WIDTH + i, mask=mask, other=0.0).to(tl.float32),)
    return taps


@triton.jit(do_not_specialize=["length", "segments", "mask_of_reverse"])
def forward_kernel(
    x, weight, bias, initial_state, seq_idx, y, final_state,
    x_b, x_t, x_c, seq_b, seq_t, length, channels, per_group, groups, segments, mask_of_reverse,
    WIDTH: tl.constexpr, SILU: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SEGMENT tokens of BLOCK channels: y (b, l, d) and, at the end, the final state (b, d, WIDTH - 1)."""
    batch, segment, group, _, c, mask = locate(per_group, groups, segments, BLOCK)
    direction = 1 - 2 * ((mask_of_reverse >> group) & 1)
    begin = segment * SEGMENT
    tokens = tl.minimum(length - begin, SEGMENT)
    taps = _load_taps(weight, c, mask, WIDTH)
    offset = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    window, _ = _window(
        x, initial_state, seq_idx, batch, begin, length, direction, c, mask, channels,
        x_b, x_t, x_c, seq_b, seq_t, WIDTH,
    )  # fmt: skip
    x_row, x_step = rows(x, batch, begin, length, direction, x_b, x_t)
    y_row, y_step = rows(y, batch, begin, length, direction, length.to(tl.int64) * channels, channels)
    for t in range(0, tokens, TILE):
        count = tokens - t
        tile = load_rows(x_row, x_step, c * x_c, mask, count, TILE)
        if seq_idx is not None:
            keeps = load_keeps(seq_idx, batch, begin + t, length, direction, seq_b, seq_t, count, TILE)
        for j in tl.static_range(TILE):
            if seq_idx is not None:
                kept = ()
                for i in tl.static_range(WIDTH - 1):
                    kept += (tl.where(keeps[j] > 0, window[i], 0.0),)
                window = kept
            token = tile[j].to(tl.float32)
            out = _apply(window, token, taps, offset, WIDTH)
            if SILU:
                out *= sigmoid(out)
            tl.store(y_row + c, out.to(y.dtype.element_ty), mask=mask & (j < count))
            y_row += y_step
            moved = ()
            for i in tl.static_range(WIDTH - 1):
                moved += (window[i + 1] if i + 1 < WIDTH - 1 else token,)
            window = moved
        x_row += TILE * x_step
    if segment == segments - 1:
        window, _ = _window(
            x, initial_state, seq_idx, batch, length, length, direction, c, mask, channels,
            x_b, x_t, x_c, seq_b, seq_t, WIDTH,
        )  # fmt: skip
        for i in tl.static_range(WIDTH - 1):
            at = final_state + (batch * channels + c) * (WIDTH - 1) + i
            tl.store(at, window[i].to(final_state.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "segments", "mask_of_reverse"])
def backward_kernel(
    dy, dfinal_state, x, weight, bias, initial_state, seq_idx, dx, dtaps, dinitial_state,
    dy_b, dy_t, dy_c, x_b, x_t, x_c, seq_b, seq_t, length, channels, per_group, groups, segments, mask_of_reverse,
    WIDTH: tl.constexpr, SILU: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of SEGMENT tokens of BLOCK channels.

    Walks forwards and WIDTH - 1 tokens beyond the segment: the gradient of a token is complete, and is written, when
    the token leaves the window. ``dtaps`` (b, segments, WIDTH + 1, d) takes this program's share of the gradients of
    weight and bias.
    """
    batch, segment, group, _, c, mask = locate(per_group, groups, segments, BLOCK)
    direction = 1 - 2 * ((mask_of_reverse >> group) & 1)
    begin = segment * SEGMENT
    tokens = tl.minimum(length - begin, SEGMENT)
    ahead = tl.minimum(length - begin, SEGMENT + WIDTH - 1)
    taps = _load_taps(weight, c, mask, WIDTH)
    offset = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    window, alive = _window(
        x, initial_state, seq_idx, batch, begin, length, direction, c, mask, channels,
        x_b, x_t, x_c, seq_b, seq_t, WIDTH,
    )  # fmt: skip
    pending = ()
    for _ in tl.static_range(WIDTH - 1):
        pending += (tl.zeros([BLOCK], tl.float32),)
    sums = ()
    for _ in tl.static_range(WIDTH + 1):
        sums += (tl.zeros([BLOCK], tl.float32),)
    x_row, x_step = rows(x, batch, begin, length, direction, x_b, x_t)
    dy_row, dy_step = rows(dy, batch, begin, length, direction, dy_b, dy_t)
    dx_row, dx_step = rows(dx, batch, begin - (WIDTH - 1), length, direction, length.to(tl.int64) * channels, channels)
    state = (batch * channels + c) * (WIDTH - 1)
    for t in range(0, tokens + WIDTH - 1, TILE):
        tile = load_rows(x_row, x_step, c * x_c, mask, ahead - t, TILE)
        grads = load_rows(dy_row, dy_step, c * dy_c, mask, ahead - t, TILE)
        if seq_idx is not None:
            keeps = load_keeps(seq_idx, batch, begin + t, length, direction, seq_b, seq_t, ahead - t, TILE)
        for j in tl.static_range(TILE):
            if seq_idx is not None:
                kept = ()
                still = ()
                for i in tl.static_range(WIDTH - 1):
                    kept += (tl.where(keeps[j] > 0, window[i], 0.0),)
                    still += (alive[i] * keeps[j],)
                window = kept
                alive = still
            token = tile[j].to(tl.float32)
            grad = grads[j].to(tl.float32)
            if SILU:
                before = _apply(window, token, taps, offset, WIDTH)
                s = sigmoid(before)
                grad *= s * (1.0 + before * (1.0 - s))
            own = tl.where(t + j < tokens, grad, 0.0)
            added = ()
            for i in tl.static_range(WIDTH - 1):
                added += (sums[i] + own * window[i],)
            added += (sums[WIDTH - 1] + own * token, sums[WIDTH] + own)
            sums = added
            # The oldest token leaves the window: what it gave to this output was the last it gives, but for the state.
            totals = ()
            for i in tl.static_range(WIDTH - 1):
                share = taps[i] * grad
                if seq_idx is not None:
                    share *= alive[i]
                totals += (pending[i] + share,)
            totals += (taps[WIDTH - 1] * grad,)
            leaving = begin + t + j - (WIDTH - 1)
            done = totals[0]
            if WIDTH > 1:
                at = dfinal_state + state + leaving - length + (WIDTH - 1)
                into_state = (leaving >= length - (WIDTH - 1)) & (leaving < length)
                if into_state:
                    extra = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                    if seq_idx is not None:
                        extra *= alive[0]
                    done += extra
            inside = mask & (t + j < tokens + WIDTH - 1)
            tl.store(dx_row + c, done.to(dx.dtype.element_ty), mask=inside & (leaving >= begin))
            if dinitial_state is not None:
                at = dinitial_state + state + leaving + (WIDTH - 1)
                tl.store(at, done.to(dinitial_state.dtype.element_ty), mask=inside & (leaving < 0))
            dx_row += dx_step
            moved = ()
            left = ()
            flags = ()
            for i in tl.static_range(WIDTH - 1):
                moved += (window[i + 1] if i + 1 < WIDTH - 1 else token,)
                left += (totals[i + 1],)
                if seq_idx is not None:
                    flags += (alive[i + 1] if i + 1 < WIDTH - 1 else tl.full((), 1.0, tl.float32),)
            window = moved
            pending = left
            alive = flags
        x_row += TILE * x_step
        dy_row += TILE * dy_step
    at = dtaps + (batch * segments + segment) * (WIDTH + 1) * channels + c
    for i in tl.static_range(WIDTH + 1):
        tl.store(at + i * channels, sums[i], mask=mask)


@triton.jit
def step_kernel(
    state, x, weight, bias, y, state_b, state_d, state_k, x_b, x_c, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: shifts the state (b, d, WIDTH - 1) in place, y (b, d)."""
    blocks = tl.cdiv(channels, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    token = tl.load(x + batch * x_b + c * x_c, mask=mask, other=0.0).to(tl.float32)
    out = token * tl.load(weight + c * WIDTH + (WIDTH - 1), mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(WIDTH - 1):
        at = state + batch * state_b + c * state_d + i * state_k
        old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        out += old * tl.load(weight + c * WIDTH + i, mask=mask, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(at - state_k, old.to(state.dtype.element_ty), mask=mask)
    if WIDTH > 1:
        at = state + batch * state_b + c * state_d + (WIDTH - 2) * state_k
        tl.store(at, token.to(state.dtype.element_ty), mask=mask)
    if SILU:
        out *= sigmoid(out)
    tl.store(y + batch * channels + c, out.to(y.dtype.element_ty), mask=mask)


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
    block, warps, segment = _FORWARD
    segments = triton.cdiv(l, segment)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state = x.new_empty(b, d, k - 1)
    initial_state = None if initial_state is None else initial_state.contiguous()
    with use_device(x):
        forward_kernel[(b * segments * parts * triton.cdiv(d // parts, block),)](
            x, weight.contiguous(), bias, initial_state, seq_idx, y, final_state, *x.stride(), *strides(seq_idx, 2),
            l, d, d // parts, parts, segments, reverse_mask(reverse),
            WIDTH=k, SILU=activation, SEGMENT=segment, TILE=_TILE, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, final_state


def backward(
    dy: Tensor,
    dfinal_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state."""
    b, l, d = x.shape
    k = weight.shape[1]
    parts = len(reverse)
    block, warps, segment = _BACKWARD
    segment -= k - 1  # with the tokens beyond its end, a program then takes whole tiles
    segments = triton.cdiv(l, segment)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinitial_state = None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
        dinitial_state = torch.empty_like(initial_state)
    dtaps = torch.empty(b, segments, k + 1, d, dtype=torch.float32, device=x.device)
    with use_device(x):
        backward_kernel[(b * segments * parts * triton.cdiv(d // parts, block),)](
            dy, dfinal_state.contiguous(), x, weight.contiguous(), bias, initial_state, seq_idx, dx, dtaps,
            dinitial_state, *dy.stride(), *x.stride(), *strides(seq_idx, 2),
            l, d, d // parts, parts, segments, reverse_mask(reverse),
            WIDTH=k, SILU=activation, SEGMENT=segment, TILE=_TILE, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    totals = dtaps.sum((0, 1))
    return dx, totals[:k].t(), None if bias is None else totals[k], dinitial_state


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool) -> Tensor:
    """One token: shifts the state (b, d, k-1) in place, returns y (b, d). One launch, so a CUDA graph can hold it."""
    b, d = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = 128
    with use_device(x):
        step_kernel[(b * triton.cdiv(d, block),)](
            state, x, weight.contiguous(), bias, y, *state.stride(), *x.stride(), d,
            WIDTH=weight.shape[1], SILU=activation, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y
