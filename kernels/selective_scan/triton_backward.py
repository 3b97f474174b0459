# mypy: ignore-errors
# (these functions are Triton's language, which Python's types do not describe)
"""Triton kernels of the backward selective scan.

With g_t the gradient of the state h_t and dY_t that of the ungated output, g_t = C_t dY_t + exp(delta_{t+1} A) g_{t+1}.
``history_kernel`` runs each chunk forwards from the saved state, keeps the state that enters every tile, and sums what
the chunk's outputs send back to the state entering it; ``pass_states_kernel`` then gives the g that enters each chunk
from behind. With both, the chunks are independent: ``gradient_kernel`` takes each one's tiles last to first, recomputes
the states of a tile in registers and sums dB and dC over its channels; ``unpack_kernel`` adds these up over the blocks.
"""

import triton
import triton.language as tl

from seqssm.kernels.triton_tiles import (
    LN2,
    lane_numbers,
    load_keeps,
    load_numbers,
    load_tile,
    locate,
    opaque,
    products,
    rows,
    sigmoid,
    step_sizes,
    sum_lanes,
    zeros,
)


@triton.jit
def output_gradients(dy_row, dy_step, dy_c, z_row, z_step, z_c, GATED: tl.constexpr, mask, count, TILE: tl.constexpr):
    """The gradient of the ungated output for each row of a tile."""
    grads = load_tile(dy_row, dy_step, dy_c, mask, count, TILE)
    if GATED:
        gates = load_tile(z_row, z_step, z_c, mask, count, TILE)
        passed = ()
        for j in tl.static_range(TILE):
            passed += (grads[j] * gates[j] * sigmoid(gates[j]),)
        grads = passed
    return grads


