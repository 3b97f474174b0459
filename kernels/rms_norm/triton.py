# mypy: ignore-errors
# (the kernels are Triton's language, which Python's types do not describe)
"""Backend "triton": the residual addition and the norm on the GPU, one pass over memory forwards and one back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqssm.kernels.launching import cdiv, launcher, next_power_of_2
from seqssm.kernels.triton_tiles import use_device

# Elements of a tile (whole rows), and rows of a program of the backward pass: the fewest programs that fill a GPU, so
# that the sums for the weight stay few.
_TILE = 2048
_ENOUGH_PROGRAMS, _MOST_ROWS = 2048, 256


def forward(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, subtract: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The norm in ``dtype`` and the sum (difference with ``subtract``), (..., d) each; no sum without ``added``."""
    d = x.shape[-1]
    n = x.numel() // d
    block_d, block_r, warps = _blocks(d)
    x = x.contiguous()
    added = None if added is None else added.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = None if added is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with use_device(x):
        launcher("norm", "forward", subtract, eps, dtype, tensors=(x, added, weight))(
            forward_kernel, cdiv(n, block_r),
            x, added, weight.contiguous(), y, total, n, d, eps,
            SUBTRACT=subtract, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return y, total


def backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float, added_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, of ``added`` where its dtype is another than x's, and of the weight."""
    d = total.shape[-1]
    n = total.numel() // d
    block_d, block_r, warps = _blocks(d)
    rows = min(_MOST_ROWS, next_power_of_2(cdiv(n, _ENOUGH_PROGRAMS)))
    tiles = max(1, rows // block_r)
    programs = cdiv(n, tiles * block_r)
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    own = added_dtype is not None and added_dtype != total.dtype
    dadded = torch.empty(total.shape, dtype=added_dtype, device=total.device) if own else None
    dtotal = None if dtotal is None else dtotal.contiguous()
    dweight = torch.empty(programs, d, dtype=torch.float32, device=total.device)
    dy = dy.contiguous()
    with use_device(total):
        launcher("norm", "backward", eps, added_dtype, tensors=(dy, dtotal, total, weight))(
            backward_kernel, programs,
            dy, dtotal, total.contiguous(), weight.contiguous(), dx, dadded, dweight, n, d, tiles, eps,
            BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return dx, dadded, dweight.sum(0).to(weight.dtype)


def _blocks(d: int) -> tuple[int, int, int]:
    """Channels and rows of a tile, and warps."""
    block_d = next_power_of_2(d)
    return block_d, max(1, _TILE // block_d), 4 if block_d <= 4096 else 16


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    x, added, weight, y, total, n, d, eps, SUBTRACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK_R rows of x and ``added`` (n, d): their sum, or difference, and its norm."""
    c = tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < n)[:, None] & (c < d)[None, :]
    at = row[:, None] * d + c[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if added is not None:
        other = tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
        value = value - other if SUBTRACT else value + other
        stored = value.to(total.dtype.element_ty)
        tl.store(total + at, stored, mask=mask)
        value = stored.to(tl.float32)
    scale = tl.load(weight + c, mask=c < d, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / d + eps)
    out = value * rstd[:, None] * scale[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "tiles"])
def backward_kernel(
    dy, dtotal, total, weight, dx, dadded, dweight, n, d, tiles, eps, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``tiles`` tiles of BLOCK_R rows: the gradient of the sum, in two dtypes, and this program's share of that of the
    weight, ``dweight`` (programs, d)."""
    c = tl.arange(0, BLOCK_D)
    scale = tl.load(weight + c, mask=c < d, other=0.0).to(tl.float32)
    shares = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles * BLOCK_R
    for i in range(tiles):
        row = first + i * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < n)[:, None] & (c < d)[None, :]
        at = row[:, None] * d + c[None, :]
        value = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / d + eps)
        value *= rstd[:, None]
        shares += grad * value
        grad *= scale[None, :]
        mean = tl.sum(grad * value, axis=1) / d
        out = (grad - value * mean[:, None]) * rstd[:, None]
        if dtotal is not None:
            out += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
        if dadded is not None:
            tl.store(dadded + at, out.to(dadded.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0) * d + c, tl.sum(shares, axis=0), mask=c < d)
