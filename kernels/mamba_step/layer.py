"""The weights of a Mamba layer and of the norm in front of it."""

from typing import NamedTuple

from torch import Tensor


class LayerWeights(NamedTuple):
    """What ``mamba_step`` and ``mamba_chunk`` apply, for d features, e channels, n states, r ranks and k taps.

    The projections and the convolution are kept in one dtype; D, dt_bias and A_log in float32.
    """

    norm_weight: Tensor  # (d,)
    eps: float  # of the norm
    in_proj: Tensor  # (2e, d)
    in_bias: Tensor | None  # (2e,)
    conv_weight: Tensor  # (e, k)
    conv_bias: Tensor | None  # (e,)
    x_proj: Tensor  # (r + 2n, e)
    dt_proj: Tensor  # (e, r)
    dt_bias: Tensor  # (e,)
    A_log: Tensor  # (e, n)
    D: Tensor  # (e,)
    out_proj: Tensor  # (d, e)
    out_bias: Tensor | None  # (d,)