@triton.jit(do_not_specialize=["length", "first_chunk", "chunks", "slab_chunks", "reverse_mask"])
def history_kernel(
    u, delta, z, dy, packed, A2, bias, saved, history, adjoint, total_steps, seq_idx,
    u_b, u_t, u_c, delta_b, delta_t, delta_c, z_b, z_t, z_c, dy_b, dy_t, dy_c, seq_b, seq_t,
    length, channels, per_group, groups, states, first_chunk, chunks, slab_chunks, reverse_mask,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of CHUNK tokens, forwards: the state entering each tile into ``history`` (b, slab_tiles, n, d), the
    gradient that the chunk gives to the state entering it into ``adjoint`` (b, slab_chunks, n, d), and the sum of its
    step sizes into ``total_steps`` (b, slab_chunks, d), infinite when a reset cuts the past off."""
    batch, chunk, group, _, c, mask = locate(per_group, groups, slab_chunks, BLOCK)
    direction = 1 - 2 * ((reverse_mask >> group) & 1)
    begin = (first_chunk + chunk) * CHUNK
    tokens = tl.minimum(length - begin, CHUNK)
    u_row, u_step = rows(u, batch, begin, length, direction, u_b, u_t)
    delta_row, delta_step = rows(delta, batch, begin, length, direction, delta_b, delta_t)
    dy_row, dy_step = rows(dy, batch, begin, length, direction, dy_b, dy_t)
    if z is not None:
        z_row, z_step = rows(z, batch, begin, length, direction, z_b, z_t)
    else:
        z_row, z_step = dy_row, dy_step
    pairs = slab_chunks.to(tl.int64) * CHUNK
    packed += (batch * groups + group) * states * pairs + chunk * CHUNK
    saved += ((batch * chunks + first_chunk + chunk) * channels + c) * states
    history += (batch * slab_chunks + chunk) * (CHUNK // TILE) * states * channels
    adjoint += (batch * slab_chunks + chunk) * states * channels
    offset = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    kept = tl.full((), 1.0, tl.float32)
    for i in range(states):
        tl.store(history + i * channels + c, tl.load(saved + i, mask=mask, other=0.0), mask=mask)
    for t in range(0, tokens, TILE):
        count = tokens - t
        steps = step_sizes(
            load_tile(delta_row, delta_step, c * delta_c, mask, count, TILE), offset, count, SOFTPLUS, TILE
        )
        drives = products(load_tile(u_row, u_step, c * u_c, mask, count, TILE), steps, TILE)
        grads = output_gradients(dy_row, dy_step, c * dy_c, z_row, z_step, c * z_c, z is not None, mask, count, TILE)
        if seq_idx is not None:
            keeps = load_keeps(seq_idx, batch, begin + t, length, direction, seq_b, seq_t, count, TILE)
        next_a2 = tl.load(A2 + c, mask=mask, other=0.0)
        next_h = tl.load(history + c, mask=mask, other=0.0)
        next_g = tl.load(adjoint + c, mask=mask & (t > 0), other=0.0)
        next_b = load_numbers(packed + t, TILE)
        next_read = load_numbers(packed + t + TILE // 2, TILE)
        for i in range(states):
            a2, h, g_sum, b, read = next_a2, next_h, next_g, next_b, next_read
            k = tl.minimum(i + 1, states - 1)
            next_a2 = tl.load(A2 + k * channels + c, mask=mask, other=0.0)
            next_h = tl.load(history + k * channels + c, mask=mask, other=0.0)
            next_g = tl.load(adjoint + k * channels + c, mask=mask & (t > 0), other=0.0)
            next_b = load_numbers(packed + k * pairs + t, TILE)
            next_read = load_numbers(packed + k * pairs + t + TILE // 2, TILE)
            before = tl.exp2(a2 * total) * kept
            decays = ()
            for j in tl.static_range(TILE):
                decay = tl.exp2(steps[j] * a2)
                if seq_idx is not None:
                    decay *= keeps[j]
                decays += (decay,)
                h = decay * h + drives[j] * b[j]
            tl.store(history + (states + i) * channels + c, h, mask=mask & (t + TILE < tokens))
            g = decays[TILE - 1] * (read[TILE - 1] * grads[TILE - 1])
            for j in tl.static_range(1, TILE):
                g = decays[TILE - 1 - j] * (read[TILE - 1 - j] * grads[TILE - 1 - j] + g)
            tl.store(adjoint + i * channels + c, before * g + g_sum, mask=mask)
        for j in tl.static_range(TILE):
            total += steps[j]
            if seq_idx is not None:
                kept *= keeps[j]
        history += states * channels
        u_row += TILE * u_step
        delta_row += TILE * delta_step
        dy_row += TILE * dy_step
        z_row += TILE * z_step
    if seq_idx is not None:
        total = tl.where(kept == 0.0, float("inf"), total)
    tl.store(total_steps + (batch * slab_chunks + chunk) * channels + c, total, mask=mask)


@triton.jit(do_not_specialize=["length", "first_chunk", "slab_chunks", "accumulate", "reverse_mask"])
def gradient_kernel(
    u, delta, z, dy, packed, A2, D, bias, history, adjoint, seq_idx,
    du, ddelta, dz, y, dpacked, dA, dD, dbias,
    u_b, u_t, u_c, delta_b, delta_t, delta_c, z_b, z_t, z_c, dy_b, dy_t, dy_c, seq_b, seq_t, dz_b, dz_t, dz_c,
    length, channels, per_group, groups, states, first_chunk, slab_chunks, accumulate, reverse_mask,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
    SUM: tl.constexpr, SUM_REGISTERS: tl.constexpr, LANE: tl.constexpr, LANE_REGISTERS: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk. ``adjoint`` holds what enters from behind and serves as the running g.

    du, ddelta, dz (b, l, d), and y, the output of the forward pass, where it is asked for.
    ``dpacked`` (b, g, blocks, n, slab_tiles, 2, TILE) takes dB and dC summed over this program's channels; dA
    (b, slab_chunks, n, d), dD and dbias (b, slab_chunks, d) are this program's shares, on top of what they hold with
    ``accumulate``.
    """
    batch, chunk, group, block, c, mask = locate(per_group, groups, slab_chunks, BLOCK)
    direction = 1 - 2 * ((reverse_mask >> group) & 1)
    begin = (first_chunk + chunk) * CHUNK
    tokens = tl.minimum(length - begin, CHUNK)
    blocks = tl.cdiv(per_group, BLOCK)
    pairs = slab_chunks.to(tl.int64) * CHUNK
    packed += (batch * groups + group) * states * pairs + chunk * CHUNK
    dpacked += (((batch * groups + group) * blocks + block) * states * pairs + chunk * CHUNK) * 2
    share = batch * slab_chunks + chunk
    history += share * (CHUNK // TILE) * states * channels
    adjoint += share * states * channels
    dA += share * states * channels
    offset = tl.zeros([BLOCK], tl.float32)
    skip = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + c, mask=mask, other=0.0).to(tl.float32)
    dskip = tl.zeros([BLOCK], tl.float32)
    doffset = tl.zeros([BLOCK], tl.float32)
    lane = lane_numbers(LANE, LANE_REGISTERS, PACK, BLOCK)
    sharers: tl.constexpr = 32 // (2 * TILE)
    dense = length.to(tl.int64) * channels
    tiles = tl.cdiv(tokens, TILE)
    for back in range(tiles):
        t = (tiles - 1 - back) * TILE
        count = tokens - t
        u_row, u_step = rows(u, batch, begin + t, length, direction, u_b, u_t)
        delta_row, delta_step = rows(delta, batch, begin + t, length, direction, delta_b, delta_t)
        dy_row, dy_step = rows(dy, batch, begin + t, length, direction, dy_b, dy_t)
        if z is not None:
            z_row, z_step = rows(z, batch, begin + t, length, direction, z_b, z_t)
        else:
            z_row, z_step = dy_row, dy_step
        steps = step_sizes(
            load_tile(delta_row, delta_step, c * delta_c, mask, count, TILE), offset, count, SOFTPLUS, TILE
        )
        drives = products(load_tile(u_row, u_step, c * u_c, mask, count, TILE), steps, TILE)
        grads = output_gradients(dy_row, dy_step, c * dy_c, z_row, z_step, c * z_c, z is not None, mask, count, TILE)
        if seq_idx is not None:
            keeps = load_keeps(seq_idx, batch, begin + t, length, direction, seq_b, seq_t, count, TILE)
        outputs = zeros(TILE, BLOCK)
        ddrives = zeros(TILE, BLOCK)
        dsteps = zeros(TILE, BLOCK)
        tile_history = history + (t // TILE) * states * channels
        again = mask & ((accumulate != 0) | (back > 0))
        next_h = tl.load(tile_history + c, mask=mask, other=0.0)
        next_a2 = tl.load(A2 + c, mask=mask, other=0.0)
        next_g = tl.load(adjoint + c, mask=mask, other=0.0)
        next_da = tl.load(dA + c, mask=again, other=0.0)
        next_b = load_numbers(packed + t, TILE)
        next_read = load_numbers(packed + t + TILE // 2, TILE)
        for i in range(states):
            h, a2, g, da, b, read = next_h, next_a2, next_g, next_da, next_b, next_read
            k = tl.minimum(i + 1, states - 1)
            next_h = tl.load(tile_history + k * channels + c, mask=mask, other=0.0)
            next_a2 = tl.load(A2 + k * channels + c, mask=mask, other=0.0)
            next_g = tl.load(adjoint + k * channels + c, mask=mask, other=0.0)
            next_da = tl.load(dA + k * channels + c, mask=again, other=0.0)
            next_b = load_numbers(packed + k * pairs + t, TILE)
            next_read = load_numbers(packed + k * pairs + t + TILE // 2, TILE)
            decays = ()
            decayed = ()
            dread = ()
            results = ()
            for j in tl.static_range(TILE):
                decay = tl.exp2(steps[j] * a2)
                if seq_idx is not None:
                    decay *= keeps[j]
                decays += (decay,)
                decayed += (decay * h,)
                h = decayed[j] + drives[j] * b[j]
                results += (outputs[j] + h * read[j],)
                dread += (h * grads[j],)
            outputs = results
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
            tl.store(adjoint + i * channels + c, g, mask=mask)
            tl.store(dA + i * channels + c, da, mask=mask)
            db = ()
            ddrives = ()
            dsteps = ()
            for j in tl.static_range(TILE):
                db += (backwards_db[TILE - 1 - j],)
                ddrives += (backwards_drives[TILE - 1 - j],)
                dsteps += (backwards_steps[TILE - 1 - j],)
            sums = sum_lanes(db + dread, lane, SUM, SUM_REGISTERS, PACK, 2 * TILE, BLOCK)
            at = dpacked + (i * pairs + t) * 2 + lane // sharers
            tl.store(at, sums, mask=(lane >= 0) & (lane % sharers == 0))
        # The rows are read again rather than kept: registers are what this kernel is short of.
        t = opaque(t, SUM is None)
        count = tokens - t
        u_row, u_step = rows(u, batch, begin + t, length, direction, u_b, u_t)
        delta_row, delta_step = rows(delta, batch, begin + t, length, direction, delta_b, delta_t)
        du_row, out_step = rows(du, batch, begin + t, length, direction, dense, channels)
        ddelta_row, _ = rows(ddelta, batch, begin + t, length, direction, dense, channels)
        inputs = load_tile(u_row, u_step, c * u_c, mask, count, TILE)
        for j in tl.static_range(TILE):
            inside = mask & (j < count)
            raw = tl.load(delta_row + c * delta_c, mask=inside, other=0.0).to(tl.float32)
            x = steps[j] * ddrives[j] + skip * grads[j]
            tl.store(du_row + c, x.to(du.dtype.element_ty), mask=inside)
            x = dsteps[j] * LN2 + inputs[j] * ddrives[j]
            if SOFTPLUS:
                x *= sigmoid(raw + offset)
            tl.store(ddelta_row + c, x.to(ddelta.dtype.element_ty), mask=inside)
            doffset += tl.where(j < count, x, 0.0)
            dskip += grads[j] * inputs[j]
            delta_row += delta_step
            du_row += out_step
            ddelta_row += out_step
        if z is not None:
            dy_row, dy_step = rows(dy, batch, begin + t, length, direction, dy_b, dy_t)
            z_row, z_step = rows(z, batch, begin + t, length, direction, z_b, z_t)
            dz_row, dz_step = rows(dz, batch, begin + t, length, direction, dz_b, dz_t)
            if y is not None:
                y_row, _ = rows(y, batch, begin + t, length, direction, dense, channels)
            for j in tl.static_range(TILE):
                inside = mask & (j < count)
                gate = tl.load(z_row + c * z_c, mask=inside, other=0.0).to(tl.float32)
                dout = tl.load(dy_row + c * dy_c, mask=inside, other=0.0).to(tl.float32)
                s = sigmoid(gate)
                out = outputs[j] + skip * inputs[j]
                x = dout * out * (s * (1.0 + gate * (1.0 - s)))
                tl.store(dz_row + c * dz_c, x.to(dz.dtype.element_ty), mask=inside)
                if y is not None:
                    tl.store(y_row + c, (out * gate * s).to(y.dtype.element_ty), mask=inside)
                    y_row += out_step
                z_row += z_step
                dy_row += dy_step
                dz_row += dz_step
    at = share * channels + c
    more = mask & (accumulate != 0)
    dskip += tl.load(dD + at, mask=more, other=0.0)
    doffset += tl.load(dbias + at, mask=more, other=0.0)
    tl.store(dD + at, dskip, mask=mask)
    tl.store(dbias + at, doffset, mask=mask)


@triton.jit(do_not_specialize=["start", "tiles", "length", "reverse_mask"])
def unpack_kernel(
    dpacked, dB, dC, start, tiles, length, groups, blocks, states, reverse_mask,
    TILE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dB, dC (b, l, g, n) from scan time ``start`` on: the sums over the blocks of channels, in a fixed order."""
    time_blocks = tl.cdiv(tiles * TILE, BLOCK_T)
    pid = tl.program_id(0)
    group = (pid // time_blocks) % groups
    batch = (pid // (time_blocks * groups)).to(tl.int64)
    t = (pid % time_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    time = start + t
    token = tl.where(((reverse_mask >> group) & 1) != 0, length - 1 - time, time).to(tl.int64)
    size = states * tiles.to(tl.int64) * (2 * TILE)
    dpacked += (batch * groups + group) * blocks * size
    offset = t // TILE * (2 * TILE) + t % TILE
    for n0 in range(0, states, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = ((time < length) & (t < tiles * TILE))[:, None] & (n < states)[None, :]
        at = dpacked + offset[:, None] + n.to(tl.int64)[None, :] * (tiles * 2 * TILE)
        db = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        dc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for _ in range(blocks):
            db += tl.load(at, mask=inside, other=0.0)
            dc += tl.load(at + TILE, mask=inside, other=0.0)
            at += size
        out = ((batch * length + token) * groups + group)[:, None] * states + n[None, :]
        tl.store(dB + out, db.to(dB.dtype.element_ty), mask=inside)
        tl.store(dC + out, dc.to(dC.dtype.element_ty), mask=inside)
