"""Mamba's layer as one function of autograd, for one stream on a GPU.

What autograd makes of the layer step by step is right but wasteful: the gradients of the two halves of the input
projection are put together in a copy, those of the scan's input and of B, C and the step size are added up by kernels
of their own, and everything between the steps is kept. Here the kernels write their gradients where the next product
reads them, and, where memory counts more, only the states that enter the scan's chunks are kept: projection,
convolution and step sizes are computed again, and the scan's backward kernels, which walk through all states anyway,
give its output along with the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.errors import UserError
from seqssm.kernels import dispatch
from seqssm.kernels.selective_scan.part import Join, decay
from seqssm.mixers.base import Normed, State
from seqssm.mixers.operations import check_halo

if TYPE_CHECKING:
    from seqssm.mixers.mamba import Mamba


def available(mixer: Mamba, x: Tensor) -> bool:
    """Whether :func:`run` takes x: it is made for the Triton kernels, and the compiler would not see through it."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    if mixer.operations.split and mixer.in_proj.bias is not None:  # the tokens before a part are projected from zeros
        return False
    return dispatch.choose_backend("selective_scan", mixer.backend, x) == "triton"


def run(
    mixer: Mamba, x: Tensor, source: Normed | None, state: State | None, seq_idx: Tensor | None, reverse: bool
) -> tuple[Tensor, State]:
    """The layer: x (b, l, d) -> y (b, l, d) and the state, as ``Mamba.forward`` gives them.

    Args:
        source: what x is the norm of, for the backward pass to compute again all that is cheap; None to keep it all.
    """
    settings = settings_of(mixer, x, source, reverse)
    conv_state, scan_state = (None, None) if state is None else (state["conv"], state["scan"])
    if mixer.operations.split:
        if state is not None:
            raise UserError("a sequence whose length is split over processes starts without a state: give it whole")
        before = functools.partial(mixer.operations.before, count=mixer.d_conv - 1, seq_idx=seq_idx, reverse=reverse)
        settings = settings._replace(join=mixer.operations.join(seq_idx, (reverse,)), before=before)
    y, conv, scan = _Layer.apply(
        settings,
        x,
        conv_state,
        scan_state,
        seq_idx,
        None if source is None else source.residual,
        *weights_of(mixer),
    )
    return y, {"conv": conv, "scan": scan}


def settings_of(mixer: Mamba, x: Tensor, source: Normed | None = None, reverse: bool = False) -> Settings:
    """The settings of a layer for inputs like x."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return Settings(mixer.dt_rank, mixer.d_state, (reverse,), mixer.backend, dtype, source)


class Settings(NamedTuple):
    """What is not a tensor; ``dtype`` is that of all activations. The source's residual goes in beside it."""

    dt_rank: int
    d_state: int
    reverse: tuple[bool, ...]
    backend: str
    dtype: torch.dtype
    source: Normed | None
    # For a part of a sequence: what joins its scan to those of the others, and the tokens before it from its own.
    join: Join | None = None
    before: Callable[[Tensor], Tensor] | None = None


class Weights(NamedTuple):
    """The layer's parameters, as the mixer keeps them."""

    W_in: Tensor
    b_in: Tensor | None
    W_conv: Tensor
    b_conv: Tensor | None
    W_x: Tensor
    W_dt: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    W_out: Tensor
    b_out: Tensor | None


def weights_of(mixer: Mamba) -> Weights:
    """The layer's parameters, in order."""
    return Weights(
        mixer.in_proj.weight,
        mixer.in_proj.bias,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.dt_proj.bias,
        mixer.A_log,
        mixer.D,
        mixer.out_proj.weight,
        mixer.out_proj.bias,
    )


class Inner(NamedTuple):
    """What lies between the norm and the output projection; shapes (b, l, width)."""

    xz: Tensor  # 2e: the input of the convolution, and the gate
    u: Tensor  # e: the convolution's output
    selected: Tensor  # r + 2n: the low-rank step size, B and C
    delta: Tensor  # e


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, x, conv_state, scan_state, seq_idx, residual, *parameters):  # type: ignore[no-untyped-def]
        weights = Weights(*parameters)
        x = x.to(settings.dtype)
        ctx.halo = None
        if settings.before is not None and weights.W_conv.shape[-1] > 1:
            ctx.halo = _Halo(x, settings.before, weights)
            conv_state = ctx.halo.conv_state.detach()
        out, conv, final_state, states, inner, y = forward(settings, x, conv_state, scan_state, seq_idx, weights)
        # The step sizes' low rank, B and C are a twelfth of all; a product over the whole width makes them.
        kept = (x, *inner, y) if residual is None else (None, None, None, inner.selected, None, None)
        ctx.save_for_backward(*kept, states, conv_state, scan_state, seq_idx, residual, *parameters)
        # The residual is kept as a saved tensor, which is freed in time.
        source = settings.source
        ctx.settings = settings._replace(source=source and source._replace(residual=source.residual.new_empty(0)))
        ctx.set_materialize_grads(False)
        return out, conv, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dconv, dfinal_state):  # type: ignore[no-untyped-def]
        x, xz, u, selected, delta, y, states, conv_state, scan_state, seq_idx, residual, *parameters = ctx.saved_tensors
        settings, weights = ctx.settings, Weights(*parameters)
        with torch.autocast(states.device.type, enabled=False):
            if residual is None:
                inner = Inner(xz, u, selected, delta)
            else:
                x = settings.source._replace(residual=residual).compute(settings.dtype)
                inner, _ = project(settings, x, conv_state, seq_idx, weights, selected)
            gradients = backward(
                settings, ctx.needs_input_grad, dout, dconv, dfinal_state,
                x, inner, y, states, conv_state, scan_state, seq_idx, weights,
            )  # fmt: skip
            if ctx.halo is not None:
                dx, dconv_state, *others = gradients
                ctx.halo.backward(dconv_state, dx, dW_in=gradients[-len(weights)])
                gradients = (dx, None, *others)
        return None, *gradients


