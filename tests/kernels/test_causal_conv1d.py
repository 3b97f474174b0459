"""Every CPU backend of the causal convolution against the float64 reference, and what the operator promises."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import CONV_CASES, ConvCase, assert_accurate, flip_inputs, inputs_in, outputs_and_gradients, run
from torch import Tensor

from seqssm.kernels import causal_conv1d, causal_conv1d_step

BACKENDS = ("torch", "numba")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that a result that was never written shows."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("name", CONV_CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(backend: str, name: str) -> None:
    case = CONV_CASES[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float32), backend=backend), torch.float32)


@pytest.mark.parametrize("name", ["both-directions", "strided", "shorter-than-kernel"])
def test_accuracy_float64(name: str) -> None:
    case = CONV_CASES[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float64), backend="torch"), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["both-directions", "strided", "long"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_in_16_bits(backend: str, name: str, dtype: torch.dtype) -> None:
    case = CONV_CASES[name]
    assert_accurate(case, run(case, inputs_in(case, dtype), backend=backend), dtype)


def test_reference_equals_torch_convolution() -> None:
    case = CONV_CASES["plain"]
    x, weight = inputs_in(case, torch.float64).values()
    expected = F.conv1d(x.mT, weight.unsqueeze(1), padding=case.k - 1, groups=case.d)[..., : case.l].mT
    y, final_state = causal_conv1d(x, weight, activation=None, backend="reference")
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(final_state, x[:, -3:].mT)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_with_carried_state_equal_one_pass(backend: str, reverse: bool) -> None:
    case = ConvCase(l=60, b=2, d=6, packed=25, reverse=reverse)
    seq_idx = case.options["seq_idx"]
    bounds = [0, 1, 3, 23, 24, case.l]  # not where a packed sequence starts: a piece always continues from its state
    spans = [slice(i, j) for i, j in itertools.pairwise(bounds)]

    def operator(x: Tensor, initial_state: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
        outputs, state = {}, initial_state
        for span in reversed(spans) if reverse else spans:
            outputs[span.start], state = causal_conv1d(
                x[:, span],
                **parameters,
                initial_state=state,
                seq_idx=seq_idx[:, span],
                reverse=reverse,
                backend=backend,
            )
        return torch.cat([outputs[span.start] for span in spans], dim=1), state

    assert_accurate(case, outputs_and_gradients(operator, inputs_in(case, torch.float32)), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_final_state_hides_earlier_packed_sequences(backend: str) -> None:
    x, weight = torch.randn(1, 6, 3), torch.randn(3, 4)
    _, state = causal_conv1d(x, weight, seq_idx=torch.tensor([[1, 1, 1, 1, 2, 2]]), backend=backend)
    torch.testing.assert_close(state, torch.cat([torch.zeros(1, 3, 1), x[:, 4:].mT], dim=-1), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_equals_flip_convolution_flip(backend: str) -> None:
    case = ConvCase(l=70, b=2, d=6, packed=20)
    inputs, seq_idx = inputs_in(case, torch.float32), case.options["seq_idx"]

    def flipped(**kw: Tensor) -> tuple[Tensor, Tensor]:
        y, state = causal_conv1d(**flip_inputs(kw, ("x",)), seq_idx=seq_idx.flip(1), backend=backend)
        return y.flip(1), state

    actual = run(case, inputs, reverse=True, backend=backend)
    torch.testing.assert_close(actual, outputs_and_gradients(flipped, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("k", "activation"), [(4, "silu"), (1, None), (2, "silu")])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_step_equals_convolution(backend: str, k: int, activation: str | None, dtype: torch.dtype) -> None:
    case = ConvCase(l=12, b=3, d=8, k=k)
    inputs = inputs_in(case, dtype)
    y, final_state = causal_conv1d(**inputs, activation=activation, backend="reference")
    x, state = inputs.pop("x"), inputs.pop("initial_state").clone()
    memory = state.data_ptr()
    for t in range(case.l):
        out = causal_conv1d_step(state, x[:, t], **inputs, activation=activation, backend=backend)
        torch.testing.assert_close(out, y[:, t], rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert state.data_ptr() == memory
    torch.testing.assert_close(state, final_state, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_equal_bits(backend: str) -> None:
    case = ConvCase(l=600, b=3, d=140, packed=70, reverse=(True, False))
    inputs = inputs_in(case, torch.float32)
    torch.testing.assert_close(run(case, inputs, backend=backend), run(case, inputs, backend=backend), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    case = ConvCase(l=20, b=2, d=6, packed=6)
    t = {k: x.requires_grad_() for k, x in inputs_in(case, torch.float32).items()}
    forward = torch.ops.seqssm.causal_conv1d.default
    every = (t["x"], t["weight"], t["bias"], True, t["initial_state"], case.options["seq_idx"], (False, True), backend)
    torch.library.opcheck(forward, every)
    torch.library.opcheck(forward, (t["x"], t["weight"], None, False, None, None, (True,), backend))


def test_compiles_without_graph_breaks() -> None:
    case = CONV_CASES["both-directions"]
    inputs = inputs_in(case, torch.float32)

    def operator(**kw: Tensor) -> tuple[Tensor, Tensor]:
        y, state = causal_conv1d(**kw | {"x": kw["x"] * 2}, **case.options)
        return y + 1, state

    expected = outputs_and_gradients(operator, inputs)
    compiled = outputs_and_gradients(torch.compile(operator, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(20, 6)}, r"x must be floating point \(b, l, d\)"),
        ({"x": torch.zeros(1, 0, 6)}, "may be empty"),
        ({"weight": torch.zeros(5, 4)}, "weight must have shape"),
        ({"weight": torch.zeros(6, 0)}, "weight must have shape"),
        ({"bias": torch.zeros(5)}, "bias must have shape"),
        ({"initial_state": torch.zeros(1, 3, 6)}, "the state must have shape"),
        ({"seq_idx": torch.zeros(1, 20)}, "seq_idx must be an integer"),
        ({"reverse": (True, False, True, False)}, "split evenly into 4"),
        ({"reverse": ()}, "one bool a group"),
        ({"activation": "gelu"}, "activation must be"),
        ({"backend": "numpy"}, "choose 'auto' or one of"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = inputs_in(ConvCase(l=20, d=6), torch.float32) | change
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments)
