"""Mamba-2's fused input projection and its convolution as one function of autograd, on a GPU.

The projection's parts go different ways: the gate and the step sizes into the scan, x, B and C through the convolution.
Step by step, their gradients are put together in two copies as large as the projection, and its width, with one column
a head, is one for which a GPU has only slow matrix products and no wide loads. Here the width is padded, the
convolution writes the gradient of each part in its place, and the products add up what the parts give to the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.kernels import dispatch

# Rows of a projection come in multiples of so many: then rows of its output are aligned for wide loads.
_MULTIPLE = 16


def available(backend: str, x: Tensor) -> bool:
    """Whether :func:`run` takes x: it is made for the Triton kernels, and the compiler would not see through it."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    return dispatch.choose_backend("causal_conv1d", backend, x) == "triton"


def run(
    x: Tensor,
    projection: nn.Linear,
    convolution: nn.Conv1d,
    gate: int,
    parts: Sequence[int],
    state: Tensor | None,
    seq_idx: Tensor | None,
    reverse: bool,
    backend: str = "triton",
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    """Project x (b, l, d) and run the middle of the result through the convolution and SiLU.

    Args:
        gate: columns before those of the convolution; the ones behind them are the step sizes.
        parts: sizes into which the convolution's output falls.
        state: of the convolution, as ``causal_conv1d`` takes it.
        backend: of the convolution.

    Returns:
        The gate (b, l, gate), the parts (b, l, size), the step sizes (b, l, h) and the convolution's final state.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    z, *split, dt, final_state = _ConvolvedProjection.apply(
        x, state, projection.weight, projection.bias, convolution.weight, convolution.bias,
        seq_idx, gate, tuple(parts), reverse, backend, dtype,
    )  # fmt: skip
    return z, tuple(split), dt, final_state


class _ConvolvedProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, state, weight, bias, taps, offset, seq_idx, gate, parts, reverse, backend, dtype):  # type: ignore[no-untyped-def]
        ctx.gate, ctx.parts, ctx.reverse, ctx.backend, ctx.dtype = gate, parts, reverse, backend, dtype
        pad = -weight.shape[0] % _MULTIPLE
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            padded = F.pad(weight.to(dtype), (0, 0, 0, pad))
            projected = F.linear(x, padded, None if bias is None else F.pad(bias.to(dtype), (0, pad)))
            end = gate + sum(parts)
            conv = dispatch.load_backend("causal_conv1d", backend)
            mixed, final_state = conv.forward(
                projected[..., gate:end], taps.squeeze(1), offset, True, state, seq_idx, (reverse,)
            )
        ctx.save_for_backward(x, projected, state, weight, bias, taps, offset, seq_idx)
        ctx.set_materialize_grads(False)
        return projected[..., :gate], *mixed.split(parts, dim=-1), projected[..., end : weight.shape[0]], final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz, *gradients):  # type: ignore[no-untyped-def]
        *dparts, ddt, dfinal_state = gradients
        x, projected, state, weight, bias, taps, offset, seq_idx = ctx.saved_tensors
        conv = dispatch.load_backend("causal_conv1d", ctx.backend)
        gate, end, rows = ctx.gate, ctx.gate + sum(ctx.parts), weight.shape[0]
        b, l, d = x.shape
        with torch.autocast(x.device.type, enabled=False):
            if dfinal_state is None:
                dfinal_state = x.new_zeros(b, end - gate, taps.shape[-1] - 1)
            dmixed = torch.empty(b, l, end - gate, dtype=ctx.dtype, device=x.device)
            dtaps, doffset, dstate = [], [], []
            begin = 0
            for size, dpart in zip(ctx.parts, dparts, strict=True):
                c = slice(begin, begin + size)
                dpart = x.new_zeros(b, l, size) if dpart is None else dpart
                into = {"dx": dmixed[..., c]} if ctx.backend == "triton" else {}
                dx, dtap, doff, dst = conv.backward(
                    dpart, dfinal_state[:, c], projected[..., gate + begin : gate + begin + size],
                    taps.squeeze(1)[c], None if offset is None else offset[c], True,
                    None if state is None else state[:, c], seq_idx, (ctx.reverse,), **into,
                )  # fmt: skip
                if not into:
                    dmixed[..., c] = dx
                dtaps.append(dtap)
                doffset.append(doff)
                dstate.append(dst)
                begin += size
            # A narrow part is widened with zeros, so that products of it are fast.
            wide = None if ddt is None else F.pad(ddt.to(ctx.dtype), (0, -ddt.shape[-1] % _MULTIPLE))
            W = weight.to(ctx.dtype)
            dx, dweight, dbias = None, [], []
            flat = x.flatten(0, 1)
            for dpart, first, last in ((dz, 0, gate), (dmixed, gate, end), (wide, end, rows)):
                if dpart is None:
                    dweight.append(W.new_zeros(last - first, d))
                    dbias.append(W.new_zeros(last - first))
                    continue
                dpart = dpart.to(ctx.dtype).flatten(0, 1)
                dweight.append((dpart.t() @ flat)[: last - first])
                if bias is not None:
                    dbias.append(dpart.sum(0)[: last - first])
                part = F.pad(W[first:last], (0, 0, 0, dpart.shape[-1] - (last - first)))
                dx = dpart @ part if dx is None else dx.addmm_(dpart, part)
        assert dx is not None
        return (
            dx.view(b, l, d),
            None if state is None else torch.cat(dstate, dim=1).to(state.dtype),
            torch.cat(dweight).to(weight.dtype),
            None if bias is None else torch.cat(dbias).to(bias.dtype),
            torch.cat(dtaps).unsqueeze(1).to(taps.dtype),
            None if offset is None else torch.cat(doffset).to(offset.dtype),
            *(None,) * 6,
        )
