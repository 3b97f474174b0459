"""The torch backend of the SSD scan against the float64 reference, and what the operator promises."""

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import SSD_CASES, SSDCase, assert_accurate, flip_inputs, inputs_in, outputs_and_gradients, run
from torch import Tensor

from seqssm.kernels import ssd, ssd_step
from seqssm.kernels.ssd import slabs, vectorized

TIMED = ("x", "dt", "B", "C", "z")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that a result that was never written shows."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def many_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk the sequence two chunks at a time, as long sequences are."""
    monkeypatch.setattr(slabs, "_slab_chunks", lambda *_: 2)


@pytest.mark.parametrize("name", SSD_CASES)
def test_accuracy(name: str) -> None:
    case = SSD_CASES[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float32), backend="torch"), torch.float32)


@pytest.mark.parametrize("name", ["long", "long-chunks", "short-chunks", "both-directions", "many-sequences"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("many_slabs")
def test_accuracy_over_many_slabs(name: str, dtype: torch.dtype) -> None:
    case = SSD_CASES[name]
    assert_accurate(case, run(case, inputs_in(case, dtype), backend="torch"), dtype)


@pytest.mark.parametrize("name", ["both-directions", "strided", "chunk+1-reverse", "many-states"])
def test_accuracy_float64(name: str) -> None:
    case = SSD_CASES[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float64), backend="torch"), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["chunk+1", "both-directions", "strided", "odd-shapes"])
def test_accuracy_in_16_bits(name: str, dtype: torch.dtype) -> None:
    case = SSD_CASES[name]
    result = run(case, inputs_in(case, dtype), backend="torch")
    assert_accurate(case, result, dtype)
    assert result["y"].dtype == dtype
    assert result["final_state"].dtype == torch.float32


