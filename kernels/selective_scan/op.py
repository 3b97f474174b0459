"""The public selective scan: checks arguments, picks the backend, registered with ``torch.library``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels import dispatch
from seqssm.kernels.dispatch import check_shape
from seqssm.kernels.selective_scan import reference

# Backends keep the state that enters every CHUNK tokens, in scan order, for the backward pass.
CHUNK = 256
_AVAILABLE = tuple(name for name in dispatch.BACKENDS if dispatch.has_backend("selective_scan", name))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Selective state-space scan of Mamba (Gu and Dao, 2023, equations 2a, 2b and 4, with the gate of its block).

    With ``dt = delta + delta_bias``, passed through softplus when ``delta_softplus``::

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = (C_t h_t + D u_t) silu(z_t)

    Args:
        u: input (b, l, d). delta, z: step size and gate (b, l, d). Any strides; float64, float32, bfloat16, float16.
        A: (d, n), negative for a stable scan. B, C: (b, l, n), or (b, l, g, n) for g groups that share the channels
            evenly. D, delta_bias: (d,).
        initial_state: (b, d, n), the state that enters at the first token; zero when None.
        seq_idx: (b, l) integers; the state is zeroed where the index changes (packed sequences). The first token
            always continues from ``initial_state``.
        reverse: run from the last token to the first: equals flip, scan, flip, and ``initial_state`` then enters at the
            last token. A sequence gives one direction a group.
        backend: "auto", "reference", "torch", "numba" or "triton".

    Returns:
        y (b, l, d) in u's dtype, and the final state (b, d, n), float32 (float64 for float64 u). Gradients flow to
        every floating input and from both results.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot run here. ImportError: its package is
            missing.
    """
    B, C = (x.unsqueeze(2) if x.dim() == 3 else x for x in (B, C))
    _check_arguments("b, l", u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    direction = dispatch.directions(reverse, B.shape[2])
    chosen = dispatch.choose_backend("selective_scan", backend, u, _AVAILABLE)
    if chosen == "reference":
        return reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, direction
        )
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    save_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, final_state, _ = _forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, direction, save_states, chosen
    )
    return y, final_state


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One token of ``selective_scan``: updates ``state`` (b, d, n) in place and returns y (b, d) in u's dtype.

    u, delta, z (b, d); A (d, n); B, C (b, n) or (b, g, n); D, delta_bias (d,). For inference: it has no gradient and
    raises ValueError when one is asked for, and as ``selective_scan`` does.
    """
    B, C = (x.unsqueeze(1) if x.dim() == 2 else x for x in (B, C))
    dispatch.check_inference("selective_scan", state, u, delta, A, B, C, D, z, delta_bias)
    _check_arguments("b", u, delta, A, B, C, D, z, delta_bias, state, None)
    chosen = dispatch.choose_backend("selective_scan", backend, u, _AVAILABLE)
    if chosen in ("reference", "torch"):
        return _torch_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, chosen)


def _check_arguments(
    tokens: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Raise ValueError unless everything fits; ``tokens`` are the dimensions before the channels."""
    dims = tokens.count(",") + 2
    if u.dim() != dims or not u.is_floating_point():
        raise ValueError(f"u must be floating point ({tokens}, d), got {tuple(u.shape)} {u.dtype}")
    if A.dim() != 2:
        raise ValueError(f"A must have shape (d, n), got {tuple(A.shape)}")
    if B.dim() != dims + 1:
        raise ValueError(f"B must have shape ({tokens}, n) or (.., g, n), got {tuple(B.shape)}")
    *lead, d = u.shape
    g, n = B.shape[-2], A.shape[1]
    if 0 in (*lead, d, n, g):
        raise ValueError(f"no dimension may be empty: u {tuple(u.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}")
    if d % g != 0:
        raise ValueError(f"the channels ({d}) must split evenly among the groups of B and C ({g})")
    check_shape("delta", delta, u.shape, f"({tokens}, d)")
    check_shape("A", A, (d, n), "(d, n)")
    check_shape("B", B, (*lead, g, n), f"({tokens}, g, n)")
    check_shape("C", C, (*lead, g, n), f"({tokens}, g, n)")
    check_shape("D", D, (d,), "(d,)")
    check_shape("z", z, u.shape, f"({tokens}, d)")
    check_shape("delta_bias", delta_bias, (d,), "(d,)")
    check_shape("the state", state, (lead[0], d, n), "(b, d, n)")
    if seq_idx is not None:
        dispatch.check_seq_idx(seq_idx, *lead)
    dispatch.check_devices(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, state=state, seq_idx=seq_idx
    )


