"""The layer as in the paper, a token at a time: the oracle of the tests."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:
    """x + the layer of its norm; computed in float64 for a float64 x and else in float32. Updates both states."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def w(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(wide)

    stream = x.to(wide)
    normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    u, z = F.linear(normed, in_proj.to(wide), w(in_bias)).chunk(2, dim=-1)  # (b, e) each
    window = torch.cat([conv_state.to(wide), u.unsqueeze(-1)], dim=-1)  # (b, e, k)
    conv_state.copy_(window[..., 1:])
    u = (window * conv_weight.to(wide)).sum(-1)
    u = F.silu(u if conv_bias is None else u + conv_bias.to(wide))
    n = A_log.shape[1]
    dt, B, C = F.linear(u, x_proj.to(wide)).split([x_proj.shape[0] - 2 * n, n, n], dim=-1)
    step = F.softplus(F.linear(dt, dt_proj.to(wide), dt_bias.to(wide)))  # (b, e)
    decay = torch.exp(step.unsqueeze(-1) * -torch.exp(A_log.to(wide)))  # (b, e, n)
    h = decay * scan_state.to(wide) + (step * u).unsqueeze(-1) * B.unsqueeze(1)
    scan_state.copy_(h)
    y = (h * C.unsqueeze(1)).sum(-1) + D.to(wide) * u
    return (stream + F.linear(y * F.silu(z), out_proj.to(wide), w(out_bias))).to(x.dtype)


def mamba_chunk(
    x: Tensor, conv_state: Tensor, scan_state: Tensor, *layer: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mamba_step` of each token in turn, on states of its own; ``layer`` ends with seq_idx (b, l) or None."""
    *weights, seq_idx = layer
    conv_state, scan_state = conv_state.clone(), scan_state.clone()
    out = []
    for t, token in enumerate(x.unbind(1)):
        if t > 0 and isinstance(seq_idx, Tensor):
            new = (seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None]
            conv_state, scan_state = conv_state.masked_fill(new, 0), scan_state.masked_fill(new, 0)
        out.append(mamba_step(token, conv_state, scan_state, *weights))  # type: ignore[arg-type]
    return torch.stack(out, dim=1), conv_state, scan_state
