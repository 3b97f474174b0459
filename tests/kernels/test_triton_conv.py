"""The Triton convolution: in Triton's interpreter on the CPU at tiny sizes, and on a GPU (``pytest -m gpu``)."""

import functools

import pytest
import torch
from cases import (
    CONV_CASES,
    ConvCase,
    assert_accurate,
    assert_same_from_afar,
    far_view,
    inputs_in,
    outputs_and_gradients,
    run,
)
from interpreter import assert_passes_interpreted, interpreted
from torch import Tensor

from seqssm.kernels import causal_conv1d, causal_conv1d_step

TINY = {  # segments of 16 tokens, tiles of 4
    "one-token": ConvCase(l=1, b=2, d=3),
    "shorter-than-kernel": ConvCase(l=2, d=3, reverse=True, packed=1),
    "plain": ConvCase(l=33, b=2, d=3, bias=False, activation=None, state=False),
    "one-tap": ConvCase(l=5, d=3, k=1),
    "seven-taps": ConvCase(l=20, d=3, k=7, packed=4, reverse=True),
    "both-directions": ConvCase(l=35, b=2, d=6, reverse=(False, True), packed=9),
    "strided": ConvCase(l=15, b=2, d=20, packed=5, strided=True),
}


def test_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@interpreted
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", TINY)
def test_accuracy_float32(name: str) -> None:
    case = TINY[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float32), backend="triton"), torch.float32)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
def test_strides_beyond_32_bits(reverse: bool) -> None:
    convolve = functools.partial(causal_conv1d, reverse=reverse, backend="triton")
    assert_same_from_afar(ConvCase(l=9, d=3, reverse=reverse), ("x",), convolve)


@interpreted
def test_step_with_strides_beyond_32_bits() -> None:
    inputs = inputs_in(ConvCase(l=1, b=2, d=3), torch.float16)
    state, x = inputs.pop("initial_state"), inputs.pop("x")[:, 0]
    states = state.clone(), state.clone()
    step = functools.partial(causal_conv1d_step, **inputs, backend="triton")
    torch.testing.assert_close(step(states[0], far_view(x)), step(states[1], x), rtol=0, atol=0)
    torch.testing.assert_close(*states, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("k", [1, 2, 4])
def test_step_equals_convolution(k: int) -> None:
    check_step(k, torch.float32, "cpu")


def check_step(k: int, dtype: torch.dtype, device: str) -> None:
    case = ConvCase(l=5, b=3, d=7, k=k)
    inputs = inputs_in(case, dtype, device)
    y, final_state = causal_conv1d(**inputs, backend="reference")
    state, x = inputs.pop("initial_state").clone(), inputs.pop("x")
    for t in range(case.l):
        out = causal_conv1d_step(state, x[:, t], **inputs, backend="triton")
        torch.testing.assert_close(out, y[:, t], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    torch.testing.assert_close(state, final_state, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONV_CASES)
def test_accuracy_on_gpu(name: str, dtype: torch.dtype) -> None:
    case = CONV_CASES[name]
    options = {} if case.options["seq_idx"] is None else {"seq_idx": case.options["seq_idx"].cuda()}
    assert_accurate(case, run(case, inputs_in(case, dtype, "cuda"), backend="triton", **options), dtype)


@pytest.mark.gpu
def test_equal_bits_on_gpu() -> None:
    case = ConvCase(l=5000, b=2, d=300, packed=700)
    inputs = inputs_in(case, torch.bfloat16, "cuda")
    seq_idx = case.options["seq_idx"].cuda()
    first, second = (run(case, inputs, backend="triton", seq_idx=seq_idx) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_gpu() -> None:
    """The last tokens of 2048 x 2**20 bfloat16 elements, a view of a wider projection, forwards and backwards."""
    d, l, tail = 2048, 1 << 20, 512
    fused = torch.randn(1, l, d + 64, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(d, 4, device="cuda"), torch.randn(d, device="cuda")
    x = fused[..., 64:].detach().requires_grad_()
    y, _ = causal_conv1d(x, weight, bias, backend="triton")
    y[:, -tail:].float().sum().backward()
    far = fused[:, -tail - 3 :, 64:].detach().clone().requires_grad_()
    expected, _ = causal_conv1d(far, weight, bias, backend="torch")
    expected[:, 3:].float().sum().backward()
    torch.testing.assert_close(y[:, -tail:], expected[:, 3:], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x.grad[:, -tail:], far.grad[:, 3:], rtol=2e-2, atol=2e-2)
    assert not x.grad[:, : -tail - 3].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_on_gpu(dtype: torch.dtype) -> None:
    check_step(4, dtype, "cuda")


@pytest.mark.gpu
def test_step_in_a_cuda_graph() -> None:
    inputs = inputs_in(ConvCase(l=1, b=2, d=64), torch.float32, "cuda")
    initial, x = inputs.pop("initial_state"), inputs.pop("x")[:, 0]
    state, captured = initial.clone(), initial.clone()
    expected = [causal_conv1d_step(state, x, **inputs) for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_conv1d_step(captured, x, **inputs)
    captured.copy_(initial)
    for y in expected:
        graph.replay()
        torch.testing.assert_close(out, y, rtol=0, atol=0)
    torch.testing.assert_close(captured, state, rtol=0, atol=0)


@pytest.mark.gpu
def test_operator_on_gpu() -> None:
    case = ConvCase(l=300, b=2, d=6)
    inputs = inputs_in(case, torch.float32, "cuda")
    t = {k: x.detach().clone().requires_grad_() for k, x in inputs.items()}
    arguments = (t["x"], t["weight"], t["bias"], True, t["initial_state"], None, (False, True), "triton")
    torch.library.opcheck(torch.ops.seqssm.causal_conv1d.default, arguments)

    def operator(**kw: Tensor) -> tuple[Tensor, Tensor]:
        y, state = causal_conv1d(**kw | {"x": kw["x"] * 2}, reverse=(False, True))
        return y + 1, state

    expected = outputs_and_gradients(operator, inputs)
    compiled = outputs_and_gradients(torch.compile(operator, fullgraph=True), inputs)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
