"""The compiled functions of backend "numba": the selective scan, eight channels to a vector.

A task takes the tokens in chunks, in scan order; within a chunk it runs over all tokens for one state of one vector
after the other, so that the state stays in its register and everything else in the nearest cache. The backward pass
takes chunks last to first: from the state that entered the chunk it recomputes states and decays, then runs the adjoint
recurrence over them.
"""

# The compiled functions take their types from Numba.
# mypy: allow-untyped-defs

import numpy as np

from seqssm.kernels.compiled import inlined, kernel
from seqssm.kernels.selective_scan.op import CHUNK
from seqssm.kernels.simd import (
    LANES,
    LN_2,
    LOG2_E,
    ONE,
    ZERO,
    add_doubles,
    add_totals,
    exp2,
    fmadd,
    get,
    get_byte,
    load,
    load_some,
    put,
    sigmoid,
    softplus,
    splat,
    store,
    store_some,
    total,
)

# What a chunk keeps of each token, side by side: arrays of their own would compete for the same lines of the cache.
_STEP, _DRIVE, _OUT, _INPUT, _DOUT, _DDRIVE, _DLOG, _STATE, _DECAY, _END = (LANES * i for i in range(10))
_ROW = 10 * LANES
_SPARE = CHUNK * _ROW
SCRATCH = _SPARE + LANES


@inlined
def _spans(packed, changes, row, l, start, length, backwards, bounds):
    """Bounds of the runs of tokens without a reset in a chunk; returns their number and whether the first is fresh."""
    count, fresh = 1, False
    bounds[0] = 0
    if packed:
        for t in range(length):
            if get_byte(changes, row * (l + 1) + (l - start - t if backwards else start + t)) != 0:
                if t == 0:
                    fresh = True
                else:
                    bounds[count] = t
                    count += 1
    bounds[count] = length
    return count, fresh


@inlined
def _inputs(work, length, width, u, u_at, u_by, delta, delta_at, delta_by, bias, use_softplus, D):
    """Fill in, for each token, the input, the step, their product, and D times the input."""
    for t in range(length):
        o = t * _ROW
        x = load_some(u, u_at + t * u_by, 1, width, work + 4 * _SPARE)
        step = load_some(delta, delta_at + t * delta_by, 1, width, work + 4 * _SPARE) + bias
        if use_softplus:
            step = softplus(step)
        store(work, o + _INPUT, x)
        store(work, o + _STEP, step)
        store(work, o + _DRIVE, x * step)
        store(work, o + _OUT, x * D)


