"""The step of a whole layer: in Triton's interpreter on the CPU, and on a GPU (``pytest -m gpu``)."""

import os
import subprocess
import sys

import pytest
import torch
from cases import distances
from torch import Tensor

from seqssm.kernels import mamba_step

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRET, reason="runs in a process of its own: see test_in_the_interpreter")


def layer(b: int, d: int, e: int, n: int, r: int, k: int, biases: bool) -> dict[str, Tensor]:
    """A layer's inputs in float64."""
    generator = torch.Generator().manual_seed(d + n)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": randn(b, d),
        "conv_state": randn(b, e, k - 1),
        "scan_state": randn(b, e, n),
        "norm_weight": randn(d),
        "in_proj": randn(2 * e, d) / d**0.5,
        "in_bias": randn(2 * e) if biases else None,
        "conv_weight": randn(e, k),
        "conv_bias": randn(e) if biases else None,
        "x_proj": randn(r + 2 * n, e) / e**0.5,
        "dt_proj": randn(e, r),
        "dt_bias": randn(e) - 2,
        "A_log": randn(e, n),
        "D": randn(e),
        "out_proj": randn(d, e) / e**0.5,
        "out_bias": randn(d) if biases else None,
    }


def check(sizes: tuple, dtype: torch.dtype, device: str, tolerance: float) -> None:
    wide = ("x", "scan_state", "dt_bias", "A_log", "D")
    given = {
        name: None if t is None else t.to(device, torch.float32 if name in wide else dtype)
        for name, t in layer(*sizes).items()
    }
    exact = {name: None if t is None else t.double() for name, t in given.items()}
    for _ in range(3):  # the states of one step are the next one's
        given["x"] = mamba_step(**given, eps=1e-5, backend="triton")
        exact["x"] = mamba_step(**exact, eps=1e-5, backend="reference")
    for name in ("x", "conv_state", "scan_state"):
        assert max(distances(given[name], exact[name].cpu())) <= tolerance


def test_in_the_interpreter() -> None:
    if INTERPRET:
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@interpreted
@pytest.mark.parametrize("sizes", [(2, 8, 16, 4, 2, 4, True), (1, 5, 7, 3, 1, 1, False), (3, 12, 21, 5, 3, 2, True)])
def test_equals_the_formula(sizes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqssm.kernels.mamba_step import triton as backend

    monkeypatch.setattr(backend, "_SPAN", 4)  # several spans
    check(sizes, torch.float32, "cpu", 1e-5)


def test_bad_arguments_are_named() -> None:
    given = layer(2, 8, 16, 4, 2, 4, False)
    for name, words in (("x_proj", "x_proj must have shape"), ("conv_state", "conv_state must have shape")):
        with pytest.raises(ValueError, match=words):
            mamba_step(**given | {name: torch.zeros(3, 3)}, eps=1e-5, backend="reference")
    with pytest.raises(ValueError, match="no gradient"):
        mamba_step(**given | {"D": given["D"].requires_grad_()}, eps=1e-5, backend="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 128, 256, 16, 8, 4, False), (3, 768, 1536, 16, 48, 4, True)])
def test_equals_the_formula_on_gpu(sizes: tuple, dtype: torch.dtype) -> None:
    check(sizes, dtype, "cuda", 1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
def test_operator_on_gpu() -> None:
    given = {k: t if t is None else t.float().cuda() for k, t in layer(2, 8, 16, 4, 2, 4, True).items()}
    names = list(given)
    arguments = [given[name] for name in names[:4]] + [1e-5] + [given[name] for name in names[4:]]
    torch.library.opcheck(torch.ops.seqssm.mamba_step.default, tuple(arguments))
