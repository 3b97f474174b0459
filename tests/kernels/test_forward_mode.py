"""Derivatives in forward mode: the reference has them, and the kernels say that they do not, where torch gave zeros."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from seqssm.kernels import causal_conv1d, selective_scan, ssd


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[Callable, tuple[Tensor, ...]]] = {
    "scan": (
        selective_scan,
        (noise(2, 7, 4), noise(2, 7, 4).abs(), -noise(4, 3).abs(), noise(2, 7, 3), noise(2, 7, 3)),
    ),
    "ssd": (
        ssd,
        (noise(2, 7, 2, 4), noise(2, 7, 2).abs(), -noise(2).abs(), noise(2, 7, 1, 3), noise(2, 7, 1, 3)),
    ),
    "conv": (causal_conv1d, (noise(2, 7, 4), noise(4, 3))),
}


@pytest.mark.parametrize(("function", "inputs"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("which", [0, -1])
def test_a_forward_derivative_is_right_or_refused(function: Callable, inputs: tuple[Tensor, ...], which: int) -> None:
    moved = which % len(inputs)
    direction = noise(*inputs[moved].shape, 1)[..., 0]

    def at(x: Tensor, backend: str) -> Tensor:
        return function(*inputs[:moved], x, *inputs[moved + 1 :], backend=backend)[0]

    _, got = torch.func.jvp(lambda x: at(x, "reference"), (inputs[moved],), (direction,))
    step = 1e-6 * direction
    expected = (at(inputs[moved] + step, "reference") - at(inputs[moved] - step, "reference")) / 2e-6
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative: use backend='reference'"):
        torch.func.jvp(lambda x: at(x, "torch"), (inputs[moved],), (direction,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            at(forward_ad.make_dual(inputs[moved], direction), "auto")
        torch.testing.assert_close(at(inputs[moved], "auto"), at(inputs[moved], "reference"))  # it has no tangent