class _Halo:
    """What the convolution of a part takes from the tokens before it, projected here once more.

    It depends on the first and last few tokens of each part alone: a small graph of autograd of their own, whose
    gradients are added where those of the layer are, so that nothing of the part's size is made or added up for them.
    """

    def __init__(self, x: Tensor, before: Callable[[Tensor], Tensor], weights: Weights) -> None:
        self.count = weights.W_conv.shape[-1] - 1
        e = weights.W_conv.shape[0]
        check_halo(x.shape[1], self.count)
        self.edges = torch.cat([x[:, : self.count], x[:, -self.count :]], dim=1).detach().requires_grad_()
        self.weight = weights.W_in[:e].detach().to(x.dtype).requires_grad_()
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            self.conv_state = F.linear(before(self.edges), self.weight).mT.contiguous()  # (b, e, k-1)

    def backward(self, dconv_state: Tensor, dx: Tensor | None, dW_in: Tensor | None) -> None:
        """Add the gradients to those of the part; every process must call it, since all exchange theirs."""
        dedges, dweight = torch.autograd.grad(self.conv_state, (self.edges, self.weight), dconv_state)
        if dx is not None:
            dx[:, : self.count] += dedges[:, : self.count]
            dx[:, -self.count :] += dedges[:, self.count :]
        if dW_in is not None:
            dW_in[: len(dweight)] += dweight


def forward(
    settings: Settings,
    x: Tensor,
    conv_state: Tensor | None,
    scan_state: Tensor | None,
    seq_idx: Tensor | None,
    weights: Weights,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Inner, Tensor]:
    """The layer's output, its states, those that enter the scan's chunks, what lies between, and the scan's output."""
    with torch.autocast(x.device.type, enabled=False):
        inner, conv = project(settings, x, conv_state, seq_idx, weights)
        scan = dispatch.load_backend("selective_scan", _backend(settings, x))
        inputs = _scan_inputs(settings, inner, weights)
        y, final_state, states = scan.forward(
            *inputs, True, scan_state, seq_idx, settings.reverse, True, **_joined(settings, inputs[2], False)
        )
        out = F.linear(y, weights.W_out.to(settings.dtype), _cast(settings, weights.b_out))
    return out, conv, final_state, states, inner, y


