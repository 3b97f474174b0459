# mypy: ignore-errors
# (these functions are Triton's language, which Python's types do not describe)
"""Triton kernels of the backward selective scan.

With g_t the gradient of the state h_t and dY_t that of the ungated output, g_t = C_t dY_t + exp(delta_{t+1} A) g_{t+1}.
``history_kernel`` runs each chunk forwards from the saved state, keeps the state that enters every tile, gives dz, and
sums what the chunk's outputs send back to the state entering it; ``pass_states_kernel`` then gives the g that enters
each chunk from behind. With both, the chunks are independent: ``gradient_kernel`` takes each one's tiles last to first,
recomputes the states of a tile in registers and sums dB and dC over its channels; ``unpack_kernel`` adds these up over
the blocks.
"""

import triton
import triton.language as tl

from seqssm.kernels.triton_tiles import (
    LN2,
    load_channels,
    load_keeps,
    load_numbers,
    load_tile,
    locate,
    prefetch,
    prefetch_numbers,
    prefetch_rows,
    rows,
    sigmoid,
    stack,
    step_sizes,
    store_tile,
    sum_and_store,
    unstack,
    zeros,
)


@triton.jit(do_not_specialize=["length", "first_chunk", "chunks", "slab_chunks", "reverse_mask"])
def history_kernel(
    u, delta, z, dy, packed, A2, D, bias, saved, history, adjoint, total_steps, seq_idx, dz, y,
    u_b, u_t, u_c, delta_b, delta_t, delta_c, z_b, z_t, z_c, dy_b, dy_t, dy_c, seq_b, seq_t,
    dz_b, dz_t, dz_c,
    length, channels, per_group, groups, states, first_chunk, chunks, slab_chunks, reverse_mask,
    SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One chunk of CHUNK tokens, forwards: dz and, if asked for, the forward pass's y (b, l, d), the state entering a
    tile into ``history`` (b, slab_tiles, n, d), the gradient that the chunk gives to the state entering it into
    ``adjoint`` (b, slab_chunks, n, d), and the sum of its step sizes into ``total_steps`` (b, slab_chunks, d), infinite
    when a reset cuts the past off."""
    batch, chunk, group, block, c, mask = locate(per_group, groups, slab_chunks, BLOCK, WIDE)
    if WHOLE:
        mask = None
    direction = 1 - 2 * ((reverse_mask >> group) & 1)
    begin = (first_chunk + chunk) * CHUNK
    tokens = tl.minimum(length - begin, CHUNK)
    u_row, u_step = rows(u, batch, begin, length, direction, u_b, u_t)
    delta_row, delta_step = rows(delta, batch, begin, length, direction, delta_b, delta_t)
    dy_row, dy_step = rows(dy, batch, begin, length, direction, dy_b, dy_t)
    if z is not None:
        z_row, z_step = rows(z, batch, begin, length, direction, z_b, z_t)
        dz_row, dz_step = rows(dz, batch, begin, length, direction, dz_b, dz_t)
        if y is not None:
            y_row, y_step = rows(y, batch, begin, length, direction, length.to(tl.int64) * channels, channels)
    packed += ((batch * groups + group) * slab_chunks + chunk) * CHUNK * states
    first_channel, end_channel = group * per_group + block * BLOCK, (group + 1) * per_group
    prefetch_numbers(packed, TILE * states, PREFETCH)
    saved += (batch * chunks + first_chunk + chunk) * states * channels
    history += (batch * slab_chunks + chunk) * (CHUNK // TILE) * states * channels
    adjoint += (batch * slab_chunks + chunk) * states * channels
    offset = tl.zeros([BLOCK], tl.float32)
    skip = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = load_channels(bias + c, mask).to(tl.float32)
    if D is not None:
        skip = load_channels(D + c, mask).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    kept = tl.full((), 1.0, tl.float32)
    for i in range(states):
        tl.store(history + i * channels + c, load_channels(saved + i * channels + c, mask), mask=mask)
        tl.store(adjoint + i * channels + c, tl.zeros([BLOCK], tl.float32), mask=mask)
    for t in range(0, tokens, TILE):
        count = tokens - t
        raw_steps = load_tile(delta_row, delta_step, c * delta_c, t, mask, count, TILE, WHOLE)
        inputs = load_tile(u_row, u_step, c * u_c, t, mask, count, TILE, WHOLE)
        grads = load_tile(dy_row, dy_step, c * dy_c, t, mask, count, TILE, WHOLE)
        if z is not None:
            gates = load_tile(z_row, z_step, c * z_c, t, mask, count, TILE, WHOLE)
        # What the next tile is the first to read is asked for a whole tile ahead, as in the forward kernel.
        if t + TILE < tokens:
            ahead, last = t + TILE, count - TILE - 1
            prefetch_numbers(packed + ahead * states, TILE * states, PREFETCH)
            prefetch_rows(u_row, u_step, u_c, ahead, first_channel, last, end_channel, TILE, BLOCK, PREFETCH)
            prefetch_rows(
                delta_row, delta_step, delta_c, ahead, first_channel, last, end_channel, TILE, BLOCK, PREFETCH
            )
            prefetch_rows(dy_row, dy_step, dy_c, ahead, first_channel, last, end_channel, TILE, BLOCK, PREFETCH)
            if z is not None:
                prefetch_rows(z_row, z_step, z_c, ahead, first_channel, last, end_channel, TILE, BLOCK, PREFETCH)
        steps = step_sizes(raw_steps, offset, count, SOFTPLUS, TILE, WHOLE)
        inputs = inputs.to(tl.float32)
        grads = grads.to(tl.float32)
        outputs = ()
        if z is not None:
            gates = gates.to(tl.float32)
            s = sigmoid(gates)
            slopes = grads * (s * (1.0 + gates * (1.0 - s)))
            grads = grads * gates * s
            outputs = unstack(skip[None, :] * inputs, TILE, BLOCK)
        drives = unstack(inputs * steps, TILE, BLOCK)
        steps = unstack(steps, TILE, BLOCK)
        grads = unstack(grads, TILE, BLOCK)
        if seq_idx is not None:
            keeps = load_keeps(seq_idx, batch, begin + t, length, direction, seq_b, seq_t, count, TILE)
        # What the next state needs is read ahead, as in the forward kernel.
        at = c
        numbers = packed + t * states
        after = history + states * channels
        next_a2 = load_channels(A2 + at, mask)
        next_h = load_channels(history + at, mask)
        next_g = load_channels(adjoint + at, mask)
        next_b = load_numbers(numbers, TILE)
        next_read = load_numbers(numbers + TILE // 2, TILE)
        for _ in range(0, states, UNROLL):
            for _ in tl.static_range(UNROLL):
                a2, h, g_sum, b, read = next_a2, next_h, next_g, next_b, next_read
                here = at
                at += channels
                numbers += TILE
                next_a2 = load_channels(A2 + at, mask)
                next_h = load_channels(history + at, mask)
                next_g = load_channels(adjoint + at, mask)
                next_b = load_numbers(numbers, TILE)
                next_read = load_numbers(numbers + TILE // 2, TILE)
                before = tl.exp2(a2 * total) * kept
                decays = ()
                results = ()
                for j in tl.static_range(TILE):
                    decay = tl.exp2(steps[j] * a2)
                    if seq_idx is not None:
                        decay *= keeps[j]
                    decays += (decay,)
                    h = decay * h + drives[j] * b[j]
                    if z is not None:
                        results += (outputs[j] + h * read[j],)
                outputs = results
                if WHOLE:
                    tl.store(after + here, h, mask=t + TILE < tokens)
                else:
                    tl.store(after + here, h, mask=mask & (t + TILE < tokens))
                g = decays[TILE - 1] * (read[TILE - 1] * grads[TILE - 1])
                for j in tl.static_range(1, TILE):
                    g = decays[TILE - 1 - j] * (read[TILE - 1 - j] * grads[TILE - 1 - j] + g)
                tl.store(adjoint + here, before * g + g_sum, mask=mask)
        for j in tl.static_range(TILE):
            total += steps[j]
            if seq_idx is not None:
                kept *= keeps[j]
        if z is not None:
            out = stack(outputs, TILE, BLOCK)
            store_tile(dz_row, dz_step, c * dz_c, t, mask, count, out * slopes, TILE, WHOLE)
            if y is not None:  # the gates are read again rather than kept in registers
                gates = load_tile(z_row, z_step, c * z_c, t, mask, count, TILE, WHOLE).to(tl.float32)
                store_tile(y_row, y_step, c, t, mask, count, out * gates * sigmoid(gates), TILE, WHOLE)
        history += states * channels
    if seq_idx is not None:
        total = tl.where(kept == 0.0, float("inf"), total)
    tl.store(total_steps + (batch * slab_chunks + chunk) * channels + c, total, mask=mask)


@triton.jit(do_not_specialize=["length", "first_chunk", "slab_chunks", "accumulate", "reverse_mask"])
def gradient_kernel(
    u, delta, z, dy, packed, A2, D, bias, history, adjoint, seq_idx,
    du, ddelta, dpacked, dA, dD, dbias,
    u_b, u_t, u_c, delta_b, delta_t, delta_c, z_b, z_t, z_c, dy_b, dy_t, dy_c, seq_b, seq_t,
    length, channels, per_group, groups, states, first_chunk, slab_chunks, accumulate, reverse_mask,
    SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, PREFETCH: tl.constexpr,
    PACK: tl.constexpr, SUM: tl.constexpr, SUM_REGISTERS: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk but dz. ``adjoint`` holds what enters from behind and serves as the running g.

    du, ddelta (b, l, d); ``dpacked`` (b, g, blocks, slab_tiles, n, 2, TILE) takes dB and dC summed over this program's
    channels; dA (b, slab_chunks, n, d), dD and dbias (b, slab_chunks, d) are this program's shares, on top of what they
    hold with ``accumulate``.
    """
    batch, chunk, group, block, c, mask = locate(per_group, groups, slab_chunks, BLOCK, WIDE)
    if WHOLE:
        mask = None
    direction = 1 - 2 * ((reverse_mask >> group) & 1)
    begin = (first_chunk + chunk) * CHUNK
    tokens = tl.minimum(length - begin, CHUNK)
    blocks = tl.cdiv(per_group, BLOCK)
    packed += ((batch * groups + group) * slab_chunks + chunk) * CHUNK * states
    dpacked += (((batch * groups + group) * blocks + block) * slab_chunks + chunk) * CHUNK * states * 2
    share = batch * slab_chunks + chunk
    history += share * (CHUNK // TILE) * states * channels
    adjoint += share * states * channels
    dA += share * states * channels
    offset = tl.zeros([BLOCK], tl.float32)
    skip = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = load_channels(bias + c, mask).to(tl.float32)
    if D is not None:
        skip = load_channels(D + c, mask).to(tl.float32)
    dskip = tl.zeros([BLOCK], tl.float32)
    doffset = tl.zeros([BLOCK], tl.float32)
    if accumulate == 0:
        for i in range(states):
            tl.store(dA + i * channels + c, tl.zeros([BLOCK], tl.float32), mask=mask)
    dense = length.to(tl.int64) * channels
    t = (tl.cdiv(tokens, TILE) - 1) * TILE
    count = tokens - t
    u_row, u_step = rows(u, batch, begin, length, direction, u_b, u_t)
    delta_row, delta_step = rows(delta, batch, begin, length, direction, delta_b, delta_t)
    dy_row, dy_step = rows(dy, batch, begin, length, direction, dy_b, dy_t)
    du_row, out_step = rows(du, batch, begin, length, direction, dense, channels)
    ddelta_row, out_step = rows(ddelta, batch, begin, length, direction, dense, channels)
    raw_inputs = load_tile(u_row, u_step, c * u_c, t, mask, count, TILE, WHOLE)
    raw_steps = load_tile(delta_row, delta_step, c * delta_c, t, mask, count, TILE, WHOLE)
    raw_grads = load_tile(dy_row, dy_step, c * dy_c, t, mask, count, TILE, WHOLE)
    raw_gates = raw_grads
    if z is not None:
        z_row, z_step = rows(z, batch, begin, length, direction, z_b, z_t)
        raw_gates = load_tile(z_row, z_step, c * z_c, t, mask, count, TILE, WHOLE)
    first_channel, end_channel = group * per_group + block * BLOCK, (group + 1) * per_group
    while t >= 0:
        # What the tile before this one is the first to read is asked for a whole tile ahead; all its rows are there.
        if t > 0:
            ahead = t - TILE
            prefetch_numbers(packed + ahead * states, TILE * states, PREFETCH)
            prefetch_rows(u_row, u_step, u_c, ahead, first_channel, TILE - 1, end_channel, TILE, BLOCK, PREFETCH)
            prefetch_rows(
                delta_row, delta_step, delta_c, ahead, first_channel, TILE - 1, end_channel, TILE, BLOCK, PREFETCH
            )
            prefetch_rows(dy_row, dy_step, dy_c, ahead, first_channel, TILE - 1, end_channel, TILE, BLOCK, PREFETCH)
            if z is not None:
                prefetch_rows(z_row, z_step, z_c, ahead, first_channel, TILE - 1, end_channel, TILE, BLOCK, PREFETCH)
            if PREFETCH > 0:
                # The states entering it: 32 / (BLOCK / 8) of them at a time, by sectors of 8 channels.
                lane = tl.arange(0, 32)
                channel = tl.minimum(first_channel + lane % (BLOCK // 8) * 8, end_channel - 1)
                before = history + ((t // TILE) - 1) * states * channels
                for i in range(0, states, 256 // BLOCK):
                    state = tl.minimum(i + lane // (BLOCK // 8), states - 1)
                    prefetch(before + state * channels + channel, PREFETCH)
        steps = step_sizes(raw_steps, offset, count, SOFTPLUS, TILE, WHOLE)
        drives = unstack(raw_inputs.to(tl.float32) * steps, TILE, BLOCK)
        steps = unstack(steps, TILE, BLOCK)
        grads = raw_grads.to(tl.float32)
        if z is not None:
            gates = raw_gates.to(tl.float32)
            grads = grads * gates * sigmoid(gates)
        grads = unstack(grads, TILE, BLOCK)
        if seq_idx is not None:
            keeps = load_keeps(seq_idx, batch, begin + t, length, direction, seq_b, seq_t, count, TILE)
        ddrives = zeros(TILE, BLOCK)
        dsteps = zeros(TILE, BLOCK)
        tile_history = history + (t // TILE) * states * channels
        at = c
        numbers = packed + t * states
        sums = dpacked + t * states * 2
        next_h = load_channels(tile_history + at, mask)
        next_a2 = load_channels(A2 + at, mask)
        next_g = load_channels(adjoint + at, mask)
        next_da = load_channels(dA + at, mask)
        next_b = load_numbers(numbers, TILE)
        next_read = load_numbers(numbers + TILE // 2, TILE)
        for _ in range(0, states, UNROLL):
            for _ in tl.static_range(UNROLL):
                h, a2, g, da, b, read = next_h, next_a2, next_g, next_da, next_b, next_read
                here = at
                at += channels
                numbers += TILE
                next_h = load_channels(tile_history + at, mask)
                next_a2 = load_channels(A2 + at, mask)
                next_g = load_channels(adjoint + at, mask)
                next_da = load_channels(dA + at, mask)
                next_b = load_numbers(numbers, TILE)
                next_read = load_numbers(numbers + TILE // 2, TILE)
                decays = ()
                decayed = ()
                dread = ()
                for j in tl.static_range(TILE):
                    decay = tl.exp2(steps[j] * a2)
                    if seq_idx is not None:
                        decay *= keeps[j]
                    decays += (decay,)
                    decayed += (decay * h,)
                    h = decayed[j] + drives[j] * b[j]
                    dread += (h * grads[j],)
                backwards_db = ()
                backwards_drives = ()
                backwards_steps = ()
                for r in tl.static_range(TILE):
                    g += read[TILE - 1 - r] * grads[TILE - 1 - r]
                    backwards_db += (g * drives[TILE - 1 - r],)
                    backwards_drives += (ddrives[TILE - 1 - r] + g * b[TILE - 1 - r],)
                    q = g * decayed[TILE - 1 - r]
                    backwards_steps += (dsteps[TILE - 1 - r] + q * a2,)
                    da += q * steps[TILE - 1 - r]
                    g *= decays[TILE - 1 - r]
                tl.store(adjoint + here, g, mask=mask)
                tl.store(dA + here, da, mask=mask)
                db = ()
                ddrives = ()
                dsteps = ()
                for j in tl.static_range(TILE):
                    db += (backwards_db[TILE - 1 - j],)
                    ddrives += (backwards_drives[TILE - 1 - j],)
                    dsteps += (backwards_steps[TILE - 1 - j],)
                sum_and_store(db + dread, sums, SUM, SUM_REGISTERS, PACK, 2 * TILE)
                sums += 2 * TILE
        # The rows are read again rather than kept: registers are what the loop above is short of. They and those of the
        # next tile are all on their way before the arithmetic and the stores.
        this_t, this_count = t, count
        inputs = load_tile(u_row, u_step, c * u_c, t, mask, count, TILE, WHOLE)
        raws = load_tile(delta_row, delta_step, c * delta_c, t, mask, count, TILE, WHOLE)
        t -= TILE
        next_t = tl.maximum(t, 0)  # before the first tile its rows are read once more
        count = tokens - next_t
        raw_inputs = load_tile(u_row, u_step, c * u_c, next_t, mask, count, TILE, WHOLE)
        raw_steps = load_tile(delta_row, delta_step, c * delta_c, next_t, mask, count, TILE, WHOLE)
        raw_grads = load_tile(dy_row, dy_step, c * dy_c, next_t, mask, count, TILE, WHOLE)
        raw_gates = raw_grads
        if z is not None:
            raw_gates = load_tile(z_row, z_step, c * z_c, next_t, mask, count, TILE, WHOLE)
        inputs = inputs.to(tl.float32)
        passed = stack(grads, TILE, BLOCK)
        tile_ddrives = stack(ddrives, TILE, BLOCK)
        dinputs = stack(steps, TILE, BLOCK) * tile_ddrives + skip[None, :] * passed
        draws = stack(dsteps, TILE, BLOCK) * LN2 + inputs * tile_ddrives
        if SOFTPLUS:
            draws *= sigmoid(raws.to(tl.float32) + offset[None, :])
        if not WHOLE:
            draws = tl.where((tl.arange(0, TILE) < this_count)[:, None], draws, 0.0)
        doffset += tl.sum(draws, axis=0)
        dskip += tl.sum(passed * inputs, axis=0)
        store_tile(du_row, out_step, c, this_t, mask, this_count, dinputs, TILE, WHOLE)
        store_tile(ddelta_row, out_step, c, this_t, mask, this_count, draws, TILE, WHOLE)
    at = share * channels + c
    more = accumulate != 0
    if more:
        dskip += load_channels(dD + at, mask)
        doffset += load_channels(dbias + at, mask)
    tl.store(dD + at, dskip, mask=mask)
    tl.store(dbias + at, doffset, mask=mask)


@triton.jit(do_not_specialize=["start", "tiles", "length", "reverse_mask"])
def unpack_kernel(
    dpacked, dB, dC, d_b, d_t, d_g, start, tiles, length, groups, blocks, states, reverse_mask,
    TILE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dB, dC (b, l, g, n), of the same strides, from scan time ``start`` on: the sums over the blocks of channels, in a
    fixed order."""
    TILES: tl.constexpr = BLOCK_T // TILE
    parts = tl.cdiv(tiles, TILES)
    pid = tl.program_id(0)
    group = (pid // parts) % groups
    batch = (pid // (parts * groups)).to(tl.int64)
    tile = ((pid % parts) * TILES + tl.arange(0, TILES))[:, None, None]
    j = tl.arange(0, TILE)[None, None, :]  # last, as in ``dpacked``: what is next to each other is read together
    time = start + tile * TILE + j
    token = tl.where(((reverse_mask >> group) & 1) != 0, length - 1 - time, time).to(tl.int64)
    size = states * tiles.to(tl.int64) * (2 * TILE)
    dpacked += (batch * groups + group) * blocks * size
    for n0 in range(0, states, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[None, :, None]
        there = (tile < tiles) & (n < states)
        at = dpacked + tile.to(tl.int64) * (states * 2 * TILE) + n * (2 * TILE) + j
        db = tl.zeros([TILES, BLOCK_N, TILE], tl.float32)
        dc = tl.zeros([TILES, BLOCK_N, TILE], tl.float32)
        for _ in range(blocks):
            db += tl.load(at, mask=there, other=0.0)
            dc += tl.load(at + TILE, mask=there, other=0.0)
            at += size
        inside = there & (time < length)
        out = batch * d_b + token * d_t + group * d_g + n
        tl.store(dB + out, db.to(dB.dtype.element_ty), mask=inside)
        tl.store(dC + out, dc.to(dC.dtype.element_ty), mask=inside)
