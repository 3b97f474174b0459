# mypy: ignore-errors
# (the kernels are Triton's language, which Python's types do not describe)
"""Backend "triton": one token through a Mamba layer in three launches; the README says why three."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqssm.kernels.triton_tiles import LOG2E, sigmoid, softplus, use_device

# Rows of a projection, and channels of the scan, that a program takes.
_ROWS, _CHANNELS = 8, 16
# Elements of a row that are summed at once.
_SPAN = 256


def step(
    x: Tensor,
    conv_state: Tensor,
    scan_state: Tensor,
    norm_weight: Tensor,
    eps: float,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
) -> Tensor:
    """The residual stream after the layer (b, d); both states in place."""
    (b, d), (e, n) = x.shape, A_log.shape
    r = dt_proj.shape[1]
    projected = torch.empty(b, 2 * e, dtype=torch.float32, device=x.device)  # the convolution's output, and the gate
    y = torch.empty(b, e, dtype=torch.float32, device=x.device)
    out = torch.empty(b, d, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    span_d, span_e = (min(_SPAN, triton.next_power_of_2(size)) for size in (d, e))
    with use_device(x):
        project_kernel[(triton.cdiv(2 * e, _ROWS), b)](
            x, norm_weight, in_proj.contiguous(), in_bias, conv_state, conv_weight.contiguous(), conv_bias, projected,
            *conv_state.stride(), d, e, eps, WIDTH=conv_weight.shape[1], ROWS=_ROWS, SPAN=span_d, num_warps=2,
        )  # fmt: skip
        scan_kernel[(triton.cdiv(e, _CHANNELS), b)](
            projected, x_proj.contiguous(), dt_proj.contiguous(), dt_bias, A_log.contiguous(), D, scan_state, y,
            *scan_state.stride(), e, n, r, BLOCK=_CHANNELS, SPAN=span_e,
            BLOCK_N=triton.next_power_of_2(n), BLOCK_R=triton.next_power_of_2(r), num_warps=4,
        )  # fmt: skip
        output_kernel[(triton.cdiv(d, _ROWS), b)](
            x, y, out_proj.contiguous(), out_bias, out, d, e, ROWS=_ROWS, SPAN=span_e, num_warps=2
        )
    return out


@triton.jit
def project_kernel(
    x, norm_weight, in_proj, in_bias, conv_state, conv_weight, conv_bias, projected,
    state_b, state_d, state_k, d, e, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the input projection of the norm of x (b, d). The first e of its 2e rows go on through the
    convolution, whose state (b, e, WIDTH - 1) moves on; ``projected`` (b, 2e) float32."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < 2 * e
    total = tl.zeros([ROWS, SPAN], tl.float32)
    squares = tl.zeros([SPAN], tl.float32)
    for start in range(0, d, SPAN):
        i = start + tl.arange(0, SPAN)
        mask = i < d
        value = tl.load(x + batch * d + i, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(norm_weight + i, mask=mask, other=0.0).to(tl.float32)
        at = in_proj + row.to(tl.int64)[:, None] * d + i[None, :]
        weight = tl.load(at, mask=inside[:, None] & mask[None, :], other=0.0).to(tl.float32)
        squares += value * value
        total += weight * (value * scale)[None, :]
    out = tl.sum(total, axis=1) / tl.sqrt(tl.sum(squares, axis=0) / d + eps)
    if in_bias is not None:
        out += tl.load(in_bias + row, mask=inside, other=0.0).to(tl.float32)
    convolved = row < e
    mixed = out * tl.load(conv_weight + row * WIDTH + (WIDTH - 1), mask=convolved, other=0.0).to(tl.float32)
    if conv_bias is not None:
        mixed += tl.load(conv_bias + row, mask=convolved, other=0.0).to(tl.float32)
    state = conv_state + batch * state_b + row * state_d
    for i in tl.static_range(WIDTH - 1):
        old = tl.load(state + i * state_k, mask=convolved, other=0.0)
        mixed += old.to(tl.float32) * tl.load(conv_weight + row * WIDTH + i, mask=convolved, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(state + (i - 1) * state_k, old, mask=convolved)
    if WIDTH > 1:
        tl.store(state + (WIDTH - 2) * state_k, out.to(conv_state.dtype.element_ty), mask=convolved)
    out = tl.where(convolved, mixed * sigmoid(mixed), out)
    tl.store(projected + batch * 2 * e + row, out, mask=inside)


@triton.jit
def _select(weight, u, first, count, e, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``first`` to ``first + count`` of ``weight`` (rows, e) times u (e,): (BLOCK,), zeros from ``count`` on."""
    row = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, SPAN], tl.float32)
    for start in range(0, e, SPAN):
        i = start + tl.arange(0, SPAN)
        at = weight + (first + row).to(tl.int64)[:, None] * e + i[None, :]
        part = tl.load(at, mask=(row < count)[:, None] & (i < e)[None, :], other=0.0).to(tl.float32)
        total += part * tl.load(u + i, mask=i < e, other=0.0)[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def scan_kernel(
    projected, x_proj, dt_proj, dt_bias, A_log, D, scan_state, y, state_b, state_d, state_n, e, n, r,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of the selective scan and its gate: y (b, e) float32, the state (b, e, n) in place.

    Every program computes the step size, B and C for itself: less than waiting for another launch.
    """
    batch = tl.program_id(1).to(tl.int64)
    u = projected + batch * 2 * e
    low = _select(x_proj, u, 0, r, e, SPAN, BLOCK_R)
    b = _select(x_proj, u, r, n, e, SPAN, BLOCK_N)
    read = _select(x_proj, u, r + n, n, e, SPAN, BLOCK_N)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < e
    rank = tl.arange(0, BLOCK_R)
    weight = tl.load(
        dt_proj + c[:, None] * r + rank[None, :], mask=inside[:, None] & (rank < r)[None, :], other=0.0
    ).to(tl.float32)
    step = tl.sum(weight * low[None, :], axis=1) + tl.load(dt_bias + c, mask=inside, other=0.0).to(tl.float32)
    step = softplus(step)
    x = tl.load(u + c, mask=inside, other=0.0)
    s = tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (s < n)[None, :]
    a = tl.load(A_log + c[:, None] * n + s[None, :], mask=mask, other=0.0).to(tl.float32)
    at = scan_state + batch * state_b + c[:, None] * state_d + s[None, :] * state_n
    h = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    h = h * tl.exp2(step[:, None] * (-LOG2E * tl.exp2(a * LOG2E))) + (step * x)[:, None] * b[None, :]
    tl.store(at, h.to(scan_state.dtype.element_ty), mask=mask)
    out = tl.sum(h * read[None, :], axis=1) + x * tl.load(D + c, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(u + e + c, mask=inside, other=0.0)
    tl.store(y + batch * e + c, out * gate * sigmoid(gate), mask=inside)


@triton.jit
def output_kernel(x, y, out_proj, out_bias, out, d, e, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """ROWS rows of the output projection of y (b, e), added to x (b, d)."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < d
    total = tl.zeros([ROWS, SPAN], tl.float32)
    for start in range(0, e, SPAN):
        i = start + tl.arange(0, SPAN)
        at = out_proj + row.to(tl.int64)[:, None] * e + i[None, :]
        weight = tl.load(at, mask=inside[:, None] & (i < e)[None, :], other=0.0).to(tl.float32)
        total += weight * tl.load(y + batch * e + i, mask=i < e, other=0.0)[None, :]
    value = tl.sum(total, axis=1)
    if out_bias is not None:
        value += tl.load(out_bias + row, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(x + batch * d + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + batch * d + row, value.to(out.dtype.element_ty), mask=inside)
