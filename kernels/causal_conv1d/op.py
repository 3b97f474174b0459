"""The public causal convolution: checks arguments, picks the backend, registered with ``torch.library``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels import dispatch
from seqssm.kernels.causal_conv1d import reference
from seqssm.kernels.dispatch import check, check_shape

_AVAILABLE = tuple(name for name in dispatch.BACKENDS if dispatch.has_backend("causal_conv1d", name))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, ``y_t = act(bias + sum_j weight_j x_{t-k+1+j})``, channel-last.

    Args:
        x: input (b, l, d), any strides; float64, float32, bfloat16 or float16.
        weight: (d, k). bias: (d,).
        activation: "silu" or None.
        initial_state: (b, d, k-1), the tokens before the first one in scan order, oldest first; zeros when None.
        seq_idx: (b, l) integers; tokens before a change of the index count as zero (packed sequences). The first token
            always continues from ``initial_state``.
        reverse: run from the last token to the first: equals flip, convolution, flip. A sequence gives one direction
            for each of as many equal parts of the channels.
        backend: "auto", "reference", "torch", "numba" or "triton".

    Returns:
        y (b, l, d) and the final state (b, d, k-1), both in x's dtype: the last k-1 tokens in scan order, with zeros
        for those that a change of ``seq_idx`` hides, so that it continues exactly as ``initial_state`` of the next
        call. Gradients flow to every floating input and from both results.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot run here. ImportError: its package is
            missing.
    """
    silu = _is_silu(activation)
    _check_arguments("b, l", x, weight, bias, initial_state, seq_idx)
    direction = dispatch.directions(reverse)
    check(
        x.shape[2] % len(direction) == 0, f"{x.shape[2]} channels do not split evenly into {len(direction)} directions"
    )
    chosen = dispatch.choose_backend("causal_conv1d", backend, x, _AVAILABLE)
    if chosen == "reference":
        return reference.causal_conv1d(x, weight, bias, silu, initial_state, seq_idx, direction)
    return _forward(x, weight, bias, silu, initial_state, seq_idx, direction, chosen)


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """One token of ``causal_conv1d``: shifts ``state`` (b, d, k-1) in place and returns y (b, d) in x's dtype.

    x (b, d); weight (d, k); bias (d,). For inference: it has no gradient and raises ValueError when one is asked for,
    and as ``causal_conv1d`` does.
    """
    silu = _is_silu(activation)
    dispatch.check_inference("causal_conv1d", state, x, weight, bias)
    _check_arguments("b", x, weight, bias, state, None)
    chosen = dispatch.choose_backend("causal_conv1d", backend, x, _AVAILABLE)
    if chosen not in ("reference", "torch"):
        return _step(state, x, weight, bias, silu, chosen)
    dtype = dispatch.state_dtype(x.dtype)
    window = torch.cat([state.to(dtype), x.to(dtype).unsqueeze(-1)], dim=-1)  # (b, d, k)
    y = (window * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    state.copy_(window[..., 1:])
    return (F.silu(y) if silu else y).to(x.dtype)


def _is_silu(activation: str | None) -> bool:
    check(activation in ("silu", None), f"activation must be 'silu' or None, got {activation!r}")
    return activation == "silu"


def _check_arguments(
    tokens: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Raise ValueError unless everything fits; ``tokens`` are the dimensions before the channels."""
    dims = tokens.count(",") + 2
    if x.dim() != dims or not x.is_floating_point():
        raise ValueError(f"x must be floating point ({tokens}, d), got {tuple(x.shape)} {x.dtype}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must have shape (d, k), got {tuple(weight.shape)}")
    *lead, d = x.shape
    if 0 in x.shape:
        raise ValueError(f"no dimension of x may be empty, got {tuple(x.shape)}")
    k = weight.shape[1]
    check_shape("weight", weight, (d, k), "(d, k)")
    check_shape("bias", bias, (d,), "(d,)")
    check_shape("the state", state, (lead[0], d, k - 1), "(b, d, k-1)")
    if seq_idx is not None:
        dispatch.check_seq_idx(seq_idx, *lead)
    dispatch.check_devices(x=x, weight=weight, bias=bias, state=state, seq_idx=seq_idx)


def _forward_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = dispatch.load_backend("causal_conv1d", backend)
    return module.forward(x, weight, bias, activation, initial_state, seq_idx, tuple(reverse))


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    b, l, d = x.shape
    return x.new_empty(b, l, d), x.new_empty(b, d, weight.shape[1] - 1)


def _backward_kernel(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = dispatch.load_backend("causal_conv1d", backend)
    gradients = module.backward(dy, dfinal_state, x, weight, bias, activation, initial_state, seq_idx, tuple(reverse))
    inputs = (x, weight, bias, initial_state)
    return dispatch.gradients_like(inputs, gradients)  # type: ignore[return-value]  # a schema spells them out


def _backward_fake(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if i is None else i.new_empty(i.shape) for i in (x, weight, bias, initial_state))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.activation, initial_state, seq_idx, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, seq_idx)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state):  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, seq_idx = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias, dinitial_state = _backward(
        dy, dfinal_state, x, weight, bias, ctx.activation, initial_state, seq_idx, ctx.reverse, ctx.backend
    )
    dbias = None if bias is None else dbias
    dinitial_state = None if initial_state is None else dinitial_state
    return dx, dweight, dbias, None, dinitial_state, None, None, None


_forward = dispatch.differentiable("causal_conv1d", _forward_kernel, _forward_fake, _setup_context, _autograd)
_backward = dispatch.once_differentiable("causal_conv1d_backward", _backward_kernel, _backward_fake)


def _step_kernel(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, backend: str
) -> Tensor:
    module = dispatch.load_backend("causal_conv1d", backend)
    return module.step(state, x, weight, bias, activation)


def _step_fake(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape)


_step = dispatch.define_operator("causal_conv1d_step", _step_kernel, _step_fake, mutates_args=("state",))
