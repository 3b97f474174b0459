"""The Triton selective scan of one part of a sequence whose other parts lie elsewhere."""

from collections.abc import Callable

import torch
from torch import Tensor

from seqssm.kernels import dispatch

Join = Callable[[Tensor, Tensor, bool], Tensor]
"""``join(own (b, d, n), decay (b, d, n), backward) -> entering (b, d, n)``: what enters a part, of the state or, with
``backward``, of its gradient, from what the part yields when nothing enters and what it multiplies an entering one by.
"""


def scan_part(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    reverse: tuple[bool, ...],
    join: Join,
) -> tuple[Tensor, Tensor]:
    """``selective_scan`` with the "triton" backend, at the cost of a whole sequence of this length.

    The kernels sum up what each segment yields by itself before they scan for good. Here that sum, of all segments,
    goes out through ``join`` in between, in the forward and in the backward pass, so that nothing is computed twice.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx: as ``selective_scan`` takes them; B and C with
            their groups, (b, l, g, n).
        reverse: one direction a group.
        join: see :data:`Join`. It is called once in each pass, also where it must return zeros.

    Returns:
        y (b, l, d) and the state after this part (b, d, n), with gradients.
    """
    return _ScanPart.apply(join, delta_softplus, reverse, seq_idx, u, delta, A, B, C, D, z, delta_bias)


def decay(A: Tensor, total_steps: Tensor) -> Tensor:
    """What a part multiplies an entering state by, (b, d, n): exp(A total), 0 where a reset made the total infinite."""
    total = total_steps[..., None]
    return torch.exp(A.float() * total).masked_fill(total.isinf(), 0)


class _ScanPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, join, delta_softplus, reverse, seq_idx, u, delta, A, B, C, D, z, delta_bias):  # type: ignore[no-untyped-def]
        inputs = (u, delta, A, B, C, D, z, delta_bias)
        y, final_state, states = dispatch.load_backend("selective_scan", "triton").forward(
            *inputs, delta_softplus, None, seq_idx, reverse, any(ctx.needs_input_grad),
            join=lambda own, total: join(own, decay(A, total), False),
        )  # fmt: skip
        ctx.save_for_backward(states, seq_idx, *inputs)
        ctx.join, ctx.delta_softplus, ctx.reverse = join, delta_softplus, reverse
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal_state):  # type: ignore[no-untyped-def]
        states, seq_idx, *inputs = ctx.saved_tensors
        u, A = inputs[0], inputs[2]
        if dy is None:
            dy = torch.zeros_like(u)
        if dfinal_state is None:
            dfinal_state = u.new_zeros(u.shape[0], *A.shape, dtype=torch.float32)
        *gradients, _ = dispatch.load_backend("selective_scan", "triton").backward(
            dy, dfinal_state, states, *inputs, ctx.delta_softplus, None, seq_idx, ctx.reverse,
            join=lambda own, total: ctx.join(own, decay(A, total), True),
        )  # fmt: skip
        cast = (None if x is None else gradient.to(x.dtype) for x, gradient in zip(inputs, gradients, strict=True))
        return None, None, None, None, *cast
