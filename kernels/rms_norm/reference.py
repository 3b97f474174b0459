"""The formula as it stands: the oracle of the tests."""

import torch
from torch import Tensor


def add_rms_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum (..., d) in x's dtype and its norm in ``dtype``; computed in float64 for float64 and else in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    if added is not None:
        total = total + added.to(wide)
        # The norm is that of what the next layer will read.
        total = total.to(x.dtype).to(wide)
    mean_square = total.square().mean(-1, keepdim=True)
    y = total / torch.sqrt(mean_square + eps) * weight.to(wide)
    return total.to(x.dtype), y.to(dtype)
