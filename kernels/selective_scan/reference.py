"""The selective scan as in Gu and Dao, "Mamba" (2023), equations 2a, 2b and 4: one token after another, the oracle."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.dispatch import state_dtype


def _flip_groups(x: Tensor, reverse: Sequence[bool]) -> Tensor:
    """(b, l, g, ...) with time turned round in the groups that run backwards."""
    return torch.stack([x[:, :, i].flip(1) if r else x[:, :, i] for i, r in enumerate(reverse)], dim=2)


def selective_scan(
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
) -> tuple[Tensor, Tensor]:
    """``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = (C_t h_t + D u_t) silu(z_t)``.

    u, delta, z (b, l, d); A (d, n); B, C (b, l, g, n); D, delta_bias (d,); initial_state (b, d, n); seq_idx (b, l);
    ``reverse`` has one bool a group. Returns y (b, l, d) in u's dtype and the final state (b, d, n). Computes in
    float64 for float64 u, else in float32. Plain autograd differentiates it.
    """
    b, l, d = u.shape
    g, n = B.shape[2:]
    dtype = state_dtype(u.dtype)
    grouped = [x.to(dtype).unflatten(-1, (g, d // g)) for x in (u, delta)]
    if delta_bias is not None:
        grouped[1] = grouped[1] + delta_bias.to(dtype).view(g, d // g)
    if delta_softplus:
        grouped[1] = F.softplus(grouped[1])
    us, deltas, Bs, Cs = (_flip_groups(x.to(dtype), reverse) for x in (*grouped, B, C))
    A = A.to(dtype).view(g, d // g, n)
    h = u.new_zeros(b, g, d // g, n, dtype=dtype)
    if initial_state is not None:
        h = initial_state.to(dtype).view(b, g, d // g, n)
    idx = None if seq_idx is None else _flip_groups(seq_idx.unsqueeze(2).expand(b, l, g), reverse)
    ys = []
    for t in range(l):
        if idx is not None and t > 0:
            h = torch.where((idx[:, t] == idx[:, t - 1]).view(b, g, 1, 1), h, 0)
        delta_t, B_t = deltas[:, t, :, :, None], Bs[:, t, :, None]  # (b, g, d/g, 1), (b, g, 1, n)
        h = torch.exp(delta_t * A) * h + delta_t * B_t * us[:, t, :, :, None]
        ys.append((h * Cs[:, t, :, None]).sum(-1))
    y = _flip_groups(torch.stack(ys, dim=1), reverse).reshape(b, l, d)
    if D is not None:
        y = y + u.to(dtype) * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h.reshape(b, d, n)
