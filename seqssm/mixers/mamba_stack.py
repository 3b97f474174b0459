"""A stack of Mamba blocks as one function of autograd, for training in little memory.

Of each block are kept what it adds to the residual stream, in the dtype of the products, and the states that enter the
scan's chunks; of the stream only what leaves the last block. The backward pass goes down the stream by subtraction: the
stream entering a block is the one leaving it less what the block added, to the last bit or two of float32. All within a
block but the scan is computed again, as in :mod:`seqssm.mixers.mamba_layer`. A token takes 2·d bytes and n·e/64 a block
(320 MiB for 2^20 tokens of width 128), where blocks that are recomputed one by one take 4·d for the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from seqssm.kernels import dispatch
from seqssm.kernels.rms_norm.op import add_rms_norm
from seqssm.mixers import mamba_layer
from seqssm.mixers.base import RMSNorm, State
from seqssm.mixers.mamba import Mamba

if TYPE_CHECKING:
    from seqssm.backbone import Block


def available(block: Block, x: Tensor) -> bool:
    """Whether :func:`run` can take the parts of a block, given a stream like x.

    They must be on their own: what a hook is to see (a sharded module gathers its weights in one) must be called.
    """
    mixer = block.mixer
    if any(part._forward_hooks or part._forward_pre_hooks for part in (block, block.norm, mixer)):
        return False
    if type(mixer) is not Mamba or mixer.operations.split:  # a part of a sequence meets its neighbours in every layer
        return False
    return x.dtype == torch.float32 and mamba_layer.available(mixer, x)


class Layer(NamedTuple):
    """A block: x + mixer(norm(x))."""

    norm: RMSNorm
    mixer: Mamba


def run(
    layers: Sequence[Layer], x: Tensor, states: Sequence[State | None], seq_idx: Tensor | None
) -> tuple[Tensor, list[State]]:
    """The residual stream behind the last block, and the state of each.

    Args:
        layers: the blocks, causal.
        x: (b, l, d) the stream, float32 or float64: in 16 bits it could not be gone back.
        states: what enters each.
        seq_idx: (b, l), as :meth:`Mixer.forward` takes it.
    """
    settings = [_Settings(mamba_layer.settings_of(m, x), norm.eps, norm.backend) for norm, m in layers]
    tensors = []
    for (norm, mixer), state in zip(layers, states, strict=True):
        entering = (None, None) if state is None else (state["conv"], state["scan"])
        tensors += [*entering, norm.weight, *mamba_layer.weights_of(mixer)]
    total, *leaving = _Stack.apply(settings, x, seq_idx, *tensors)
    return total, [{"conv": conv, "scan": scan} for conv, scan in zip(leaving[::2], leaving[1::2], strict=True)]


class _Settings(NamedTuple):
    layer: mamba_layer.Settings
    eps: float
    norm_backend: str


class _Tensors(NamedTuple):
    """A block's inputs; ``weights`` of the mixer."""

    conv: Tensor | None
    scan: Tensor | None
    norm: Tensor
    weights: mamba_layer.Weights


_WIDTH = 3 + len(mamba_layer.Weights._fields)


def _by_block(tensors: Sequence[Tensor | None]) -> Iterator[_Tensors]:
    for at in range(0, len(tensors), _WIDTH):
        conv, scan, norm, *weights = tensors[at : at + _WIDTH]
        yield _Tensors(conv, scan, norm, mamba_layer.Weights(*weights))  # type: ignore[arg-type]


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, x, seq_idx, *tensors):  # type: ignore[no-untyped-def]
        added: Tensor | None = None
        kept: list[Tensor] = []
        leaving: list[Tensor] = []
        for own, block in zip(settings, _by_block(tensors), strict=True):
            x, y = _add_norm(own, x, added, block.norm)
            added, conv, scan, states = mamba_layer.forward(
                own.layer, y, block.conv, block.scan, seq_idx, block.weights
            )[:4]
            kept += [added, states]
            leaving += [conv, scan]
        assert added is not None
        # A new tensor: what came in may be needed by others as it is.
        x = (x + added).to(x.dtype)
        ctx.settings = settings
        ctx.save_for_backward(x, seq_idx, *kept, *tensors)
        ctx.set_materialize_grads(False)
        return x, *leaving

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal, *dleaving):  # type: ignore[no-untyped-def]
        settings = ctx.settings
        total, seq_idx, *tensors = ctx.saved_tensors
        kept, blocks = tensors[: 2 * len(settings)], list(_by_block(tensors[2 * len(settings) :]))
        needed = ctx.needs_input_grad
        dtotal = torch.zeros_like(total) if dtotal is None else dtotal
        dtype = settings[-1].layer.dtype
        dadded = dtotal.to(dtype)
        gradients: list[tuple[Tensor | None, ...]] = []
        with torch.autocast(total.device.type, enabled=False):
            for i in reversed(range(len(settings))):
                own, block, states = settings[i], blocks[i], kept.pop()
                total, y = _subtract_norm(own, total, kept.pop(), block.norm)
                inner, _ = mamba_layer.project(own.layer, y, block.conv, seq_idx, block.weights)
                first = 3 + i * _WIDTH
                dy, dconv, dscan, _, _, *dweights = mamba_layer.backward(
                    own.layer,
                    (False, True, *needed[first : first + 2], False, False, *needed[first + 3 : first + _WIDTH]),
                    dadded, dleaving[2 * i], dleaving[2 * i + 1],
                    y, inner, None, states, block.conv, block.scan, seq_idx, block.weights,
                )  # fmt: skip
                assert dy is not None
                del inner, y, states
                dtotal, dadded, dnorm = _norm_backward(own, dy, dtotal, total, block.norm, dtype)
                gradients.append((dconv, dscan, dnorm, *dweights))
        return None, dtotal, None, *(gradient for of_block in reversed(gradients) for gradient in of_block)


def _add_norm(own: _Settings, x: Tensor, added: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, added, weight, own.eps, dtype=own.layer.dtype, backend=own.norm_backend)


def _subtract_norm(own: _Settings, total: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The stream before ``added`` joined it, and its norm."""
    chosen = _norm_backend(own, total)
    if chosen == "triton":
        norm = dispatch.load_backend("rms_norm", chosen)
        y, before = norm.forward(total, added, weight, own.eps, own.layer.dtype, subtract=True)
        return before, y
    return add_rms_norm(total - added, None, weight, own.eps, dtype=own.layer.dtype, backend=chosen)


def _norm_backward(
    own: _Settings, dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream, of what was added to it, in ``dtype``, and of the weight."""
    chosen = _norm_backend(own, total)
    if chosen == "triton":
        dx, dadded, dweight = dispatch.load_backend("rms_norm", chosen).backward(
            dy, dtotal, total, weight, own.eps, dtype
        )
        return dx, dx if dadded is None else dadded, dweight
    leaves = total.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        y = add_rms_norm(leaves[0], None, leaves[1], own.eps, dtype=own.layer.dtype, backend=chosen)[1]
    dx, dweight = torch.autograd.grad(y, leaves, dy)
    dx = dx + dtotal
    return dx, dx.to(dtype), dweight


def _norm_backend(own: _Settings, x: Tensor) -> str:
    return dispatch.choose_backend("rms_norm", own.norm_backend, x, ("reference", "torch", "triton"))
