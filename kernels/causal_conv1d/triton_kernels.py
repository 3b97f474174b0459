# mypy: ignore-errors
# (these functions are Triton's language, which Python's types do not describe)
"""Triton kernels of the depthwise causal convolution.

A program walks along time with the last k-1 tokens of its channels in registers, so that each token is read once.
"""

import triton
import triton.language as tl

from seqssm.kernels.triton_tiles import load_keeps, load_tile, locate, rows, sigmoid, unstack


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
    WIDTH: tl.constexpr, SILU: tl.constexpr, WIDE: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """SEGMENT tokens of BLOCK channels: y (b, l, d) and, at the end, the final state (b, d, WIDTH - 1)."""
    batch, segment, group, _, c, mask = locate(per_group, groups, segments, BLOCK, WIDE)
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
        tile = unstack(load_tile(x_row, x_step, c * x_c, t, mask, count, TILE), TILE, BLOCK)
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
    dy_b, dy_t, dy_c, x_b, x_t, x_c, dx_b, dx_t, dx_c, seq_b, seq_t,
    length, channels, per_group, groups, segments, mask_of_reverse,
    WIDTH: tl.constexpr, SILU: tl.constexpr, WIDE: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of SEGMENT tokens of BLOCK channels.

    Walks forwards and WIDTH - 1 tokens beyond the segment: the gradient of a token is complete, and is written, when
    the token leaves the window. ``dtaps`` (b * segments, WIDTH + 1, d) takes this program's share of the gradients of
    weight and bias.
    """
    batch, segment, group, _, c, mask = locate(per_group, groups, segments, BLOCK, WIDE)
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
    dx_row, dx_step = rows(dx, batch, begin - (WIDTH - 1), length, direction, dx_b, dx_t)
    state = (batch * channels + c) * (WIDTH - 1)
    for t in range(0, tokens + WIDTH - 1, TILE):
        tile = unstack(load_tile(x_row, x_step, c * x_c, t, mask, ahead - t, TILE), TILE, BLOCK)
        grads = unstack(load_tile(dy_row, dy_step, c * dy_c, t, mask, ahead - t, TILE), TILE, BLOCK)
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
            if WIDTH > 1 and dfinal_state is not None:
                at = dfinal_state + state + leaving - length + (WIDTH - 1)
                into_state = (leaving >= length - (WIDTH - 1)) & (leaving < length)
                if into_state:
                    extra = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                    if seq_idx is not None:
                        extra *= alive[0]
                    done += extra
            inside = mask & (t + j < tokens + WIDTH - 1)
            tl.store(dx_row + c * dx_c, done.to(dx.dtype.element_ty), mask=inside & (leaving >= begin))
            if dinitial_state is not None:
                at = dinitial_state + state + leaving + (WIDTH - 1)
                tl.store(at, done.to(dinitial_state.dtype.element_ty), mask=inside & (leaving < 0) & (begin == 0))
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
    at = dtaps + (batch * segments + segment) * (WIDTH + 1) * channels + c
    for i in tl.static_range(WIDTH + 1):
        tl.store(at + i * channels, sums[i], mask=mask)


@triton.jit(do_not_specialize=["rows"])
def sum_taps_kernel(
    dtaps, dweight, dbias, rows, channels, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """dweight (d, WIDTH) and dbias (d,): the sums of dtaps (rows, WIDTH + 1, d) over its rows, in a fixed order."""
    size = (WIDTH + 1) * channels
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        at = dtaps + row.to(tl.int64)[:, None] * size + column[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    tap, c = column // channels, column % channels
    tl.store(dweight + c * WIDTH + tap, total.to(dweight.dtype.element_ty), mask=inside & (tap < WIDTH))
    if dbias is not None:
        tl.store(dbias + c, total.to(dbias.dtype.element_ty), mask=inside & (tap == WIDTH))


@triton.jit
def step_kernel(
    state, x, weight, bias, y, state_b, state_d, state_k, x_b, x_c, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: shifts the state (b, d, WIDTH - 1) in place, y (b, d)."""
    blocks = tl.cdiv(channels, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    # In 64 bits: a token of a channel-major view of a long sequence has far strides.
    c = ((tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
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
