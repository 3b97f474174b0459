# mypy: ignore-errors
# (these functions are Triton's language, which Python's types do not describe)
"""Triton kernels of the forward selective scan: pack B and C, scan a segment, pass states between segments, one step.

Segments of the length are scanned side by side. ``scan_kernel`` first gives each segment's end state from zero and its
total step size, ``pass_states_kernel`` turns these into the state entering each segment, and ``scan_kernel`` runs again
from there and writes y. A segment's decay is exp(A sum(delta)): one number a channel besides the states.
"""

import triton
import triton.language as tl

from seqssm.kernels.triton_tiles import (
    LOG2E,
    load_channels,
    load_keeps,
    load_numbers,
    load_tile,
    locate,
    prefetch_numbers,
    prefetch_rows,
    rows,
    sigmoid,
    softplus,
    stack,
    step_sizes,
    store_tile,
    unstack,
)


@triton.jit(do_not_specialize=["start", "tiles", "length", "reverse_mask"])
def pack_kernel(
    B, C, packed,
    B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n,
    start, tiles, length, groups, states, reverse_mask,
    TILE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """B and C (b, l, g, n) from scan time ``start`` to ``packed`` (b, g, tiles, n, 2, TILE), zeros past the end."""
    blocks = tl.cdiv(tiles * TILE, BLOCK_T)
    pid = tl.program_id(0)
    group = ((pid // blocks) % groups).to(tl.int64)  # B and C may be state-major views of a long sequence
    batch = (pid // (blocks * groups)).to(tl.int64)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    time = start + t
    token = tl.where(((reverse_mask >> group) & 1) != 0, length - 1 - time, time).to(tl.int64)
    tile = ((batch * groups + group) * tiles + t // TILE).to(tl.int64)
    out = packed + tile * (states * 2 * TILE) + t % TILE
    for n0 in range(0, states, BLOCK_N):
        n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (time < length)[:, None] & (n < states)[None, :]
        written = (t < tiles * TILE)[:, None] & (n < states)[None, :]
        at = out[:, None] + n[None, :] * (2 * TILE)
        x = tl.load(B + batch * B_b + group * B_g + token[:, None] * B_t + n[None, :] * B_n, mask=inside, other=0.0)
        tl.store(at, x.to(packed.dtype.element_ty), mask=written)
        x = tl.load(C + batch * C_b + group * C_g + token[:, None] * C_t + n[None, :] * C_n, mask=inside, other=0.0)
        tl.store(at + TILE, x.to(packed.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["length", "segment_length", "segments", "tiles", "reverse_mask"])
def scan_kernel(
    u, delta, z, y, packed, A2, D, bias, carry, total_steps, initial_state, final_state, saved, seq_idx,
    u_b, u_t, u_c, delta_b, delta_t, delta_c, z_b, z_t, z_c, seq_b, seq_t,
    length, channels, per_group, groups, states, segment_length, segments, tiles, reverse_mask,
    SOFTPLUS: tl.constexpr, SUMMARY: tl.constexpr, CARRIED: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Scan one segment of ``segment_length`` tokens.

    ``carry`` (b, segments, n, d) holds the running state. With SUMMARY the scan starts from zero, leaves the end state
    there and writes the sum of the step sizes to ``total_steps`` (b, segments, d), infinite where a reset cuts the past
    off. Else it starts from ``carry`` (from ``initial_state`` unless CARRIED, and then writes it to ``saved`` too) and
    writes y and the final state. ``A2`` (n, d) is A log2(e), transposed. WHOLE says that the length is a multiple of
    TILE and the channels of a group one of BLOCK.
    """
    if SUMMARY:  # nothing needs the summary of the last segment
        batch, segment, group, block, c, mask = locate(per_group, groups, segments - 1, BLOCK, WIDE)
    else:
        batch, segment, group, block, c, mask = locate(per_group, groups, segments, BLOCK, WIDE)
    if WHOLE:
        mask = None
    direction = 1 - 2 * ((reverse_mask >> group) & 1)
    begin = segment * segment_length
    tokens = tl.minimum(length - begin, segment_length)
    u_row, u_step = rows(u, batch, begin, length, direction, u_b, u_t)
    delta_row, delta_step = rows(delta, batch, begin, length, direction, delta_b, delta_t)
    packed += ((batch * groups + group) * tiles * TILE + begin) * states
    first_channel, end_channel = group * per_group + block * BLOCK, (group + 1) * per_group
    prefetch_numbers(packed, TILE * states, PREFETCH)
    carry += (batch * segments + segment) * states * channels
    offset = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = load_channels(bias + c, mask).to(tl.float32)
    if SUMMARY:
        total = tl.zeros([BLOCK], tl.float32)
        kept = tl.full((), 1.0, tl.float32)
    else:
        y_row, y_step = rows(y, batch, begin, length, direction, length.to(tl.int64) * channels, channels)
        if z is not None:
            z_row, z_step = rows(z, batch, begin, length, direction, z_b, z_t)
        skip = tl.zeros([BLOCK], tl.float32)
        if D is not None:
            skip = load_channels(D + c, mask).to(tl.float32)
    if SUMMARY:
        for i in range(states):
            tl.store(carry + i * channels + c, tl.zeros([BLOCK], tl.float32), mask=mask)
    elif not CARRIED:
        for i in range(states):
            h = tl.zeros([BLOCK], tl.float32)
            if initial_state is not None:
                h = load_channels(initial_state + (batch * channels + c) * states + i, mask)
            tl.store(carry + i * channels + c, h, mask=mask)
            if saved is not None:
                tl.store(saved + (batch * states + i) * channels + c, h, mask=mask)
    for t in range(0, tokens, TILE):
        count = tokens - t
        inputs = load_tile(u_row, u_step, c * u_c, t, mask, count, TILE, WHOLE)
        raw_steps = load_tile(delta_row, delta_step, c * delta_c, t, mask, count, TILE, WHOLE)
        if not SUMMARY and z is not None:
            gates = load_tile(z_row, z_step, c * z_c, t, mask, count, TILE, WHOLE)
        # What the next tile is the first to read comes from far away: it is asked for a whole tile ahead.
        if t + TILE < tokens:
            ahead, last = t + TILE, count - TILE - 1
            prefetch_numbers(packed + ahead * states, TILE * states, PREFETCH)
            prefetch_rows(u_row, u_step, u_c, ahead, first_channel, last, end_channel, TILE, BLOCK, PREFETCH)
            prefetch_rows(
                delta_row, delta_step, delta_c, ahead, first_channel, last, end_channel, TILE, BLOCK, PREFETCH
            )
            if not SUMMARY and z is not None:
                prefetch_rows(z_row, z_step, z_c, ahead, first_channel, last, end_channel, TILE, BLOCK, PREFETCH)
        inputs = inputs.to(tl.float32)
        steps = step_sizes(raw_steps, offset, count, SOFTPLUS, TILE, WHOLE)
        drives = unstack(inputs * steps, TILE, BLOCK)
        steps = unstack(steps, TILE, BLOCK)
        if seq_idx is not None:
            keeps = load_keeps(seq_idx, batch, begin + t, length, direction, seq_b, seq_t, count, TILE)
        outputs = ()
        if SUMMARY:
            for j in tl.static_range(TILE):
                total += steps[j]
                if seq_idx is not None:
                    kept *= keeps[j]
        else:
            outputs = unstack(skip[None, :] * inputs, TILE, BLOCK)
        # What the next state needs is read before this one is computed: the arithmetic hides the memory. After the last
        # state this reads past it: into the next tile, or into what the launcher has left there.
        at = c
        numbers = packed + t * states
        next_a2 = load_channels(A2 + at, mask)
        next_h = load_channels(carry + at, mask)
        next_b = load_numbers(numbers, TILE)
        next_read = ()
        if not SUMMARY:
            next_read = load_numbers(numbers + TILE // 2, TILE)
        for _ in range(0, states, UNROLL):
            for _ in tl.static_range(UNROLL):
                a2, h, b, read = next_a2, next_h, next_b, next_read
                here = carry + at
                at += channels
                numbers += TILE
                next_a2 = load_channels(A2 + at, mask)
                next_h = load_channels(carry + at, mask)
                next_b = load_numbers(numbers, TILE)
                if not SUMMARY:
                    next_read = load_numbers(numbers + TILE // 2, TILE)
                results = ()
                for j in tl.static_range(TILE):
                    decay = tl.exp2(steps[j] * a2)
                    if seq_idx is not None:
                        decay *= keeps[j]
                    h = decay * h + drives[j] * b[j]
                    if not SUMMARY:
                        results += (outputs[j] + h * read[j],)
                outputs = results
                tl.store(here, h, mask=mask)
        if not SUMMARY:
            out = stack(outputs, TILE, BLOCK)
            if z is not None:
                gates = gates.to(tl.float32)
                out = out * gates * sigmoid(gates)
            store_tile(y_row, y_step, c, t, mask, count, out, TILE, WHOLE)
    if SUMMARY:
        if seq_idx is not None:
            total = tl.where(kept == 0.0, float("inf"), total)
        tl.store(total_steps + (batch * segments + segment) * channels + c, total, mask=mask)
    elif segment == segments - 1:
        for i in range(states):
            h = load_channels(carry + i * channels + c, mask)
            tl.store(final_state + (batch * channels + c) * states + i, h, mask=mask)


@triton.jit(do_not_specialize=["segments", "span"])
def pass_states_kernel(
    carry, total_steps, A2, entering, leaving, saved, outer, outer_steps, segments, span, channels, states,
    BACKWARD: tl.constexpr, SUMMARY: tl.constexpr, SHARE: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn ``carry`` (b, segments, n, d) in place from what each segment yields by itself into what enters it.

    ``entering``, ``leaving`` (b, d, n) or None: what enters the first segment and leaves the last. ``saved``
    (b, segments / SHARE, n, d) or None takes what enters every SHARE-th segment. BACKWARD goes from the last segment to
    the first. Memory is read UNROLL segments, of which SHARE is a divisor, ahead of the recurrence.

    A program takes a span of segments, of which there are as many as ``outer`` (b, spans, n, d) has, one without it.
    With SUMMARY it only puts what its span yields by itself there, and the sum of the step sizes into ``outer_steps``
    (b, spans, d); else it starts from ``outer``. Spans are counted in the order in which they are passed through.
    """
    size = channels * states
    blocks = tl.cdiv(size, BLOCK)
    spans = tl.cdiv(segments, span)
    row = tl.program_id(0) // blocks
    batch = (row // spans).to(tl.int64)
    begin = (row % spans) * span
    lane = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < size
    c = lane % channels
    corner = batch * size + c * states + lane // channels
    a2 = tl.load(A2 + lane, mask=mask, other=0.0)
    h = tl.zeros([BLOCK], tl.float32)
    if outer is not None:
        outer += row.to(tl.int64) * size + lane
        if not SUMMARY:
            h = tl.load(outer, mask=mask, other=0.0)
    elif entering is not None:
        h = tl.load(entering + corner, mask=mask, other=0.0)
    first = batch * segments
    size_step, channel_step = size, channels
    if BACKWARD:
        first += segments - 1 - begin
        size_step, channel_step = -size, -channels
    else:
        first += begin
    carry += first * size + lane
    total_steps += first * channels + c
    if saved is not None:
        saved += (batch * tl.cdiv(segments, SHARE) + begin // SHARE) * size + lane
    count = tl.minimum(segments - begin, span)
    sum_steps = tl.zeros([BLOCK], tl.float32)
    next_ends = ()
    next_totals = ()
    for j in tl.static_range(UNROLL):
        inside = mask & (j < count)
        next_ends += (tl.load(carry + j * size_step, mask=inside, other=0.0),)
        next_totals += (tl.load(total_steps + j * channel_step, mask=inside, other=0.0),)
    for s in range(0, count, UNROLL):
        ends, totals = next_ends, next_totals
        here = carry
        carry += UNROLL * size_step.to(tl.int64)
        total_steps += UNROLL * channel_step.to(tl.int64)
        next_ends = ()
        next_totals = ()
        for j in tl.static_range(UNROLL):
            inside = mask & (s + UNROLL + j < count)
            next_ends += (tl.load(carry + j * size_step, mask=inside, other=0.0),)
            next_totals += (tl.load(total_steps + j * channel_step, mask=inside, other=0.0),)
        for j in tl.static_range(UNROLL):
            if SUMMARY:
                sum_steps += totals[j]
            else:
                inside = mask & (s + j < count)
                tl.store(here + j * size_step, h, mask=inside)
                if saved is not None:  # noqa: SIM102  (the compiler must know this half alone)
                    if j % SHARE == 0:
                        tl.store(saved + j // SHARE * size, h, mask=inside)
            h = tl.where(totals[j] == float("inf"), 0.0, tl.exp2(a2 * totals[j])) * h + ends[j]
        if saved is not None:
            saved += UNROLL // SHARE * size.to(tl.int64)
    if SUMMARY:
        tl.store(outer, h, mask=mask)
        tl.store(outer_steps + row.to(tl.int64) * channels + lane, sum_steps, mask=lane < channels)
    elif leaving is not None:
        tl.store(leaving + corner, h, mask=mask & (begin + span >= segments))


@triton.jit
def step_kernel(
    state, u, delta, A, B, C, D, z, bias, y,
    state_b, state_d, state_n, u_b, u_c, delta_b, delta_c, A_d, A_n, B_b, B_g, B_n, C_b, C_g, C_n, z_b, z_c,
    channels, groups, states,
    SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One token: the state (b, d, n) in place, y (b, d)."""
    blocks = tl.cdiv(channels, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    # In 64 bits, as n below: a token of a channel-major view of a long sequence has far strides.
    group = (c // (channels // groups)).to(tl.int64)
    c = c.to(tl.int64)
    x = tl.load(u + batch * u_b + c * u_c, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(delta + batch * delta_b + c * delta_c, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        step += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    out = tl.zeros([BLOCK], tl.float32)
    if D is not None:
        out += x * tl.load(D + c, mask=inside, other=0.0).to(tl.float32)
    for n0 in range(0, states, BLOCK_N):
        n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = inside[:, None] & (n < states)[None, :]
        a = tl.load(A + c[:, None] * A_d + n[None, :] * A_n, mask=mask, other=0.0).to(tl.float32)
        at_b = B + batch * B_b + group[:, None] * B_g + n[None, :] * B_n
        b = tl.load(at_b, mask=mask, other=0.0).to(tl.float32)
        at_c = C + batch * C_b + group[:, None] * C_g + n[None, :] * C_n
        read = tl.load(at_c, mask=mask, other=0.0).to(tl.float32)
        at = state + batch * state_b + c[:, None] * state_d + n[None, :] * state_n
        h = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        h = h * tl.exp2(step[:, None] * (a * LOG2E)) + (step * x)[:, None] * b
        tl.store(at, h.to(state.dtype.element_ty), mask=mask)
        out += tl.sum(h * read, axis=1)
    if z is not None:
        gate = tl.load(z + batch * z_b + c * z_c, mask=inside, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + batch * channels + c, out.to(y.dtype.element_ty), mask=inside)
