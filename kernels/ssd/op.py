"""The public SSD scan: checks arguments, picks the backend, registered with ``torch.library``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels import dispatch
from seqssm.kernels.dispatch import check, check_shape
from seqssm.kernels.ssd import reference

# Its work is matrix products, which BLAS does best: there is no compiled CPU backend.
_AVAILABLE = tuple(name for name in dispatch.BACKENDS if dispatch.has_backend("ssd", name))


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """State-space duality scan of Mamba-2 (Dao and Gu, 2024, section 6, with the gate of its block).

    With ``step = dt + dt_bias``, passed through softplus when ``dt_softplus``, and for every head a matrix state::

        S_t = exp(step_t A) S_{t-1} + step_t x_t B_t^T        y_t = (S_t C_t + D x_t) silu(z_t)

    Args:
        x: input (b, l, h, p). z: gate of the same shape. Any strides; float64, float32, bfloat16, float16.
        dt: step size (b, l, h). A: (h,), negative for a stable scan. dt_bias: (h,).
        B, C: (b, l, g, n) for g groups that share the heads evenly. D: (h,) or (h, p).
        initial_state: (b, h, p, n), the state that enters at the first token; zero when None.
        seq_idx: (b, l) integers; the state is zeroed where the index changes (packed sequences). The first token
            always continues from ``initial_state``.
        reverse: run from the last token to the first: equals flip, scan, flip, and ``initial_state`` then enters at the
            last token. A sequence gives one direction a group.
        chunk: tokens that are treated as one matrix; the backend's choice when None. It changes speed, not the result.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y (b, l, h, p) in x's dtype, and the final state (b, h, p, n), float32 (float64 for float64 x). Gradients flow
        to every floating input and from both results.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot run here. ImportError: its package is
            missing.
    """
    direction = _check_arguments(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, reverse)
    check(chunk is None or chunk > 0, f"chunk must be a positive number of tokens, got {chunk}")
    chosen = dispatch.choose_backend("ssd", backend, x, _AVAILABLE)
    if chosen == "reference":
        return reference.ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, direction)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save_states = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    y, final_state, _ = _forward(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, direction, chunk, save_states, chosen
    )
    return y, final_state


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One token of ``ssd``: updates ``state`` (b, h, p, n) in place and returns y (b, h, p) in x's dtype.

    x, z (b, h, p); dt (b, h); A, dt_bias (h,); B, C (b, g, n); D (h,) or (h, p). For inference: it has no gradient and
    raises ValueError when one is asked for, and as ``ssd`` does.
    """
    dispatch.check_inference("ssd", state, x, dt, A, B, C, D, z, dt_bias)
    check(x.dim() == 3, f"x must have shape (b, h, p), got {tuple(x.shape)}")
    check(state.dtype == dispatch.state_dtype(x.dtype), f"state must be {dispatch.state_dtype(x.dtype)}")
    x1, dt1, B1, C1 = (v.unsqueeze(1) for v in (x, dt, B, C))
    z1 = None if z is None else z.unsqueeze(1)
    _check_arguments(x1, dt1, A, B1, C1, D, z1, dt_bias, state, None, False)
    chosen = dispatch.choose_backend("ssd", backend, x, _AVAILABLE)
    if chosen == "triton":
        return _triton_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return _torch_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _check_arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: bool | Sequence[bool],
) -> tuple[bool, ...]:
    """Raise ValueError unless everything fits; returns one direction a group."""
    check(
        x.dim() == 4 and x.is_floating_point(),
        f"x must be floating point (b, l, h, p), got {tuple(x.shape)} {x.dtype}",
    )
    check(B.dim() == 4, f"B must have shape (b, l, g, n), got {tuple(B.shape)}")
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    check(min(b, l, h, p, g, n) > 0, f"no dimension may be empty: x {tuple(x.shape)}, B {tuple(B.shape)}")
    check(h % g == 0, f"the heads ({h}) must split evenly among the groups of B and C ({g})")
    check_shape("dt", dt, (b, l, h), "(b, l, h)")
    check_shape("A", A, (h,), "(h,)")
    check_shape("B", B, (b, l, g, n), "(b, l, g, n)")
    check_shape("C", C, (b, l, g, n), "(b, l, g, n)")
    if D is not None:
        if D.dim() == 2:
            check_shape("D", D, (h, p), "(h, p)")
        else:
            check_shape("D", D, (h,), "(h,) or (h, p), with (h,)")
    if z is not None:
        check_shape("z", z, (b, l, h, p), "(b, l, h, p)")
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (h,), "(h,)")
    if initial_state is not None:
        check_shape("initial_state", initial_state, (b, h, p, n), "(b, h, p, n)")
    dispatch.check_seq_idx(seq_idx, b, l)
    dispatch.check_devices(
        x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state, seq_idx=seq_idx
    )
    return dispatch.directions(reverse, g)


