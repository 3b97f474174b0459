"""The layer as in the paper, a token at a time: the oracle of the tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.mamba_step.layer import LayerWeights


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    scan_state: Tensor,
    weights: LayerWeights,
) -> Tensor:
    """x + the layer of its norm; computed in float64 for a float64 x and else in float32. Updates both states."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def w(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(wide)

    stream = x.to(wide)
    normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + weights.eps) * weights.norm_weight.to(wide)
    u, z = F.linear(normed, weights.in_proj.to(wide), w(weights.in_bias)).chunk(2, dim=-1)  # (b, e) each
    window = torch.cat([conv_state.to(wide), u.unsqueeze(-1)], dim=-1)  # (b, e, k)
    conv_state.copy_(window[..., 1:])
    u = (window * weights.conv_weight.to(wide)).sum(-1)
    u = F.silu(u if weights.conv_bias is None else u + weights.conv_bias.to(wide))
    n = weights.A_log.shape[1]
    dt, B, C = F.linear(u, weights.x_proj.to(wide)).split([weights.x_proj.shape[0] - 2 * n, n, n], dim=-1)
    step = F.softplus(F.linear(dt, weights.dt_proj.to(wide), weights.dt_bias.to(wide)))  # (b, e)
    decay = torch.exp(step.unsqueeze(-1) * -torch.exp(weights.A_log.to(wide)))  # (b, e, n)
    h = decay * scan_state.to(wide) + (step * u).unsqueeze(-1) * B.unsqueeze(1)
    scan_state.copy_(h)
    y = (h * C.unsqueeze(1)).sum(-1) + weights.D.to(wide) * u
    return (stream + F.linear(y * F.silu(z), weights.out_proj.to(wide), w(weights.out_bias))).to(x.dtype)


def mamba_chunk(
    x: Tensor, conv_state: Tensor, scan_state: Tensor, weights: LayerWeights, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mamba_step` of each token in turn, on states of its own; seq_idx (b, l)."""
    conv_state, scan_state = conv_state.clone(), scan_state.clone()
    out = []
    for t, token in enumerate(x.unbind(1)):
        if t > 0 and seq_idx is not None:
            new = (seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None]
            conv_state, scan_state = conv_state.masked_fill(new, 0), scan_state.masked_fill(new, 0)
        out.append(mamba_step(token, conv_state, scan_state, weights))
    return torch.stack(out, dim=1), conv_state, scan_state
