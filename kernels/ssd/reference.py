"""State-space duality as in Dao and Gu, "Transformers are SSMs" (2024), section 3: token by token, the oracle."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.dispatch import state_dtype


def _flip_groups(x: Tensor, reverse: Sequence[bool]) -> Tensor:
    """(b, l, g, ...) with time turned round in the groups that run backwards."""
    return torch.stack([x[:, :, i].flip(1) if r else x[:, :, i] for i, r in enumerate(reverse)], dim=2)


def ssd(
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
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T``, ``y_t = (S_t C_t + D x_t) silu(z_t)``, a head at a time.

    x, z (b, l, h, p); dt (b, l, h); A, dt_bias (h,); B, C (b, l, g, n); D (h,) or (h, p); initial_state (b, h, p, n);
    seq_idx (b, l); ``reverse`` has one bool a group. Returns y (b, l, h, p) in x's dtype and the final state
    (b, h, p, n). Computes in float64 for float64 x, else in float32. Plain autograd differentiates it.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    dtype = state_dtype(x.dtype)
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    grouped = (v.unflatten(2, (g, h // g)) for v in (x.to(dtype), step))  # (b, l, g, h/g, ...)
    xs, steps, Bs, Cs = (_flip_groups(v, reverse) for v in (*grouped, B.to(dtype), C.to(dtype)))
    A = A.to(dtype).view(g, h // g)
    S = x.new_zeros(b, g, h // g, p, n, dtype=dtype)
    if initial_state is not None:
        S = initial_state.to(dtype).view(b, g, h // g, p, n)
    idx = None if seq_idx is None else _flip_groups(seq_idx.unsqueeze(2).expand(b, l, g), reverse)
    ys = []
    for t in range(l):
        if idx is not None and t > 0:
            S = torch.where((idx[:, t] == idx[:, t - 1]).view(b, g, 1, 1, 1), S, 0)
        decay = torch.exp(steps[:, t] * A)[..., None, None]  # (b, g, h/g, 1, 1)
        drive = (steps[:, t, :, :, None] * xs[:, t])[..., None]  # (b, g, h/g, p, 1)
        S = decay * S + drive * Bs[:, t, :, None, None]
        ys.append((S * Cs[:, t, :, None, None]).sum(-1))
    y = _flip_groups(torch.stack(ys, dim=1), reverse).reshape(b, l, h, p)
    if D is not None:
        y = y + x.to(dtype) * D.to(dtype).view(h, -1)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), S.reshape(b, h, p, n)
