"""The public fused norm: checks arguments, picks the backend, registered with ``torch.library``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels import dispatch
from seqssm.kernels.dispatch import check_shape
from seqssm.kernels.rms_norm import reference

_AVAILABLE = ("reference", "torch", "triton")


def add_rms_norm(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``total = x + added`` and ``total / rms(total) * weight`` over the last dimension (Zhang and Sennrich, 2019).

    Args:
        x: the residual stream (..., d); float64, float32, bfloat16 or float16.
        added: what joins it, of x's shape and any of these dtypes; None for x alone.
        weight: (d,).
        eps: added to the mean square.
        dtype: of the norm; the weight's when None.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        total (..., d) in x's dtype, which is x itself without ``added``, and the norm (..., d) in ``dtype``. The sum
        and the statistics are taken in float32 (float64 for float64). Gradients flow to every tensor.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot run here. ImportError: its package is
            missing.
    """
    if x.dim() == 0 or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"x must be floating point (..., d) and not empty, got {tuple(x.shape)} {x.dtype}")
    check_shape("added", added, x.shape, "(..., d)")
    check_shape("weight", weight, x.shape[-1:], "(d,)")
    dispatch.check_devices(x=x, added=added, weight=weight)
    dtype = dtype or weight.dtype
    chosen = dispatch.choose_backend("rms_norm", backend, x, _AVAILABLE)
    if chosen == "reference":
        return reference.add_rms_norm(x, added, weight, eps, dtype)
    if chosen == "torch":
        total = x if added is None else (x + added).to(x.dtype)
        y = F.rms_norm(total.to(weight.dtype), weight.shape, weight, eps)
        return total, y.to(dtype)
    y, total = _forward(x, added, weight, eps, dtype)
    return (x if added is None else total), y


def _forward_kernel(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, total = dispatch.load_backend("rms_norm", "triton").forward(x, added, weight, eps, dtype)
    # A custom operator returns tensors only, and none of its inputs: an absent sum is an empty one.
    return y, x.new_empty(0) if total is None else total


def _forward_fake(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(0) if added is None else x.new_empty(x.shape)


def _backward_kernel(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float, added_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    module = dispatch.load_backend("rms_norm", "triton")
    dx, dadded, dweight = module.backward(dy, dtotal, total, weight, eps, added_dtype)
    return dx, dx.new_empty(0) if dadded is None else dadded, dweight


def _backward_fake(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float, added_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    own = added_dtype is not None and added_dtype != total.dtype
    dadded = total.new_empty(total.shape, dtype=added_dtype) if own else total.new_empty(0)
    return total.new_empty(total.shape), dadded, weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, added, weight, ctx.eps, _ = inputs
    ctx.added_dtype = None if added is None else added.dtype
    ctx.save_for_backward(x if added is None else output[1], weight)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dtotal):  # type: ignore[no-untyped-def]
    total, weight = ctx.saved_tensors
    if ctx.added_dtype is None:
        dtotal = None  # of the empty tensor
    if dy is None:
        if dtotal is None:
            return None, None, None, None, None
        return dtotal, dtotal.to(ctx.added_dtype), None, None, None
    dx, dadded, dweight = _backward(dy, dtotal, total, weight, ctx.eps, ctx.added_dtype)
    if ctx.added_dtype is None:
        dadded = None
    elif ctx.added_dtype == total.dtype:
        dadded = dx  # the gradient of a sum is that of both its terms
    return dx, dadded, dweight, None, None


_forward = dispatch.differentiable("add_rms_norm", _forward_kernel, _forward_fake, _setup_context, _autograd)
_backward = dispatch.once_differentiable("add_rms_norm_backward", _backward_kernel, _backward_fake)
