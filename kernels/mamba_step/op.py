"""One token, or a few, through a whole Mamba layer: public functions, registered with ``torch.library``."""

import torch
from torch import Tensor

from seqssm.kernels import dispatch
from seqssm.kernels.dispatch import check_shape
from seqssm.kernels.mamba_step import reference

_AVAILABLE = ("reference", "triton")
_CHUNK_AVAILABLE = ("reference", "numba")


def mamba_step(
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
        norm_weight: (d,). eps: of the norm.
        in_proj: (2e, d). conv_weight: (e, k). x_proj: (r + 2n, e). dt_proj: (e, r). out_proj: (d, e), and their biases.
        A_log: (e, n). D, dt_bias: (e,).
        backend: "reference" or "triton".

    Returns:
        The stream after the layer, (b, d) in x's dtype. There is no gradient.

    Raises:
        ValueError: shapes or devices do not fit, a gradient is asked for, or the backend cannot run here. ImportError:
            its package is missing.
    """
    arguments = (
        x, conv_state, scan_state, norm_weight, eps, in_proj, in_bias, conv_weight, conv_bias,
        x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias,
    )  # fmt: skip
    _check("(b, d)", *arguments)
    chosen = dispatch.choose_backend("mamba_step", backend, x, _AVAILABLE)
    return reference.mamba_step(*arguments) if chosen == "reference" else _step(*arguments)


def mamba_chunk(
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
    *,
    seq_idx: Tensor | None = None,
    backend: str = "numba",
) -> tuple[Tensor, Tensor, Tensor]:
    """A few tokens through a pre-norm Mamba layer on a CPU, ``x + mamba(norm(x))`` (Gu and Dao, 2023, figure 3).

    For packets of live sound, where operators cost more than arithmetic. A row's result does not depend, to the bit,
    on what else is in the batch.

    Args:
        x: the residual stream (b, l, d).
        conv_state, scan_state, norm_weight, eps and the rest: as for :func:`mamba_step`; nothing is written to.
        seq_idx: (b, l) integers; the states reset where the index changes. The first token continues the states.
        backend: "reference" or "numba".

    Returns:
        The stream after the layer (b, l, d) in x's dtype, the convolution's state (b, e, k-1) and the scan's
        (b, e, n). There is no gradient.

    Raises:
        ValueError, ImportError: as :func:`mamba_step`.
    """
    arguments = (
        x, conv_state, scan_state, norm_weight, eps, in_proj, in_bias, conv_weight, conv_bias,
        x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias,
    )  # fmt: skip
    _check("(b, l, d)", *arguments)
    dispatch.check_seq_idx(seq_idx, *x.shape[:2])
    chosen = dispatch.choose_backend("mamba_chunk", backend, x, _CHUNK_AVAILABLE)
    return (reference.mamba_chunk if chosen == "reference" else _chunk)(*arguments, seq_idx)


def _check(
    dims: str,
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
) -> None:
    """Raise unless x has ``dims``, everything else fits it, and no gradient is asked for."""
    weights = (norm_weight, in_proj, in_bias, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    dispatch.check_inference("mamba", x, conv_state, scan_state, *weights, out_bias)
    if x.dim() != dims.count(",") + 1 or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"x must be floating point {dims} and not empty, got {tuple(x.shape)} {x.dtype}")
    b, d, (e, n), k, r = x.shape[0], x.shape[-1], A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    check_shape("norm_weight", norm_weight, (d,), "(d,)")
    check_shape("in_proj", in_proj, (2 * e, d), "(2e, d)")
    check_shape("in_bias", in_bias, (2 * e,), "(2e,)")
    check_shape("conv_weight", conv_weight, (e, k), "(e, k)")
    check_shape("x_proj", x_proj, (r + 2 * n, e), "(r + 2n, e)")
    check_shape("dt_proj", dt_proj, (e, r), "(e, r)")
    for name, vector in (("conv_bias", conv_bias), ("dt_bias", dt_bias), ("D", D)):
        check_shape(name, vector, (e,), "(e,)")
    check_shape("out_proj", out_proj, (d, e), "(d, e)")
    check_shape("out_bias", out_bias, (d,), "(d,)")
    check_shape("conv_state", conv_state, (b, e, k - 1), "(b, e, k-1)")
    check_shape("scan_state", scan_state, (b, e, n), "(b, e, n)")
    dispatch.check_devices(x=x, conv_state=conv_state, scan_state=scan_state, in_proj=in_proj)


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
    return dispatch.load_backend("mamba_step", "triton").step(
        x, conv_state, scan_state, norm_weight, eps, in_proj, in_bias, conv_weight, conv_bias,
        x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias,
    )  # fmt: skip


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
    return dispatch.load_backend("mamba_step", "numba").chunk(
        x, conv_state, scan_state, norm_weight, eps, in_proj, in_bias, conv_weight, conv_bias,
        x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias, seq_idx,
    )  # fmt: skip


def _chunk_fake(x: Tensor, conv_state: Tensor, scan_state: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(conv_state), torch.empty_like(scan_state)


_chunk = dispatch.once_differentiable("mamba_chunk", _chunk_kernel, _chunk_fake)