def _forward_kernel(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: Sequence[bool],
    chunk: int | None,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = dispatch.load_backend("ssd", backend)
    return module.forward(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, tuple(reverse), chunk, save_states
    )


def _forward_fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: Sequence[bool],
    chunk: int | None,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, h, p = x.shape
    final_state = x.new_empty(b, h, p, B.shape[3], dtype=dispatch.state_dtype(x.dtype))
    states = (
        dispatch.load_backend("ssd", backend).empty_states(x, B, chunk) if save_states else final_state.new_empty(0)
    )
    return x.new_empty(x.shape), final_state, states


def _backward_kernel(
    dy: Tensor,
    dfinal_state: Tensor | None,
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: Sequence[bool],
    chunk: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = dispatch.load_backend("ssd", backend)
    optional = (initial_state, seq_idx, tuple(reverse), chunk)
    gradients = module.backward(dy, dfinal_state, states, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *optional)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return dispatch.gradients_like(inputs, gradients)  # type: ignore[return-value]  # a schema spells them out


def _backward_fake(
    dy: Tensor,
    dfinal_state: Tensor | None,
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: Sequence[bool],
    chunk: int | None,
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(x.new_empty(0) if v is None else v.new_empty(v.shape) for v in inputs)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, reverse, chunk, _, backend = inputs
    ctx.save_for_backward(output[2], x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    ctx.dt_softplus, ctx.reverse, ctx.chunk, ctx.backend = dt_softplus, reverse, chunk, backend
    ctx.set_materialize_grads(False)  # the saved states take no gradient: do not fill one with zeros


def _autograd(ctx, dy, dfinal_state, _):  # type: ignore[no-untyped-def]
    states, x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    optional = (initial_state, seq_idx, ctx.reverse, ctx.chunk, ctx.backend)
    dx, ddt, dA, dB, dC, *gradients = _backward(
        dy, dfinal_state, states, x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, *optional
    )
    dD, dz, ddt_bias, dinitial_state = (
        None if v is None else gradient for v, gradient in zip((D, z, dt_bias, initial_state), gradients, strict=True)
    )
    return dx, ddt, dA, dB, dC, dD, dz, ddt_bias, None, dinitial_state, None, None, None, None, None


_forward = dispatch.differentiable("ssd", _forward_kernel, _forward_fake, _setup_context, _autograd)
_backward = dispatch.once_differentiable("ssd_backward", _backward_kernel, _backward_fake)


def _torch_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    # Products and sums rather than matmul: autocast and TF32 leave them alone, and one token is bound by memory.
    h, g = x.shape[1], B.shape[1]
    dtype = state.dtype
    step = dt.to(dtype)  # (b, h)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    Bh, Ch = (v.to(dtype).repeat_interleave(h // g, dim=1).unsqueeze(2) for v in (B, C))  # (b, h, 1, n)
    xs = x.to(dtype)
    state.mul_(torch.exp(step * A.to(dtype))[..., None, None])
    state.addcmul_((step.unsqueeze(-1) * xs).unsqueeze(-1), Bh)
    y = (state * Ch).sum(-1)  # (b, h, p)
    if D is not None:
        y = torch.addcmul(y, xs, D.to(dtype).view(h, -1))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


def _step_kernel(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    return dispatch.load_backend("ssd", "triton").step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _step_fake(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    return x.new_empty(x.shape)


_triton_step = dispatch.define_operator("ssd_step", _step_kernel, _step_fake, mutates_args=("state",))
