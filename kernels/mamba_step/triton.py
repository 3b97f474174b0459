# mypy: ignore-errors
# (the kernels are Triton's language, which Python's types do not describe)
"""Backend "triton": one token through a Mamba layer in three launches; the README says why three."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqssm.kernels.launching import cdiv, next_power_of_2
from seqssm.kernels.mamba_step.layer import LayerWeights
from seqssm.kernels.triton_tiles import LOG2E, sigmoid, softplus, use_device

# Rows of a projection, and channels of the scan, that a program takes.
_ROWS, _CHANNELS = 8, 16
# Elements of a row that are summed at once.
_SPAN = 256
# Let a launch begin before the one before it has ended (compute capability 9 and up): it reads its weights meanwhile.
OVERLAP = True


def step(
    x: Tensor,
    conv_state: Tensor,
    scan_state: Tensor,
    weights: LayerWeights,
) -> Tensor:
    """The residual stream after the layer (b, d); both states in place."""
    w = LayerWeights(*(t.contiguous() if isinstance(t, Tensor) else t for t in weights))
    (b, d), (e, n), r = x.shape, w.A_log.shape, w.dt_proj.shape[1]
    projected = torch.empty(b, 2 * e, dtype=torch.float32, device=x.device)  # the convolution's output, and the gate
    y = torch.empty(b, e, dtype=torch.float32, device=x.device)
    out = torch.empty(b, d, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    overlap = OVERLAP and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    options = {"OVERLAP": overlap} | ({"launch_pdl": True} if overlap else {})
    span_d, span_e = (min(_SPAN, next_power_of_2(size)) for size in (d, e))
    with use_device(x):
        project_kernel[(cdiv(2 * e, _ROWS), b)](
            x, w.norm_weight, w.in_proj, w.in_bias, conv_state, w.conv_weight, w.conv_bias, projected,
            *conv_state.stride(), d, e, w.eps, WIDTH=w.conv_weight.shape[1], ROWS=_ROWS, SPAN=span_d, num_warps=2,
            **options,
        )  # fmt: skip
        scan_kernel[(cdiv(e, _CHANNELS), b)](
            projected, w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D, scan_state, y,
            *scan_state.stride(), e, n, r, BLOCK=_CHANNELS, SPAN=span_e,
            BLOCK_N=next_power_of_2(n), BLOCK_R=next_power_of_2(r), num_warps=4,
            **options,
        )  # fmt: skip
        output_kernel[(cdiv(d, _ROWS), b)](
            x, y, w.out_proj, w.out_bias, out, d, e, ROWS=_ROWS, SPAN=span_e, num_warps=2, **options
        )
    return out


@triton.jit
def _after_the_launch_before(OVERLAP: tl.constexpr):
    """With OVERLAP, let the next launch begin, and wait for all that the one before has written."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _row_part(weight, row, inside, start, size, SPAN: tl.constexpr):
    """SPAN columns of some rows of a weight (rows, size) as float32."""
    i = start + tl.arange(0, SPAN)
    at = weight + row.to(tl.int64)[:, None] * size + i[None, :]
    return tl.load(at, mask=inside[:, None] & (i < size)[None, :], other=0.0).to(tl.float32)