@pytest.mark.parametrize("optional", ["D", "z", "dt_bias", "initial_state", "dt_softplus"])
def test_each_optional_input_alone(optional: str) -> None:
    case = SSDCase(l=40, b=2)
    inputs = {k: x for k, x in inputs_in(case, torch.float32).items() if k in {"x", "dt", "A", "B", "C", optional}}
    if optional != "dt_softplus":
        inputs |= {k: inputs[k].exp() for k in ("dt", "dt_bias") if k in inputs}  # a step is positive
    actual, expected = (
        outputs_and_gradients(functools.partial(ssd, dt_softplus=optional == "dt_softplus", backend=name), inputs)
        for name in ("torch", "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dt", [-200.0, -30.0, 19.9, 20.1, 200.0])
def test_extreme_steps_stay_finite_and_right(dt: float) -> None:
    case = SSDCase(l=80)
    inputs = inputs_in(case, torch.float32)
    inputs["dt"] = inputs["dt"] * 0.01 + dt
    inputs["z"] = inputs["z"] * 100
    actual, expected = (run(case, inputs, backend=name) for name in ("torch", "reference"))
    for key, x in actual.items():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(x, expected[key], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, k=key: f"{k}: {m}")


def test_strong_decays_cost_no_precision() -> None:
    """Log decays add up to thousands in a chunk: differences of their rounded sums would lose three digits."""
    case = SSDCase(l=256, h=3, chunk=256)
    inputs = inputs_in(case, torch.float32)
    inputs["A"] = torch.tensor([-0.01, -1.0, -16.0])
    inputs["dt"] = inputs["dt"] + 2
    exact = run(case, {k: x.double() for k, x in inputs.items()}, backend="reference")
    actual, plain = (run(case, inputs, backend=name) for name in ("torch", "reference"))
    for key in ("y", "dx", "ddt", "dB", "dC", "dz"):
        error, limit = ((x[key] - exact[key]).square().mean().sqrt() for x in (actual, plain))
        assert error <= 2 * limit, f"{key}: {error:.2e}, reference {limit:.2e}"


def test_growing_states_are_right_too() -> None:
    case = SSDCase(l=70, h=3)
    inputs = inputs_in(case, torch.float32)
    inputs["A"] = torch.tensor([0.02, 0.0, -0.02])
    assert_close_to_scale(run(case, inputs, backend="torch"), run(case, inputs, backend="reference"))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.usefixtures("many_slabs")
def test_pieces_with_carried_state_equal_one_pass(reverse: bool) -> None:
    case = SSDCase(l=200, b=2, packed=50, reverse=reverse, chunk=32)
    seq_idx = case.options["seq_idx"]
    bounds = [0, 1, 32, 77, 165, case.l]  # not where a packed sequence starts: a piece always continues from its state
    spans = [slice(i, j) for i, j in itertools.pairwise(bounds)]

    def operator(initial_state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs, state = {}, initial_state
        for span in reversed(spans) if reverse else spans:
            piece = {k: x[:, span] if k in TIMED else x for k, x in inputs.items()}
            options = case.options | {"initial_state": state, "seq_idx": seq_idx[:, span]}
            outputs[span.start], state = ssd(**piece, **options, backend="torch")
        return torch.cat([outputs[span.start] for span in spans], dim=1), state

    assert_accurate(case, outputs_and_gradients(operator, inputs_in(case, torch.float32)), torch.float32)


def test_reverse_equals_flip_scan_flip() -> None:
    case = SSDCase(l=135, b=2, packed=50)
    inputs, seq_idx = inputs_in(case, torch.float32), case.options["seq_idx"]

    def flipped(**kw: Tensor) -> tuple[Tensor, Tensor]:
        y, state = ssd(**flip_inputs(kw, TIMED), dt_softplus=True, seq_idx=seq_idx.flip(1), backend="torch")
        return y.flip(1), state

    # The chunks lie elsewhere, so the roundings differ.
    actual = run(case, inputs, reverse=True, backend="torch")
    assert_close_to_scale(actual, outputs_and_gradients(flipped, inputs), 1e-5)


def test_one_call_with_both_directions_equals_two() -> None:
    case = SSDCase(l=90, b=2, h=4, g=2)
    inputs = inputs_in(case, torch.float32)
    both, state = ssd(**inputs, dt_softplus=True, reverse=(False, True), backend="torch")
    for group, reverse in enumerate((False, True)):
        half = slice(2 * group, 2 * group + 2)
        own = {
            k: x[:, :, group : group + 1] if k in "BC" else x[half] if k in ("A", "D", "dt_bias") else x
            for k, x in inputs.items()
        }
        own |= {k: inputs[k][:, :, half] for k in ("x", "dt", "z")}
        own["initial_state"] = inputs["initial_state"][:, half]
        y, final_state = ssd(**own, dt_softplus=True, reverse=reverse, backend="torch")
        torch.testing.assert_close(both[:, :, half], y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[:, half], final_state, rtol=1e-5, atol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    case = SSDCase(l=150, b=2)
    inputs = inputs_in(case, torch.float32)
    y, _ = ssd(**inputs, dt_softplus=True, backend="torch")
    for cut in (1, 37, 64, 65):
        changed = {k: torch.cat([x[:, :cut], -x[:, cut:]], dim=1) if k in TIMED else x for k, x in inputs.items()}
        after, _ = ssd(**changed, dt_softplus=True, backend="torch")
        torch.testing.assert_close(after[:, :cut], y[:, :cut], rtol=0, atol=0)
        assert not torch.equal(after[:, cut:], y[:, cut:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("D_p", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_step_equals_scan(backend: str, D_p: bool, dtype: torch.dtype) -> None:
    case = SSDCase(l=20, b=3, h=4, p=5, n=6, g=2, D_p=D_p)
    inputs = inputs_in(case, dtype)
    y, final_state = ssd(**inputs, dt_softplus=True, backend="reference")
    state = inputs.pop("initial_state").clone()
    memory = state.data_ptr()
    for t in range(case.l):
        token = {k: x[:, t] if k in TIMED else x for k, x in inputs.items()}
        out = ssd_step(state, **token, dt_softplus=True, backend=backend)
        torch.testing.assert_close(out, y[:, t], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    assert state.data_ptr() == memory
    torch.testing.assert_close(state, final_state, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("many_slabs")
def test_two_runs_give_equal_bits() -> None:
    case = SSDCase(l=600, b=2, h=6, p=16, g=2, packed=70, reverse=(True, False))
    inputs = inputs_in(case, torch.float32)
    torch.testing.assert_close(run(case, inputs, backend="torch"), run(case, inputs, backend="torch"), rtol=0, atol=0)


def test_gradients_only_where_asked() -> None:
    case = SSD_CASES["groups"]
    inputs = inputs_in(case, torch.float32)
    full = run(case, inputs, backend="torch")
    inputs["x"].requires_grad_()
    _, final_state = ssd(**inputs, **case.options, backend="torch")
    final_state.sum().backward()
    assert inputs["A"].grad is None
    leaves = {k: x.detach().requires_grad_() for k, x in inputs.items()}
    ssd(**leaves, **case.options, backend="reference")[1].sum().backward()
    torch.testing.assert_close(inputs["x"].grad, leaves["x"].grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        y, _ = ssd(**inputs, **case.options, backend="torch")
    torch.testing.assert_close(y, full["y"], rtol=0, atol=0)


def test_autocast_and_fast_matmul_settings_change_nothing() -> None:
    case = SSDCase(l=100, h=4, p=16, n=16)
    inputs = inputs_in(case, torch.float32)
    expected = run(case, inputs, backend="torch")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            actual = run(case, inputs, backend="torch")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_memory_first_used_in_inference_mode_serves_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorized, "memory", slabs.Memory())
    case = SSDCase(l=70)
    inputs = inputs_in(case, torch.float32)
    with torch.inference_mode():
        y, _ = ssd(**inputs, **case.options, backend="torch")
    torch.testing.assert_close(run(case, inputs, backend="torch")["y"], y, rtol=0, atol=0)


def test_results_are_not_overwritten_by_the_next_call() -> None:
    case = SSDCase(l=70, b=2)
    inputs = inputs_in(case, torch.float32)
    first = run(case, inputs, backend="torch")
    kept = {k: x.clone() for k, x in first.items()}
    run(case, {k: 2 * x for k, x in inputs.items()}, backend="torch")
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SSD_CASES)
def test_accuracy_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case = SSD_CASES[name]
    seq_idx = case.options["seq_idx"]
    options = {"backend": "torch", "seq_idx": None if seq_idx is None else seq_idx.cuda()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # which must not reach the scan
    try:
        actual = run(case, inputs_in(case, dtype, "cuda"), **options)
    finally:
        torch.set_float32_matmul_precision(before)
    # In float64 the yardstick is the reference itself, whose error counts as none: sums in another order differ.
    assert_accurate(case, actual, dtype, roundings=128 if dtype == torch.float64 else 16)


def test_a_second_derivative_is_refused() -> None:
    inputs = {k: x.requires_grad_() for k, x in inputs_in(SSDCase(l=5), torch.float32).items()}
    y, _ = ssd(**inputs, backend="torch")
    (gradient,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_opcheck() -> None:
    case = SSDCase(l=20, b=2, g=2, packed=6)
    t = {k: x.requires_grad_() for k, x in inputs_in(case, torch.float32).items()}
    every = (t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], t["z"], t["dt_bias"], True, t["initial_state"])
    step = t["dt"].detach().exp().requires_grad_()
    few = (t["x"], step, t["A"], t["B"], t["C"], None, None, None, False, None)
    forward = torch.ops.seqssm.ssd.default
    torch.library.opcheck(forward, (*every, case.options["seq_idx"], (False, True), 16, True, "torch"))
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, (*few, None, (False, False), None, True, "torch"), test_utils=quick)


def test_compiles_without_graph_breaks() -> None:
    case = SSD_CASES["groups"]
    inputs = inputs_in(case, torch.float32)

    def operator(**kw: Tensor) -> tuple[Tensor, Tensor]:
        y, state = ssd(**kw | {"x": kw["x"] * 2}, **case.options)
        return y + 1, state

    expected = outputs_and_gradients(operator, inputs)
    compiled = outputs_and_gradients(torch.compile(operator, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 20, 16)}, r"x must be floating point \(b, l, h, p\)"),
        ({"x": torch.zeros(1, 20, 4, 8, dtype=torch.int32)}, "x must be floating point"),
        ({"dt": torch.zeros(1, 20, 3)}, "dt must have shape"),
        ({"A": torch.zeros(4, 8)}, "A must have shape"),
        ({"B": torch.zeros(1, 20, 8)}, "B must have shape"),
        ({"B": torch.zeros(1, 20, 3, 8)}, "split evenly"),
        ({"C": torch.zeros(1, 20, 2, 7)}, "C must have shape"),
        ({"D": torch.zeros(3)}, r"D must have shape \(h,\) or \(h, p\)"),
        ({"D": torch.zeros(4, 7)}, "D must have shape"),
        ({"z": torch.zeros(1, 19, 4, 8)}, "z must have shape"),
        ({"dt_bias": torch.zeros(4, dtype=torch.int64)}, "dt_bias must be floating point"),
        ({"initial_state": torch.zeros(1, 4, 8, 7)}, "initial_state must have shape"),
        ({"seq_idx": torch.zeros(1, 20)}, "seq_idx must be an integer"),
        ({"seq_idx": torch.zeros(2, 20, dtype=torch.int32)}, "seq_idx must have shape"),
        ({"reverse": (True, False, True)}, "one bool a group"),
        ({"x": torch.zeros(1, 0, 4, 8), "dt": torch.zeros(1, 0, 4)}, "no dimension may be empty"),
        ({"D": torch.zeros(4, device="meta")}, "move them to one device"),
        ({"chunk": 0}, "chunk must be a positive number"),
        ({"backend": "numba"}, "choose 'auto' or one of reference, torch"),
        ({"backend": "cuda"}, "choose 'auto' or one of"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = inputs_in(SSDCase(l=20, h=4, g=2), torch.float32) | change
    with pytest.raises(ValueError, match=message):
        ssd(**arguments)


def test_step_refuses_gradients_and_narrow_states() -> None:
    inputs = inputs_in(SSDCase(l=1), torch.float32)
    state = inputs.pop("initial_state")
    token = {k: x[:, 0] if k in TIMED else x for k, x in inputs.items()}
    with pytest.raises(ValueError, match=r"state must be torch.float32"):
        ssd_step(state.bfloat16(), **token)
    token["x"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        ssd_step(state, **token)


def assert_close_to_scale(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    for key, x in actual.items():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(
            x, expected[key], rtol=tolerance, atol=tolerance * scale, msg=lambda m, k=key: f"{k}: {m}"
        )