def _forward_kernel(
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
    reverse: Sequence[bool],
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = dispatch.load_backend("selective_scan", backend)
    return module.forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, tuple(reverse), save_states
    )


def _forward_fake(
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
    reverse: Sequence[bool],
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    b, l, d = u.shape
    n = A.shape[1]
    dtype = dispatch.state_dtype(u.dtype)
    states_shape = (b, (l + CHUNK - 1) // CHUNK, d, n) if save_states else (0,)
    return u.new_empty(b, l, d), u.new_empty(b, d, n, dtype=dtype), u.new_empty(states_shape, dtype=dtype)


def _backward_kernel(
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
    reverse: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = dispatch.load_backend("selective_scan", backend)
    gradients = module.backward(
        dy,
        dfinal_state,
        states,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        initial_state,
        seq_idx,
        tuple(reverse),
    )
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return dispatch.gradients_like(inputs, gradients)  # type: ignore[return-value]  # a schema spells them out


def _backward_fake(
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
    reverse: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, reverse, _, backend = inputs
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx = tensors
    ctx.save_for_backward(output[2], u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    ctx.delta_softplus, ctx.reverse, ctx.backend = delta_softplus, reverse, backend
    ctx.set_materialize_grads(False)  # the saved states take no gradient: do not fill one with zeros


def _autograd(ctx, dy, dfinal_state, _):  # type: ignore[no-untyped-def]
    states, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(u)
    if dfinal_state is None:
        dfinal_state = u.new_zeros(u.shape[0], *A.shape, dtype=dispatch.state_dtype(u.dtype))
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = _backward(
        dy,
        dfinal_state,
        states,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        ctx.delta_softplus,
        initial_state,
        seq_idx,
        ctx.reverse,
        ctx.backend,
    )
    dD, dz, ddelta_bias, dinitial_state = (
        None if x is None else gradient
        for x, gradient in ((D, dD), (z, dz), (delta_bias, ddelta_bias), (initial_state, dinitial_state))
    )
    return du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, None, dinitial_state, None, None, None, None


_forward = dispatch.differentiable("selective_scan", _forward_kernel, _forward_fake, _setup_context, _autograd)
_backward = dispatch.once_differentiable("selective_scan_backward", _backward_kernel, _backward_fake)


def _torch_step(
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
    dtype = dispatch.state_dtype(u.dtype)
    g = B.shape[1]
    us, step = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    decay = torch.exp(step.unsqueeze(-1) * A.to(dtype))  # (b, d, n)
    drive = (step * us).unflatten(1, (g, -1)).unsqueeze(-1) * B.to(dtype).unsqueeze(2)  # (b, g, d/g, n)
    state.mul_(decay).add_(drive.flatten(1, 2))
    # Product and sum rather than matmul: autocast and TF32 leave them alone.
    y = (state.to(dtype).unflatten(1, (g, -1)) * C.to(dtype).unsqueeze(2)).sum(-1).flatten(1)  # (b, d)
    if D is not None:
        y = torch.addcmul(y, us, D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def _step_kernel(
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
    backend: str,
) -> Tensor:
    module = dispatch.load_backend("selective_scan", backend)
    return module.step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _step_fake(
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
    backend: str,
) -> Tensor:
    return u.new_empty(u.shape)


_step = dispatch.define_operator("selective_scan_step", _step_kernel, _step_fake, mutates_args=("state",))
