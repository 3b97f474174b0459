"""One token, or a few, through a whole Mamba layer: public functions, registered with ``torch.library``."""

import torch
from torch import Tensor

from seqssm.kernels import dispatch
from seqssm.kernels.dispatch import check_shape
from seqssm.kernels.mamba_step import reference
from seqssm.kernels.mamba_step.layer import LayerWeights

_AVAILABLE = ("reference", "triton")
_CHUNK_AVAILABLE = ("reference", "numba")


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    scan_state: Tensor,
    weights: LayerWeights,
    *,
    backend: str = "triton",
) -> Tensor:
    """One token through a pre-norm Mamba layer, ``x + mamba(norm(x))`` (Gu and Dao, 2023, figure 3).

    For decoding a sequence or a few: weights are read once for each of them, in the dtype that they are kept in, and
    all arithmetic is float32.

    Args:
        x: the residual stream (b, d); float32, bfloat16 or float16 (float64 for "reference").
        conv_state: (b, e, k-1), the convolution's last inputs. scan_state: (b, e, n) float32.
            Both are updated in place.
        weights: of the layer and its norm.
        backend: "reference" or "triton".

    Returns:
        The stream after the layer, (b, d) in x's dtype. There is no gradient.

    Raises:
        ValueError: shapes or devices do not fit, a gradient is asked for, or the backend cannot run here. ImportError:
            its package is missing.
    """
    _check("(b, d)", x, conv_state, scan_state, weights)
    if dispatch.choose_backend("mamba_step", backend, x, _AVAILABLE) == "reference":
        return reference.mamba_step(x, conv_state, scan_state, weights)
    return _step(x, conv_state, scan_state, *weights)


def mamba_chunk(
    x: Tensor,
    conv_state: Tensor,
    scan_state: Tensor,
    weights: LayerWeights,
    *,
    seq_idx: Tensor | None = None,
    backend: str = "numba",
) -> tuple[Tensor, Tensor, Tensor]:
    """A few tokens through a pre-norm Mamba layer on a CPU, ``x + mamba(norm(x))`` (Gu and Dao, 2023, figure 3).

    For packets of live sound, where operators cost more than arithmetic. A row's result does not depend, to the bit,
    on what else is in the batch.

    Args:
        x: the residual stream (b, l, d).
        conv_state, scan_state, weights: as for :func:`mamba_step`; nothing is written to.
        seq_idx: (b, l) integers; the states reset where the index changes. The first token continues the states.
        backend: "reference" or "numba".

    Returns:
        The stream after the layer (b, l, d) in x's dtype, the convolution's state (b, e, k-1) and the scan's
        (b, e, n). There is no gradient.

    Raises:
        ValueError, ImportError: as :func:`mamba_step`.
    """
    _check("(b, l, d)", x, conv_state, scan_state, weights)
    dispatch.check_seq_idx(seq_idx, *x.shape[:2])
    if dispatch.choose_backend("mamba_chunk", backend, x, _CHUNK_AVAILABLE) == "reference":
        return reference.mamba_chunk(x, conv_state, scan_state, weights, seq_idx)
    return _chunk(x, conv_state, scan_state, *weights, seq_idx)


def _check(
    dims: str,
    x: Tensor,
    conv_state: Tensor,
    scan_state: Tensor,
    weights: LayerWeights,
) -> None:
    """Raise unless x has ``dims``, everything else fits it, and no gradient is asked for."""
    w = weights
    dispatch.check_inference("mamba", x, conv_state, scan_state, *[t for t in w if isinstance(t, Tensor)])
    if x.dim() != dims.count(",") + 1 or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"x must be floating point {dims} and not empty, got {tuple(x.shape)} {x.dtype}")
    b, d, (e, n), k, r = x.shape[0], x.shape[-1], w.A_log.shape, w.conv_weight.shape[1], w.dt_proj.shape[1]
    check_shape("norm_weight", w.norm_weight, (d,), "(d,)")
    check_shape("in_proj", w.in_proj, (2 * e, d), "(2e, d)")
    check_shape("in_bias", w.in_bias, (2 * e,), "(2e,)")
    check_shape("conv_weight", w.conv_weight, (e, k), "(e, k)")
    check_shape("x_proj", w.x_proj, (r + 2 * n, e), "(r + 2n, e)")
    check_shape("dt_proj", w.dt_proj, (e, r), "(e, r)")
    for name, vector in (("conv_bias", w.conv_bias), ("dt_bias", w.dt_bias), ("D", w.D)):
        check_shape(name, vector, (e,), "(e,)")
    check_shape("out_proj", w.out_proj, (d, e), "(d, e)")
    check_shape("out_bias", w.out_bias, (d,), "(d,)")
    check_shape("conv_state", conv_state, (b, e, k - 1), "(b, e, k-1)")
    check_shape("scan_state", scan_state, (b, e, n), "(b, e, n)")
    dispatch.check_devices(x=x, conv_state=conv_state, scan_state=scan_state, in_proj=w.in_proj)


def _step_kernel(
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
    weights = LayerWeights(
        norm_weight, eps, in_proj, in_bias, conv_weight, conv_bias,
        x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias,
    )  # fmt: skip
    return dispatch.load_backend("mamba_step", "triton").step(x, conv_state, scan_state, weights)


def _step_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_step = dispatch.define_operator("mamba_step", _step_kernel, _step_fake, mutates_args=("conv_state", "scan_state"))


def _chunk_kernel(
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
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = LayerWeights(
        norm_weight, eps, in_proj, in_bias, conv_weight, conv_bias,
        x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias,
    )  # fmt: skip
    return dispatch.load_backend("mamba_step", "numba").chunk(x, conv_state, scan_state, weights, seq_idx)


def _chunk_fake(x: Tensor, conv_state: Tensor, scan_state: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(conv_state), torch.empty_like(scan_state)


_chunk = dispatch.once_differentiable("mamba_chunk", _chunk_kernel, _chunk_fake)
