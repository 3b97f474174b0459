"""Backend "numba": the selective scan compiled for the CPU, eight channels to a vector, the state in a register.

A task is a row of the batch and a few vectors of channels. It takes the tokens in chunks, in scan order; within a
chunk it runs over all tokens for one state of one vector after the other, so that the state stays in its register and
everything else in the nearest cache. The backward pass takes chunks last to first: from the state that entered the
chunk it recomputes states and decays, then runs the adjoint recurrence over them. Every sum has a fixed order that does
not depend on the number of threads. float32 inside; 16-bit inputs are converted first.
"""

# The compiled functions take their types from Numba.
# mypy: allow-untyped-defs

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.selective_scan.op import CHUNK
from seqssm.kernels.simd import (
    LANES,
    LN_2,
    LOG2_E,
    ONE,
    ZERO,
    add_doubles,
    add_totals,
    addressable,
    exp2,
    fmadd,
    get,
    get_byte,
    inlined,
    kernel,
    load,
    load_some,
    parallel,
    put,
    sigmoid,
    softplus,
    splat,
    store,
    store_some,
    total,
)

# Gradients of B and C are sums over channels: at most this many tasks, of fixed extent, share the channels of a group,
# each with sums of its own, over SEGMENT tokens at a time.
_SHARES = 8
_SEGMENT = 16 * CHUNK
# What a chunk keeps of each token, side by side: arrays of their own would compete for the same lines of the cache.
_STEP, _DRIVE, _OUT, _INPUT, _DOUT, _DDRIVE, _DLOG, _STATE, _DECAY, _END = (LANES * i for i in range(10))
_ROW = 10 * LANES
_SPARE = CHUNK * _ROW
_SCRATCH = _SPARE + LANES


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
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, d), the final state (b, d, n) and the states entering every CHUNK tokens (b, chunks, d, n)."""
    b, l, d = u.shape
    n = A.shape[1]
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, reverse)
    y = torch.empty(b, l, d)
    state = torch.zeros(b, d, n) if initial_state is None else initial_state.detach().float().contiguous().clone()
    states = torch.empty((b, -(-l // CHUNK), d, n) if save_states else 0)
    results = tuple(x.data_ptr() for x in (y, state, states))
    parallel(
        _forward_tasks,
        scan.tasks,
        y.numel() * n,
        _SCRATCH,
        scan.sizes,
        scan.strides,
        scan.pointers,
        (*results, save_states),
    )
    return y.to(u.dtype), state, states


def backward(
    dy: Tensor,
    dfinal_state: Tensor,
    states: Tensor,
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
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
    b, l, d = u.shape
    g, n = B.shape[2:]
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, reverse)
    dy = addressable(dy)
    adjoint = dfinal_state.detach().float().contiguous().clone()  # of the state that leaves the chunk
    du, ddelta = torch.empty(b, l, d), torch.empty(b, l, d)
    dz = torch.empty((b, l, d) if z is not None else 0)
    dB, dC = torch.empty(b, l, g, n), torch.empty(b, l, g, n)
    dA = torch.zeros(b, d, n, dtype=torch.float64)
    dD, dbias = (torch.zeros(b, d, dtype=torch.float64) for _ in range(2))
    results = tuple(x.data_ptr() for x in (dy, states, adjoint, du, ddelta, dz, dA, dD, dbias))
    for start in reversed(range(0, l, _SEGMENT)):
        stop = min(start + _SEGMENT, l)
        sums = torch.zeros(scan.shares, b, g, stop - start, n, 2)
        strides = (*scan.strides, *dy.stride()[:2], start, stop)
        pointers = (*results, sums.data_ptr())
        parallel(
            _backward_tasks, scan.tasks, 2 * du.numel() * n, _SCRATCH, scan.sizes, strides, scan.pointers, pointers
        )
        for i, (r, part) in enumerate(zip(reverse, sums.sum(0).unbind(1), strict=True)):
            tokens = slice(l - stop, l - start) if r else slice(start, stop)
            dB[:, tokens, i], dC[:, tokens, i] = (part.flip(1) if r else part).unbind(-1)
    return (
        du,
        ddelta,
        dA.sum(0).float(),
        dB,
        dC,
        None if D is None else dD.sum(0).float(),
        None if z is None else dz,
        None if delta_bias is None else dbias.sum(0).float(),
        None if initial_state is None else adjoint,
    )


def step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """y (b, d) of one token; ``state`` (b, d, n) is updated in place. B, C (b, g, n)."""
    b, d, n = state.shape
    h = addressable(state)
    inputs = [addressable(x) for x in (h, u, delta, u if z is None else z, B, C, A)]
    parameters = [None if x is None else addressable(x) for x in (D, delta_bias)]
    y = torch.empty(b, d)
    sizes = (b, d, B.shape[1], n, int(delta_softplus), int(z is not None))
    strides = tuple(stride for x in inputs for stride in x.stride()[:-1])
    pointers = (*(x.data_ptr() for x in inputs), *(0 if x is None else x.data_ptr() for x in parameters), y.data_ptr())
    parallel(_step_tasks, b, state.numel(), 3 * LANES, sizes, strides, pointers)
    if h.data_ptr() != state.data_ptr():
        state.copy_(h)
    return y.to(u.dtype)


class _Scan:
    """The operands as the compiled functions take them: sizes, strides and pointers, which live as long as this."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        seq_idx: Tensor | None,
        reverse: tuple[bool, ...],
    ) -> None:
        b, l, d = u.shape
        g, n = B.shape[2:]
        vectors = -(-(d // g) // LANES)  # of a group
        self.shares = min(vectors, _SHARES)
        self.tasks = b * g * self.shares
        flags = (int(delta_softplus), int(z is not None), int(seq_idx is not None))
        self.sizes = (b, l, d, g, n, vectors, self.shares, *flags)
        inputs = [addressable(x) for x in (u, delta, u if z is None else z, B, C)]
        self.strides = tuple(stride for x in inputs for stride in x.stride()[:-1])
        columns = [A.detach() * float(LOG2_E), *(A.new_zeros(d) if x is None else x.detach() for x in (D, delta_bias))]
        parameters = torch.cat([x.float().reshape(d, -1) for x in columns], dim=1).view(g, d // g, n + 2)
        parameters = F.pad(parameters, (0, 0, 0, vectors * LANES - d // g))
        parameters = parameters.view(g, vectors, LANES, n + 2).mT.contiguous()
        # One where the state is dropped between tokens t-1 and t.
        changes = torch.zeros(0, dtype=torch.uint8)
        if seq_idx is not None:
            changes = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).to(torch.uint8), (1, 1))  # (b, l+1)
        self._tensors = (*inputs, parameters, changes, torch.tensor(reverse, dtype=torch.uint8))
        self.pointers = tuple(x.data_ptr() for x in self._tensors)


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
def _forward_tasks(first, last, work, sizes, strides, operands, results):
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
def _backward_tasks(first, last, work, sizes, strides, operands, results):
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
def _step_tasks(first, last, scratch, sizes, strides, pointers):
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
