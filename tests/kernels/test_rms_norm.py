"""The fused norm: on the CPU in plain PyTorch and in Triton's interpreter, and on a GPU (``pytest -m gpu``)."""

import pytest
import torch
from cases import distances, fixed_randn
from interpreter import assert_passes_interpreted, interpreted
from torch import Tensor

from seqssm.kernels import add_rms_norm

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 70, 33), (1, 40, 128)]
EPS = 1e-5


def inputs(shape: tuple[int, ...], added: torch.dtype | None, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, more = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    result = {"x": x.to(device, dtype), "weight": torch.randn(shape[-1], generator=generator).to(device)}
    return result if added is None else result | {"added": more.to(device, added)}


def run(given: dict[str, Tensor], out: torch.dtype, backend: str) -> list[Tensor]:
    """The sum, the norm, and the gradients of all inputs for fixed gradients of both."""
    leaves = {k: x.detach().clone().requires_grad_() for k, x in given.items()}
    total, y = add_rms_norm(
        leaves["x"], leaves.get("added"), leaves["weight"], EPS, dtype=torch.float64 if backend == "exact" else out,
        backend="reference" if backend == "exact" else backend,
    )  # fmt: skip
    torch.autograd.backward([y, total], [fixed_randn(y).to(y.dtype), fixed_randn(total)])
    return [total.detach(), y.detach(), *(x.grad for x in leaves.values())]


def check(shape: tuple[int, ...], added: torch.dtype | None, dtype: torch.dtype, out: torch.dtype, device: str) -> None:
    """As close to float64 as twice plain PyTorch in the same dtypes."""
    given = inputs(shape, added, dtype, device)
    exact = run({k: x.double().cpu() for k, x in given.items()}, torch.float64, "exact")
    plain = run(given, out, "torch")
    for actual, expected, reference in zip(run(given, out, "triton"), plain, exact, strict=True):
        assert actual.dtype == expected.dtype
        for e, bound in zip(distances(actual, reference), distances(expected.cpu(), reference), strict=True):
            assert e <= 2 * bound + 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("added", [None, torch.float64])
def test_portable_path_is_the_formula(added: torch.dtype | None) -> None:
    for shape in SHAPES:
        given = inputs(shape, added, torch.float64, "cpu")
        given["weight"] = given["weight"].double()
        for a, b in zip(run(given, torch.float64, "auto"), run(given, torch.float64, "reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bad_arguments_are_named() -> None:
    x, weight = torch.zeros(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match="added must have shape"):
        add_rms_norm(x, torch.zeros(3, 3), weight, EPS)
    with pytest.raises(ValueError, match="weight must have shape"):
        add_rms_norm(x, None, torch.ones(4), EPS)
    with pytest.raises(ValueError, match="floating point"):
        add_rms_norm(x.int(), None, weight, EPS)


def test_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("added", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape: tuple[int, ...], added: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqssm.kernels.rms_norm import triton as backend

    monkeypatch.setattr(backend, "_ENOUGH_PROGRAMS", 3)  # several tiles a program
    check(shape, added, torch.float32, torch.float32, "cpu")
    check(shape, added, torch.float32, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("added", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_on_gpu(dtype: torch.dtype, added: torch.dtype | None) -> None:
    for shape in (*SHAPES, (2, 9001, 768), (5, 4096)):
        check(shape, added, dtype, torch.bfloat16, "cuda")
        check(shape, added, dtype, torch.float32, "cuda")


@pytest.mark.gpu
def test_operator_on_gpu() -> None:
    given = inputs((2, 300, 96), torch.bfloat16, torch.float32, "cuda")
    leaves = {k: x.requires_grad_() for k, x in given.items()}
    arguments = (leaves["x"], leaves["added"], leaves["weight"], EPS, torch.bfloat16)
    torch.library.opcheck(torch.ops.seqssm.add_rms_norm.default, arguments)
    first, second = (run(given, torch.bfloat16, "triton") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