@triton.jit
def project_kernel(
    x, norm_weight, in_proj, in_bias, conv_state, conv_weight, conv_bias, projected,
    state_b, state_d, state_k, d, e, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the input projection of the norm of x (b, d). The first e of its 2e rows go on through the
    convolution, whose state (b, e, WIDTH - 1) moves on; ``projected`` (b, 2e) float32."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < 2 * e
    convolved = row < e
    # All that nobody writes is read first.
    next_weight = _row_part(in_proj, row, inside, 0, d, SPAN)
    offset = tl.zeros([ROWS], tl.float32)
    if conv_bias is not None:
        offset += tl.load(conv_bias + row, mask=convolved, other=0.0).to(tl.float32)
    taps = ()
    for i in tl.static_range(WIDTH):
        taps += (tl.load(conv_weight + row * WIDTH + i, mask=convolved, other=0.0).to(tl.float32),)
    _after_the_launch_before(OVERLAP)
    state = conv_state + batch * state_b + row * state_d
    window = ()
    for i in tl.static_range(WIDTH - 1):
        window += (tl.load(state + i * state_k, mask=convolved, other=0.0),)
    total = tl.zeros([ROWS, SPAN], tl.float32)
    squares = tl.zeros([SPAN], tl.float32)
    for start in range(0, d, SPAN):
        weight = next_weight
        next_weight = _row_part(in_proj, row, inside, start + SPAN, d, SPAN)
        column = start + tl.arange(0, SPAN)
        value = tl.load(x + batch * d + column, mask=column < d, other=0.0).to(tl.float32)
        scale = tl.load(norm_weight + column, mask=column < d, other=0.0).to(tl.float32)
        squares += value * value
        total += weight * (value * scale)[None, :]
    out = tl.sum(total, axis=1) / tl.sqrt(tl.sum(squares, axis=0) / d + eps)
    if in_bias is not None:
        out += tl.load(in_bias + row, mask=inside, other=0.0).to(tl.float32)
    mixed = offset + out * taps[WIDTH - 1]
    for i in tl.static_range(WIDTH - 1):
        mixed += window[i].to(tl.float32) * taps[i]
        if i > 0:
            tl.store(state + (i - 1) * state_k, window[i], mask=convolved)
    if WIDTH > 1:
        tl.store(state + (WIDTH - 2) * state_k, out.to(conv_state.dtype.element_ty), mask=convolved)
    out = tl.where(convolved, mixed * sigmoid(mixed), out)
    tl.store(projected + batch * 2 * e + row, out, mask=inside)


@triton.jit
def scan_kernel(
    projected, x_proj, dt_proj, dt_bias, A_log, D, scan_state, y, state_b, state_d, state_n, e, n, r,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of the selective scan and its gate: y (b, e) float32, the state (b, e, n) in place.

    Every program computes the step size, B and C for itself: less than waiting for another launch.
    """
    batch = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < e
    s = tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    mask = inside[:, None] & (s < n)[None, :]
    a = tl.load(A_log + c[:, None] * n + s[None, :], mask=mask, other=0.0).to(tl.float32)
    at = dt_proj + c[:, None] * r + rank[None, :]
    weight = tl.load(at, mask=inside[:, None] & (rank < r)[None, :], other=0.0).to(tl.float32)
    offset = tl.load(dt_bias + c, mask=inside, other=0.0).to(tl.float32)
    skip = tl.load(D + c, mask=inside, other=0.0).to(tl.float32)
    _after_the_launch_before(OVERLAP)
    u = projected + batch * 2 * e
    x = tl.load(u + c, mask=inside, other=0.0)
    gate = tl.load(u + e + c, mask=inside, other=0.0)
    at = scan_state + batch * state_b + c[:, None] * state_d + s[None, :] * state_n
    h = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    low = tl.zeros([BLOCK_R, SPAN], tl.float32)
    b = tl.zeros([BLOCK_N, SPAN], tl.float32)
    read = tl.zeros([BLOCK_N, SPAN], tl.float32)
    for start in range(0, e, SPAN):
        column = start + tl.arange(0, SPAN)
        value = tl.load(u + column, mask=column < e, other=0.0)[None, :]
        low += _row_part(x_proj, rank, rank < r, start, e, SPAN) * value
        b += _row_part(x_proj + r * e, s, s < n, start, e, SPAN) * value
        read += _row_part(x_proj + (r + n) * e, s, s < n, start, e, SPAN) * value
    step = softplus(tl.sum(weight * tl.sum(low, axis=1)[None, :], axis=1) + offset)
    decay = tl.exp2(step[:, None] * (-LOG2E * tl.exp2(a * LOG2E)))
    h = h * decay + (step * x)[:, None] * tl.sum(b, axis=1)[None, :]
    tl.store(at, h.to(scan_state.dtype.element_ty), mask=mask)
    out = tl.sum(h * tl.sum(read, axis=1)[None, :], axis=1) + x * skip
    tl.store(y + batch * e + c, out * gate * sigmoid(gate), mask=inside)


@triton.jit
def output_kernel(x, y, out_proj, out_bias, out, d, e, ROWS: tl.constexpr, SPAN: tl.constexpr, OVERLAP: tl.constexpr):
    """ROWS rows of the output projection of y (b, e), added to x (b, d)."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < d
    next_weight = _row_part(out_proj, row, inside, 0, e, SPAN)
    _after_the_launch_before(OVERLAP)
    stream = tl.load(x + batch * d + row, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, SPAN], tl.float32)
    for start in range(0, e, SPAN):
        weight = next_weight
        next_weight = _row_part(out_proj, row, inside, start + SPAN, e, SPAN)
        column = start + tl.arange(0, SPAN)
        total += weight * tl.load(y + batch * e + column, mask=column < e, other=0.0)[None, :]
    value = tl.sum(total, axis=1)
    if out_bias is not None:
        value += tl.load(out_bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + batch * d + row, (stream + value).to(out.dtype.element_ty), mask=inside)