def backward(
    settings: Settings,
    needed: Sequence[bool],
    dout: Tensor | None,
    dconv: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    inner: Inner,
    y: Tensor | None,
    states: Tensor,
    conv_state: Tensor | None,
    scan_state: Tensor | None,
    seq_idx: Tensor | None,
    weights: Weights,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the two states, two that have none, and the weights in their order.

    Args:
        needed: as ``ctx.needs_input_grad`` of settings, x, the states, two others, and the weights.
        inner, y: of the forward pass; the scan gives y again when None.
    """
    W_in, b_in, W_conv, b_conv, W_x, W_dt, dt_bias, A_log, D, W_out, b_out = weights
    xz, u, selected, delta = inner
    b, l, e = u.shape
    r, n = settings.dt_rank, settings.d_state
    wanted = dict(zip(Weights._fields, needed[-len(weights) :], strict=True))
    backend = _backend(settings, x)
    dout = x.new_zeros(x.shape) if dout is None else dout.to(settings.dtype)
    if dfinal_state is None:
        dfinal_state = torch.zeros(b, e, n, dtype=torch.float32, device=x.device).to(states.dtype)
    if dconv is None:
        dconv = x.new_zeros(b, e, W_conv.shape[-1] - 1)
    # All halves of one tensor: nothing is put together afterwards.
    dxz = torch.empty_like(xz)
    dselected = torch.empty_like(selected)
    dy = dout @ W_out.to(settings.dtype)
    A = -torch.exp(A_log)
    inputs = _scan_inputs(settings, inner, weights)
    scan = dispatch.load_backend("selective_scan", backend)
    options = (True, scan_state, seq_idx, settings.reverse)
    into: dict[str, Tensor] = {}
    if backend == "triton":
        into = {"dz": dxz[..., e:], "dB": dselected[..., None, r : r + n], "dC": dselected[..., None, r + n :]}
        if y is None:
            into["y"] = y = torch.empty_like(u)
    elif y is None:
        y = scan.forward(*inputs, *options, False)[0]
    du, ddelta, dA, dB, dC, dD, dz, ddt_bias, dscan_state = scan.backward(
        dy, dfinal_state, states, *inputs, *options, **into, **_joined(settings, A, True)
    )
    del dy
    if backend != "triton":
        dxz[..., e:] = dz
        dselected[..., r : r + n] = dB[:, :, 0]
        dselected[..., r + n :] = dC[:, :, 0]
    del dB, dC, dz
    assert y is not None
    dW_out = _weight_gradient(dout, y, W_out, wanted["W_out"])
    del y
    dW_dt = _weight_gradient(ddelta, selected[..., :r], W_dt, wanted["W_dt"])
    torch.mm(ddelta.flatten(0, 1), W_dt.to(settings.dtype), out=dselected.flatten(0, 1)[:, :r])
    del ddelta, delta, inputs, inner
    dW_x = _weight_gradient(dselected, u, W_x, wanted["W_x"])
    # The gradient of u on both its ways: into the scan, and into B, C and the step size.
    du = du.flatten(0, 1).addmm_(dselected.flatten(0, 1), W_x.to(settings.dtype)).view(b, l, e)
    del u, dselected
    conv = dispatch.load_backend("causal_conv1d", backend)
    into = {"dx": dxz[..., :e]} if backend == "triton" else {}
    dx, dW_conv, db_conv, dconv_state = conv.backward(
        du, dconv, xz[..., :e], W_conv.squeeze(1), b_conv, True, conv_state, seq_idx, settings.reverse, **into
    )
    if backend != "triton":
        dxz[..., :e] = dx
    del du, xz
    dx = dxz @ W_in.to(settings.dtype) if needed[1] else None
    dW_in = _weight_gradient(dxz, x, W_in, wanted["W_in"])

    def like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
        return None if gradient is None or tensor is None else gradient.to(tensor.dtype)

    return (
        dx,
        like(dconv_state, conv_state),
        like(dscan_state, scan_state),
        None,
        None,
        dW_in,
        None if b_in is None else dxz.sum((0, 1)).to(b_in.dtype),
        dW_conv.unsqueeze(1).to(W_conv.dtype),
        like(db_conv, b_conv),
        dW_x,
        dW_dt,
        like(ddt_bias, dt_bias),
        like(dA * A, A_log),
        like(dD, D),
        dW_out,
        None if b_out is None else dout.sum((0, 1)).to(b_out.dtype),
    )


def _joined(settings: Settings, A: Tensor, backward: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What the scan of a part takes besides."""
    join = settings.join
    return {} if join is None else {"join": lambda own, total: join(own, decay(A, total), backward)}


def _backend(settings: Settings, x: Tensor) -> str:
    return dispatch.choose_backend("selective_scan", settings.backend, x)


def _cast(settings: Settings, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(settings.dtype)


def project(
    settings: Settings,
    x: Tensor,
    conv_state: Tensor | None,
    seq_idx: Tensor | None,
    weights: Weights,
    selected: Tensor | None = None,
) -> tuple[Inner, Tensor]:
    """Everything before the scan, of which ``selected`` may be there, and the convolution's final state; outside
    autocast."""
    backend = _backend(settings, x)
    xz = F.linear(x, weights.W_in.to(settings.dtype), _cast(settings, weights.b_in))
    e = xz.shape[-1] // 2
    conv = dispatch.load_backend("causal_conv1d", backend)
    u, final_state = conv.forward(
        xz[..., :e], weights.W_conv.squeeze(1), weights.b_conv, True, conv_state, seq_idx, settings.reverse
    )
    if selected is None:
        selected = F.linear(u, weights.W_x.to(settings.dtype))
    delta = F.linear(selected[..., : settings.dt_rank], weights.W_dt.to(settings.dtype))
    return Inner(xz, u, selected, delta), final_state


def _scan_inputs(settings: Settings, inner: Inner, weights: Weights) -> tuple[Any, ...]:
    """u, delta, A, B, C, D, z and delta_bias, as the kernels take them."""
    r, n, e = settings.dt_rank, settings.d_state, inner.u.shape[-1]
    B, C = (inner.selected[..., start : start + n].unsqueeze(2) for start in (r, r + n))
    A = -torch.exp(weights.A_log)
    return inner.u, inner.delta, A, B, C, weights.D, inner.xz[..., e:], weights.dt_bias


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, needed: bool) -> Tensor | None:
    """dy (b, l, o), x (b, l, i) -> (o, i)."""
    return (dy.flatten(0, 1).t() @ x.flatten(0, 1)).to(weight.dtype) if needed else None
