"""Backend "numba": a few tokens of some sequences through a whole Mamba layer, in one compiled call.

What takes the time for a packet of live sound is not arithmetic but the two dozen operators a layer. Here a task is a
few rows of the batch: norm, input projection, convolution, scan, gate and output projection follow one another on
scratch memory that stays in the cache. A token's sums have one order, whoever its neighbours are, so that the results
depend neither on the batch nor on the number of threads.
"""

# The compiled functions take their types from Numba.
# mypy: allow-untyped-defs

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.compiled import inlined, kernel, parallel
from seqssm.kernels.mamba_step.layer import LayerWeights
from seqssm.kernels.simd import (
    LANES,
    LOG2_E,
    ONE,
    ZERO,
    exp,
    exp2,
    fmadd,
    get,
    get_byte,
    load_some,
    product_1x1,
    product_1x4,
    product_4x1,
    product_4x2,
    put,
    sigmoid,
    softplus,
    splat,
    store_some,
    total,
)

# Tokens of a task: the weights are read once for all of them, and the scratch memory must stay in the cache.
_TOKENS = 32


def chunk(
    x: Tensor,
    conv_state: Tensor,
    scan_state: Tensor,
    weights: LayerWeights,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream after the layer (b, l, d), and both states after the last token."""
    w = weights
    (b, l, d), (e, n), k, r = x.shape, w.A_log.shape, w.conv_weight.shape[1], w.dt_proj.shape[1]
    inputs = [
        None if t is None else _plain(t)
        for t in (
            x, conv_state, w.norm_weight, w.in_proj, w.in_bias, w.conv_weight, w.conv_bias,
            w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D, w.out_proj, w.out_bias,
        )
    ]  # fmt: skip
    inputs.append(_constant(w.eps))
    # One where the state is dropped in front of a token.
    if seq_idx is not None:
        inputs.append(F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).to(torch.uint8), (1, 0)))
    else:
        inputs.append(None)
    y, conv = torch.empty(b, l, d), torch.empty(b, e, k - 1)
    scan = scan_state.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    rows = max(1, _TOKENS // l)
    sizes = (b, l, d, e, n, r, k, rows)
    pointers = tuple(0 if t is None else t.data_ptr() for t in inputs)
    results = (y.data_ptr(), conv.data_ptr(), scan.data_ptr())
    multiplications = 3 * d * e + e * (2 * r + 5 * n)  # a token
    scratch = min(rows, b) * l * (d + 5 * e + r + 2 * n) + (2 * k - 1 + n) * e + LANES
    parallel(_chunk_tasks, -(-b // rows), b * l * multiplications // 8, scratch, sizes, pointers, results)
    return y.to(x.dtype), conv.to(conv_state.dtype), scan


def _plain(x: Tensor) -> Tensor:
    """In float32 and dense; a copy only where it is not."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.detach().float().contiguous()


@functools.cache
def _constant(value: float) -> Tensor:
    return torch.tensor([value])


@inlined
def _project(out, out_by, weight, rows, columns, x, by, tokens):
    """out (tokens, rows) = x (tokens, columns) weight (rows, columns)^T."""
    whole = tokens - tokens % 4
    row = weight
    for i in range(0, rows - 1, 2):
        for t in range(0, whole, 4):
            product_4x2(out + 4 * (t * out_by + i), out_by, row, columns, x + 4 * t * by, by)
        row += 8 * columns
    if rows % 2:
        for t in range(0, whole, 4):
            product_4x1(out + 4 * (t * out_by + rows - 1), out_by, row, columns, x + 4 * t * by, by)
    for t in range(whole, tokens):
        for i in range(0, rows - 3, 4):
            product_1x4(out + 4 * (t * out_by + i), out_by, weight + 4 * i * columns, columns, x + 4 * t * by, by)
        for i in range(rows - rows % 4, rows):
            product_1x1(out + 4 * (t * out_by + i), out_by, weight + 4 * i * columns, columns, x + 4 * t * by, by)


@inlined
def _norm(out, x, weight, eps, d, tokens, spare):
    """out (tokens, d) = x / rms(x) weight."""
    for t in range(tokens):
        at = t * d
        squares = splat(ZERO)
        for j in range(0, d, LANES):
            value = load_some(x, at + j, 1, min(LANES, d - j), spare)
            squares = fmadd(value, value, squares)
        scale = splat(ONE / np.sqrt(total(squares) / np.float32(d) + eps))
        for j in range(0, d, LANES):
            width = min(LANES, d - j)
            value = load_some(x, at + j, 1, width, spare) * scale * load_some(weight, j, 1, width, spare)
            store_some(out, at + j, 1, value, width, spare)


@inlined
def _convolve(u, xz, e, k, taps, bias, past, old, new, resets, l, spare):
    """u (l, e), the causal convolution of the first halves of xz (l, 2e), and its SiLU.

    The state ``new`` (e, k-1) follows ``old``; ``past`` (k-1, e) is to write to.
    """
    for j in range(k - 1):
        for c in range(e):
            put(past, j * e + c, get(old, c * (k - 1) + j))
    seen = k - 1  # tokens before this one that it sees
    for t in range(l):
        seen = 0 if resets != 0 and get_byte(resets, t) != 0 else min(seen + 1, k - 1) if t > 0 else k - 1
        for c in range(0, e, LANES):
            width = min(LANES, e - c)
            out = load_some(xz, t * 2 * e + c, 1, width, spare) * load_some(taps, (k - 1) * e + c, 1, width, spare)
            if bias != 0:
                out = out + load_some(bias, c, 1, width, spare)
            for back in range(1, seen + 1):
                if t >= back:
                    value = load_some(xz, (t - back) * 2 * e + c, 1, width, spare)
                else:
                    value = load_some(past, (k - 1 + t - back) * e + c, 1, width, spare)
                out = fmadd(value, load_some(taps, (k - 1 - back) * e + c, 1, width, spare), out)
            store_some(u, t * e + c, 1, out * sigmoid(out), width, spare)
    for back in range(k - 1):  # the newest first
        t = l - 1 - back
        for c in range(e):
            if back > seen:
                value = ZERO
            elif t >= 0:
                value = get(xz, t * 2 * e + c)
            else:
                value = get(past, (k - 1 + t) * e + c)
            put(new, c * (k - 1) + k - 2 - back, value)


@inlined
def _scan(y, u, delta, selected, width_selected, r, n, A, h, resets, l, e, spare):
    """y (l, e), the selective scan without its skip; the state h (e, n) moves on in place. A times log2(e)."""
    for c in range(e):
        for j in range(0, n, 2 * LANES):
            # Two vectors of states, the second of which may be short or empty, and one sum of both.
            next_j, width = j + LANES, min(LANES, n - j)
            next_width = max(0, min(LANES, n - next_j))
            a, next_a = load_some(A, c * n + j, 1, width, spare), load_some(A, c * n + next_j, 1, next_width, spare)
            state = load_some(h, c * n + j, 1, width, spare)
            next_state = load_some(h, c * n + next_j, 1, next_width, spare)
            for t in range(l):
                if resets != 0 and get_byte(resets, t) != 0:
                    state = next_state = splat(ZERO)
                step = splat(get(delta, t * e + c))
                drive = step * splat(get(u, t * e + c))
                B = t * width_selected + r + j
                C = B + n
                state = fmadd(exp2(step * a), state, drive * load_some(selected, B, 1, width, spare))
                read = state * load_some(selected, C, 1, width, spare)
                next_b = load_some(selected, B + LANES, 1, next_width, spare)
                next_state = fmadd(exp2(step * next_a), next_state, drive * next_b)
                read = fmadd(next_state, load_some(selected, C + LANES, 1, next_width, spare), read)
                put(y, t * e + c, total(read) if j == 0 else get(y, t * e + c) + total(read))
            store_some(h, c * n + j, 1, state, width, spare)
            store_some(h, c * n + next_j, 1, next_state, next_width, spare)


@kernel
def _chunk_tasks(first, last, work, sizes, operands, results):
    b, l, d, e, n, r, k, rows = sizes
    x, conv_state, norm, in_proj, in_bias, conv_weight, conv_bias = operands[:7]
    x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias, eps, resets = operands[7:]
    y, conv, scan = results
    s = r + 2 * n
    most = min(rows, b) * l
    normed = work
    xz = normed + 4 * most * d
    u = xz + 4 * most * 2 * e
    selected = u + 4 * most * e
    delta = selected + 4 * most * s
    out = delta + 4 * most * e
    taps = out + 4 * most * e
    past = taps + 4 * k * e
    A = past + 4 * (k - 1) * e
    spare = A + 4 * e * n
    for j in range(k):
        for c in range(e):
            put(taps, j * e + c, get(conv_weight, c * k + j))
    for c in range(0, e * n, LANES):
        width = min(LANES, e * n - c)
        decay = splat(ZERO) - exp(load_some(A_log, c, 1, width, spare)) * splat(LOG2_E)
        store_some(A, c, 1, decay, width, spare)
    for task in range(first, last):
        begin = task * rows
        count = min(rows, b - begin)
        tokens = count * l
        stream = x + 4 * begin * l * d
        _norm(normed, stream, norm, get(eps, 0), d, tokens, spare)
        _project(xz, 2 * e, in_proj, 2 * e, d, normed, d, tokens)
        if in_bias != 0:
            for t in range(tokens):
                for c in range(2 * e):
                    put(xz, t * 2 * e + c, get(xz, t * 2 * e + c) + get(in_bias, c))
        for i in range(count):
            row = begin + i
            own = 4 * i * l * e
            hidden = resets + row * l if resets != 0 else 0
            state = 4 * row * e * (k - 1)
            _convolve(
                u + own, xz + 2 * own, e, k, taps, conv_bias, past, conv_state + state, conv + state, hidden, l, spare
            )
        _project(selected, s, x_proj, s, e, u, e, tokens)
        _project(delta, e, dt_proj, e, r, selected, s, tokens)
        for t in range(tokens):
            for c in range(0, e, LANES):
                width = min(LANES, e - c)
                step = load_some(delta, t * e + c, 1, width, spare) + load_some(dt_bias, c, 1, width, spare)
                store_some(delta, t * e + c, 1, softplus(step), width, spare)
        for i in range(count):
            row = begin + i
            own = 4 * i * l * e
            hidden = resets + row * l if resets != 0 else 0
            _scan(
                out + own, u + own, delta + own, selected + 4 * i * l * s, s, r, n, A, scan + 4 * row * e * n,
                hidden, l, e, spare,
            )  # fmt: skip
        for t in range(tokens):
            for c in range(0, e, LANES):
                width = min(LANES, e - c)
                value = load_some(out, t * e + c, 1, width, spare)
                skip = load_some(D, c, 1, width, spare)
                value = fmadd(load_some(u, t * e + c, 1, width, spare), skip, value)
                gate = load_some(xz, t * 2 * e + e + c, 1, width, spare)
                store_some(out, t * e + c, 1, value * gate * sigmoid(gate), width, spare)
        _project(normed, d, out_proj, d, e, out, e, tokens)
        for t in range(tokens):
            for c in range(0, d, LANES):
                width = min(LANES, d - c)
                at = (begin * l + t) * d + c
                value = load_some(x, at, 1, width, spare) + load_some(normed, t * d + c, 1, width, spare)
                if out_bias != 0:
                    value = value + load_some(out_bias, c, 1, width, spare)
                store_some(y, at, 1, value, width, spare)