@kernel
def forward_tasks(first, last, work, sizes, strides, operands, results):
    _, l, d, g, n, vectors, shares, use_softplus, gated, packed = sizes
    u_row, u_token, delta_row, delta_token, z_row, z_token, B_row, B_token, B_group, C_row, C_token, C_group = strides
    u, delta, z, B, C, parameters, changes, directions = operands
    y, state, states, save_states = results
    c = d // g
    chunks = (l + CHUNK - 1) // CHUNK
    spare = work + 4 * _SPARE
    bounds = np.empty(CHUNK + 1, dtype=np.int64)
    for task in range(first, last):
        share, group, row = task % shares, task // shares % g, task // (shares * g)
        backwards = get_byte(directions, group) != 0
        sign = -1 if backwards else 1
        for index in range(vectors * share // shares, vectors * (share + 1) // shares):
            channel = group * c + index * LANES
            width = min(LANES, c - index * LANES)
            own = (group * vectors + index) * (n + 2) * LANES
            D, bias = load(parameters, own + n * LANES), load(parameters, own + (n + 1) * LANES)
            for chunk in range(chunks):
                start = chunk * CHUNK
                length = min(CHUNK, l - start)
                token = l - 1 - start if backwards else start
                count, fresh = _spans(packed != 0, changes, row, l, start, length, backwards, bounds)
                u_at, u_by = row * u_row + token * u_token + channel, sign * u_token
                delta_at, delta_by = row * delta_row + token * delta_token + channel, sign * delta_token
                _inputs(work, length, width, u, u_at, u_by, delta, delta_at, delta_by, bias, use_softplus != 0, D)
                for j in range(n):
                    a = load(parameters, own + j * LANES)
                    B_at, B_by = row * B_row + token * B_token + group * B_group + j, sign * B_token
                    C_at, C_by = row * C_row + token * C_token + group * C_group + j, sign * C_token
                    state_at = (row * d + channel) * n + j
                    h = load_some(state, state_at, n, width, spare)
                    if save_states != 0:
                        store_some(states, ((row * chunks + chunk) * d + channel) * n + j, n, h, width, spare)
                    for span in range(count):
                        if span > 0 or fresh:
                            h = splat(ZERO)
                        for t in range(bounds[span], bounds[span + 1]):
                            o = t * _ROW
                            drive = load(work, o + _DRIVE) * splat(get(B, B_at + t * B_by))
                            h = fmadd(exp2(load(work, o + _STEP) * a), h, drive)
                            store(work, o + _OUT, fmadd(h, splat(get(C, C_at + t * C_by)), load(work, o + _OUT)))
                    store_some(state, state_at, n, h, width, spare)
                z_at, z_by = row * z_row + token * z_token + channel, sign * z_token
                for t in range(length):
                    out = load(work, t * _ROW + _OUT)
                    if gated != 0:
                        gate = load_some(z, z_at + t * z_by, 1, width, spare)
                        out = out * gate * sigmoid(gate)
                    store_some(y, (row * l + token + sign * t) * d + channel, 1, out, width, spare)


@kernel
def backward_tasks(first, last, work, sizes, strides, operands, results):
    b, l, d, g, n, vectors, shares, use_softplus, gated, packed = sizes
    u_row, u_token, delta_row, delta_token, z_row, z_token, B_row, B_token, B_group, C_row, C_token, C_group = strides[
        :12
    ]
    dy_row, dy_token, segment_start, segment_stop = strides[12:]
    u, delta, z, B, C, parameters, changes, directions = operands
    dy, states, carry, du, ddelta, dz, dA, dD, dbias, sums = results
    c = d // g
    chunks = (l + CHUNK - 1) // CHUNK
    spare = work + 4 * _SPARE
    bounds = np.empty(CHUNK + 1, dtype=np.int64)
    for task in range(first, last):
        share, group, row = task % shares, task // shares % g, task // (shares * g)
        backwards = get_byte(directions, group) != 0
        sign = -1 if backwards else 1
        for index in range(vectors * share // shares, vectors * (share + 1) // shares):
            channel = group * c + index * LANES
            width = min(LANES, c - index * LANES)
            own = (group * vectors + index) * (n + 2) * LANES
            D, bias = load(parameters, own + n * LANES), load(parameters, own + (n + 1) * LANES)
            for chunk in range((segment_stop - 1) // CHUNK, segment_start // CHUNK - 1, -1):
                start = chunk * CHUNK
                length = min(CHUNK, l - start)
                token = l - 1 - start if backwards else start
                count, fresh = _spans(packed != 0, changes, row, l, start, length, backwards, bounds)
                u_at, u_by = row * u_row + token * u_token + channel, sign * u_token
                delta_at, delta_by = row * delta_row + token * delta_token + channel, sign * delta_token
                z_at, z_by = row * z_row + token * z_token + channel, sign * z_token
                dy_at, dy_by = row * dy_row + token * dy_token + channel, sign * dy_token
                _inputs(work, length, width, u, u_at, u_by, delta, delta_at, delta_by, bias, use_softplus != 0, D)
                for t in range(length):
                    o = t * _ROW
                    dout = load_some(dy, dy_at + t * dy_by, 1, width, spare)
                    if gated != 0:
                        gate = load_some(z, z_at + t * z_by, 1, width, spare)
                        dout = dout * gate * sigmoid(gate)
                    store(work, o + _DOUT, dout)
                    store(work, o + _DDRIVE, splat(ZERO))
                    store(work, o + _DLOG, splat(ZERO))
                for j in range(n):
                    a = load(parameters, own + j * LANES)
                    B_at, B_by = row * B_row + token * B_token + group * B_group + j, sign * B_token
                    C_at, C_by = row * C_row + token * C_token + group * C_group + j, sign * C_token
                    h = load_some(states, ((row * chunks + chunk) * d + channel) * n + j, n, width, spare)
                    for span in range(count):
                        if span > 0 or fresh:
                            h = splat(ZERO)
                        for t in range(bounds[span], bounds[span + 1]):
                            o = t * _ROW
                            decay = exp2(load(work, o + _STEP) * a)
                            store(work, o + _STATE, h)
                            store(work, o + _DECAY, decay)
                            h = fmadd(decay, h, load(work, o + _DRIVE) * splat(get(B, B_at + t * B_by)))
                            if gated != 0:
                                store(work, o + _OUT, fmadd(h, splat(get(C, C_at + t * C_by)), load(work, o + _OUT)))
                        store(work, bounds[span] * _ROW + _END, h)
                    state_at = (row * d + channel) * n + j
                    adjoint = load_some(carry, state_at, n, width, spare)
                    da = splat(ZERO)
                    # Pairs (dB, dC) of the segment: (shares, b, g, tokens, n).
                    at = ((share * b + row) * g + group) * (segment_stop - segment_start) + start - segment_start
                    for span in range(count - 1, -1, -1):
                        after = load(work, bounds[span] * _ROW + _END)
                        for t in range(bounds[span + 1] - 1, bounds[span] - 1, -1):
                            o = t * _ROW
                            dout, before = load(work, o + _DOUT), load(work, o + _STATE)
                            adjoint = fmadd(dout, splat(get(C, C_at + t * C_by)), adjoint)
                            add_totals(sums, 2 * ((at + t) * n + j), adjoint * load(work, o + _DRIVE), dout * after)
                            ddrive = fmadd(adjoint, splat(get(B, B_at + t * B_by)), load(work, o + _DDRIVE))
                            store(work, o + _DDRIVE, ddrive)
                            adjoint = adjoint * load(work, o + _DECAY)
                            dlog = adjoint * before
                            store(work, o + _DLOG, fmadd(dlog, a, load(work, o + _DLOG)))
                            da = fmadd(dlog, load(work, o + _STEP), da)
                            after = before
                        if span > 0 or fresh:
                            adjoint = splat(ZERO)
                    store_some(carry, state_at, n, adjoint, width, spare)
                    add_doubles(dA, state_at, n, da, width, spare)
                sum_D, sum_bias = splat(ZERO), splat(ZERO)
                for t in range(length):
                    o = t * _ROW
                    here = (row * l + token + sign * t) * d + channel
                    x, dout, ddrive = load(work, o + _INPUT), load(work, o + _DOUT), load(work, o + _DDRIVE)
                    sum_D = fmadd(dout, x, sum_D)
                    store_some(du, here, 1, fmadd(ddrive, load(work, o + _STEP), dout * D), width, spare)
                    step = fmadd(ddrive, x, load(work, o + _DLOG) * splat(LN_2))
                    if use_softplus != 0:
                        step = step * sigmoid(load_some(delta, delta_at + t * delta_by, 1, width, spare) + bias)
                    sum_bias = sum_bias + step
                    store_some(ddelta, here, 1, step, width, spare)
                    if gated != 0:
                        gate = load_some(z, z_at + t * z_by, 1, width, spare)
                        s = sigmoid(gate)
                        slope = s * fmadd(gate, splat(ONE) - s, splat(ONE))
                        dout = load_some(dy, dy_at + t * dy_by, 1, width, spare)
                        store_some(dz, here, 1, dout * load(work, o + _OUT) * slope, width, spare)
                add_doubles(dD, row * d + channel, 1, sum_D, width, spare)
                add_doubles(dbias, row * d + channel, 1, sum_bias, width, spare)


@kernel
def step_tasks(first, last, scratch, sizes, strides, pointers):
    _, d, g, n, use_softplus, gated = sizes
    h_row, h_channel, u_row, delta_row, z_row, B_row, B_group, C_row, C_group, A_channel = strides
    state, u, delta, z, B, C, A, D, bias, y = pointers
    scales, sums, spare = scratch, scratch + 4 * LANES, scratch + 8 * LANES
    for row in range(first, last):
        for channel in range(0, d, LANES):
            width = min(LANES, d - channel)
            x = load_some(u, row * u_row + channel, 1, width, spare)
            step_size = load_some(delta, row * delta_row + channel, 1, width, spare)
            if bias != 0:
                step_size = step_size + load_some(bias, channel, 1, width, spare)
            if use_softplus != 0:
                step_size = softplus(step_size)
            store(scales, 0, step_size)
            store(sums, 0, step_size * x)
            # Lanes are states here: a token alone has them next to each other.
            for lane in range(width):
                scale, drive = get(scales, lane), splat(get(sums, lane))
                group = (channel + lane) * g // d
                out = splat(ZERO)
                for j in range(0, n, LANES):
                    count = min(LANES, n - j)
                    at = row * h_row + (channel + lane) * h_channel + j
                    decay = exp2(
                        load_some(A, (channel + lane) * A_channel + j, 1, count, spare) * splat(scale * LOG2_E)
                    )
                    h = drive * load_some(B, row * B_row + group * B_group + j, 1, count, spare)
                    h = fmadd(decay, load_some(state, at, 1, count, spare), h)
                    store_some(state, at, 1, h, count, spare)
                    out = fmadd(h, load_some(C, row * C_row + group * C_group + j, 1, count, spare), out)
                put(sums, lane, total(out))
            out = load_some(sums, 0, 1, width, spare)
            if D != 0:
                out = fmadd(x, load_some(D, channel, 1, width, spare), out)
            if gated != 0:
                gate = load_some(z, row * z_row + channel, 1, width, spare)
                out = out * gate * sigmoid(gate)
            store_some(y, row * d + channel, 1, out, width, spare)
