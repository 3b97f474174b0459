"""Every CPU backend of the selective scan against the float64 reference, and what the operator promises."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import SCAN_CASES, ScanCase, assert_accurate, flip_inputs, inputs_in, outputs_and_gradients, run
from torch import Tensor

from seqssm.kernels import selective_scan, selective_scan_step
from seqssm.kernels.selective_scan.op import CHUNK

BACKENDS = ("torch", "numba")
TIMED = ("u", "delta", "B", "C", "z")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that a result that was never written shows."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("name", SCAN_CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(backend: str, name: str) -> None:
    case = SCAN_CASES[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float32), backend=backend), torch.float32)


@pytest.mark.parametrize("name", ["both-directions", "strided", "chunk+1-reverse", "many-states"])
def test_accuracy_float64(name: str) -> None:
    case = SCAN_CASES[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float64), backend="torch"), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["chunk+1", "both-directions", "strided", "wide"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_in_16_bits(backend: str, name: str, dtype: torch.dtype) -> None:
    case = SCAN_CASES[name]
    result = run(case, inputs_in(case, dtype), backend=backend)
    assert_accurate(case, result, dtype)
    assert result["y"].dtype == dtype
    assert result["final_state"].dtype == torch.float32


@pytest.mark.parametrize("optional", ["D", "z", "delta_bias", "initial_state", "delta_softplus"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_optional_input_alone(backend: str, optional: str) -> None:
    case = ScanCase(l=40, b=2, d=6)
    inputs = {k: x for k, x in inputs_in(case, torch.float32).items() if k in {"u", "delta", "A", "B", "C", optional}}
    if optional != "delta_softplus":
        inputs |= {k: inputs[k].exp() for k in ("delta", "delta_bias") if k in inputs}  # a step is positive

    def both(name: str) -> dict[str, Tensor]:
        def operator(**kw: Tensor) -> tuple[Tensor, Tensor]:
            return selective_scan(**kw, delta_softplus=optional == "delta_softplus", backend=name)

        return outputs_and_gradients(operator, inputs)

    torch.testing.assert_close(both(backend), both("reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("delta", [-200.0, -30.0, 19.9, 20.1, 200.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_steps_stay_finite_and_right(backend: str, delta: float) -> None:
    case = ScanCase(l=30, d=4)
    inputs = inputs_in(case, torch.float32)
    inputs["delta"] = inputs["delta"] * 0.01 + delta
    inputs["z"] = inputs["z"] * 100
    actual, expected = (run(case, inputs, backend=name) for name in (backend, "reference"))
    for key, x in actual.items():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(x, expected[key], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_with_carried_state_equal_one_pass(backend: str, reverse: bool) -> None:
    case = ScanCase(l=CHUNK + 90, b=2, d=6, packed=50, reverse=reverse)
    seq_idx = case.options["seq_idx"]
    bounds = [0, 1, 70, 299, case.l]  # not where a packed sequence starts: a piece always continues from its state
    spans = [slice(i, j) for i, j in itertools.pairwise(bounds)]

    def operator(initial_state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs, state = {}, initial_state
        for span in reversed(spans) if reverse else spans:
            piece = {k: x[:, span] if k in TIMED else x for k, x in inputs.items()}
            outputs[span.start], state = selective_scan(
                **piece,
                delta_softplus=True,
                initial_state=state,
                seq_idx=seq_idx[:, span],
                reverse=reverse,
                backend=backend,
            )
        return torch.cat([outputs[span.start] for span in spans], dim=1), state

    assert_accurate(case, outputs_and_gradients(operator, inputs_in(case, torch.float32)), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_equals_flip_scan_flip(backend: str) -> None:
    case = ScanCase(l=CHUNK + 7, b=2, d=6, packed=50)
    inputs, seq_idx = inputs_in(case, torch.float32), case.options["seq_idx"]

    def flipped(**kw: Tensor) -> tuple[Tensor, Tensor]:
        y, state = selective_scan(
            **flip_inputs(kw, TIMED), delta_softplus=True, seq_idx=seq_idx.flip(1), backend=backend
        )
        return y.flip(1), state

    actual = run(case, inputs, reverse=True, backend=backend)
    torch.testing.assert_close(actual, outputs_and_gradients(flipped, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_launch_of_both_directions_equals_two(backend: str) -> None:
    case = ScanCase(l=90, b=2, d=10, g=2)
    inputs = inputs_in(case, torch.float32)
    both, state = selective_scan(**inputs, delta_softplus=True, reverse=(False, True), backend=backend)
    for group, reverse in enumerate((False, True)):
        half = slice(5 * group, 5 * group + 5)
        own = {
            k: x[:, :, group] if k in "BC" else x[half] if k in ("A", "D", "delta_bias") else x
            for k, x in inputs.items()
        }
        own |= {k: inputs[k][..., half] for k in ("u", "delta", "z")} | {
            "initial_state": inputs["initial_state"][:, half]
        }
        y, final_state = selective_scan(**own, delta_softplus=True, reverse=reverse, backend=backend)
        torch.testing.assert_close(both[..., half], y, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state[:, half], final_state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_sees_a_later_one(backend: str) -> None:
    case = ScanCase(l=CHUNK + 40, b=2, d=6)
    inputs = inputs_in(case, torch.float32)
    y, _ = selective_scan(**inputs, delta_softplus=True, backend=backend)
    for cut in (1, 37, CHUNK, CHUNK + 1):
        changed = {k: torch.cat([x[:, :cut], -x[:, cut:]], dim=1) if k in TIMED else x for k, x in inputs.items()}
        after, _ = selective_scan(**changed, delta_softplus=True, backend=backend)
        torch.testing.assert_close(after[:, :cut], y[:, :cut], rtol=0, atol=0)
        assert not torch.equal(after[:, cut:], y[:, cut:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_step_equals_scan(backend: str, groups: int | None, dtype: torch.dtype) -> None:
    case = ScanCase(l=20, b=3, d=8, n=5, g=groups or 1)
    inputs = inputs_in(case, dtype)
    if groups is None:
        inputs |= {k: inputs[k].squeeze(2) for k in "BC"}
    y, final_state = selective_scan(**inputs, delta_softplus=True, backend="reference")
    state = inputs.pop("initial_state").clone()
    memory = state.data_ptr()
    for t in range(case.l):
        token = {k: x[:, t] if k in TIMED else x for k, x in inputs.items()}
        out = selective_scan_step(state, **token, delta_softplus=True, backend=backend)
        torch.testing.assert_close(out, y[:, t], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    assert state.data_ptr() == memory
    torch.testing.assert_close(state, final_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    case = ScanCase(l=100)
    inputs = inputs_in(case, torch.float32)
    token = {k: x[:, 0] if k in ("u", "delta", "B", "C", "z") else x for k, x in inputs.items()}
    state = token.pop("initial_state")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        h = state.clone()
        return selective_scan_step(h, **token, delta_softplus=True, backend=backend), h

    expected = run(case, inputs, backend=backend), step()
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(case, inputs, backend=backend), step()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_equal_bits(backend: str) -> None:
    case = ScanCase(l=600, b=2, d=140, n=8, g=2, packed=70, reverse=(True, False))
    inputs = inputs_in(case, torch.float32)
    torch.testing.assert_close(run(case, inputs, backend=backend), run(case, inputs, backend=backend), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(backend: str) -> None:
    case = SCAN_CASES["groups"]
    inputs = inputs_in(case, torch.float32)
    full = run(case, inputs, backend=backend)
    inputs["u"].requires_grad_()
    _, final_state = selective_scan(**inputs, **case.options, backend=backend)
    final_state.sum().backward()
    assert inputs["A"].grad is None
    leaves = {k: x.detach().requires_grad_() for k, x in inputs.items()}
    selective_scan(**leaves, **case.options, backend="reference")[1].sum().backward()
    torch.testing.assert_close(inputs["u"].grad, leaves["u"].grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        y, _ = selective_scan(**inputs, **case.options, backend=backend)
    torch.testing.assert_close(y, full["y"], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend: str) -> None:
    inputs = {k: x.requires_grad_() for k, x in inputs_in(ScanCase(l=5), torch.float32).items()}
    y, _ = selective_scan(**inputs, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), inputs["u"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    case = ScanCase(l=20, b=2, d=6, g=2, packed=6)
    t = {k: x.requires_grad_() for k, x in inputs_in(case, torch.float32).items()}
    seq_idx = case.options["seq_idx"]
    every = (t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["delta_bias"], True, t["initial_state"])
    step = t["delta"].detach().exp().requires_grad_()
    few = (t["u"], step, t["A"], t["B"], t["C"], None, None, None, False, None)
    forward = torch.ops.seqssm.selective_scan.default
    torch.library.opcheck(forward, (*every, seq_idx, (False, True), True, backend))
    torch.library.opcheck(forward, (*few, None, (False, False), True, backend))


def test_compiles_without_graph_breaks() -> None:
    case = SCAN_CASES["groups"]
    inputs = inputs_in(case, torch.float32)

    def operator(**kw: Tensor) -> tuple[Tensor, Tensor]:
        y, state = selective_scan(**kw | {"u": kw["u"] * 2}, **case.options)
        return y + 1, state

    expected = outputs_and_gradients(operator, inputs)
    compiled = outputs_and_gradients(torch.compile(operator, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(1, 20)}, r"u must be floating point \(b, l, d\)"),
        ({"u": torch.zeros(1, 20, 6, dtype=torch.int32)}, "u must be floating point"),
        ({"delta": torch.zeros(1, 20, 5)}, "delta must have shape"),
        ({"A": torch.zeros(5, 4)}, "A must have shape"),
        ({"B": torch.zeros(1, 20, 4, 4)}, "split evenly"),
        ({"C": torch.zeros(1, 20, 2, 3)}, "C must have shape"),
        ({"D": torch.zeros(4)}, "D must have shape"),
        ({"z": torch.zeros(1, 19, 6)}, "z must have shape"),
        ({"delta_bias": torch.zeros(6, dtype=torch.int64)}, "delta_bias must be floating point"),
        ({"initial_state": torch.zeros(1, 4, 6)}, "the state must have shape"),
        ({"seq_idx": torch.zeros(1, 20)}, "seq_idx must be an integer"),
        ({"seq_idx": torch.zeros(2, 20, dtype=torch.int32)}, "seq_idx must have shape"),
        ({"reverse": (True, False, True)}, "one bool a group"),
        ({"u": torch.zeros(1, 0, 6), "delta": torch.zeros(1, 0, 6)}, "no dimension may be empty"),
        ({"D": torch.zeros(6, device="meta")}, "move them to one device"),
        ({"backend": "cuda"}, "choose 'auto' or one of"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = inputs_in(ScanCase(l=20, d=6, g=2), torch.float32) | change
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)


def test_numba_refuses_float64() -> None:
    with pytest.raises(ValueError, match="use backend='torch'"):
        selective_scan(**inputs_in(ScanCase(l=4), torch.float64), backend="numba")


def test_step_refuses_gradients() -> None:
    inputs = inputs_in(ScanCase(l=1), torch.float32)
    state = inputs.pop("initial_state")
    token = {k: x[:, 0] if k in TIMED else x for k, x in inputs.items()}
    token["u"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        selective_scan_step(state, **token)
