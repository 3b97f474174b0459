"""The Triton SSD scan: in Triton's interpreter on the CPU at tiny sizes, and on a GPU (``pytest -m gpu``)."""

import functools
import importlib
from collections.abc import Iterator

import pytest
import torch
from cases import (
    SSD_CASES,
    Results,
    SSDCase,
    assert_accurate,
    assert_same_from_afar,
    distances,
    far_view,
    inputs_in,
    outputs_and_gradients,
    run,
    yardstick,
)
from interpreter import assert_passes_interpreted, interpreted
from torch import Tensor

from seqssm.kernels import ssd, ssd_step

TIMED = ("x", "dt", "B", "C", "z")
TINY = {  # chunks of 16 tokens, segments of 32, blocks of 16 channels, one segment a slab
    "one-token": SSDCase(l=1, b=2),
    "one-token-plain": SSDCase(l=1, optional=False, state=False),
    "63-tokens": SSDCase(l=63, optional=False, state=False),
    "chunk-1": SSDCase(l=15, h=1, p=3, n=5),
    "chunk+1-reverse": SSDCase(l=17, reverse=True, packed=5),
    "both-directions": SSDCase(l=35, h=2, p=4, g=2, reverse=(False, True), packed=13),
    "channel-blocks": SSDCase(l=18, p=19, n=17, D_p=True),
    "strided": SSDCase(l=18, b=2, g=2, packed=1, strided=True, reverse=True),
}


def test_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that a result that was never written shows."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


@functools.cache
def rounding_noise(case: SSDCase, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """How far results move when every x, B, C, D and initial state is rounded once more, at random: the most of eight
    times. A gradient of a few numbers, as dA is, moves by ten times more in one draw than in another."""
    generator = torch.Generator().manual_seed(0)
    inputs = {k: v.double() for k, v in inputs_in(case, dtype).items()}
    exact = yardstick(case, dtype)[0]
    moves = []
    for _ in range(8):
        moved = dict(inputs)
        for name in sorted(inputs.keys() & {"x", "B", "C", "D", "initial_state"}):
            noise = torch.rand(inputs[name].shape, generator=generator, dtype=torch.float64) - 0.5
            moved[name] = inputs[name] * (1 + torch.finfo(dtype).eps * noise)
        moves.append({name: distances(x, exact[name]) for name, x in run(case, moved, backend="torch").items()})
    return {name: tuple(max(m[name][i] for m in moves) for i in range(2)) for name in exact}


def assert_accurate_in_16_bits(case: SSDCase, actual: Results, dtype: torch.dtype) -> None:
    """Products of 16-bit inputs round their operands to 16 bits, also where the result is float32. So the limit is
    twice what such roundings of the inputs do, and twice the rounding of the result as everywhere."""
    exact, plain = yardstick(case, dtype)
    for name, x in actual.items():
        assert x.dtype == plain[name].dtype, f"{name} has dtype {x.dtype}, expected {plain[name].dtype}"
        error, bound = distances(x, exact[name]), distances(plain[name], exact[name])
        for e, own, noise in zip(error, bound, rounding_noise(case, dtype)[name], strict=True):
            assert e <= 2 * own + 2 * noise, f"{name}: error {e:.2e}, one rounding {noise:.2e}, reference {own:.2e}"


@interpreted
@pytest.mark.usefixtures("tiny")
def test_strides_beyond_32_bits() -> None:
    case = SSDCase(l=9, h=3, p=2, n=2, reverse=True)
    scan = functools.partial(ssd, dt_softplus=True, reverse=True, backend="triton")
    assert_same_from_afar(case, TIMED, scan)


@interpreted
def test_step_with_strides_beyond_32_bits() -> None:
    token = {k: x[:, 0] if k in TIMED else x
             for k, x in inputs_in(SSDCase(l=1, b=2, h=2, p=3, n=2), torch.float16).items()}  # fmt: skip
    state = token.pop("initial_state")
    far = {k: far_view(x) if k in TIMED else x for k, x in token.items()}
    states = state.clone(), state.clone()
    step = functools.partial(ssd_step, dt_softplus=True, backend="triton")
    torch.testing.assert_close(step(states[0], **far), step(states[1], **token), rtol=0, atol=0)
    torch.testing.assert_close(*states, rtol=0, atol=0)


@interpreted
@pytest.mark.usefixtures("tiny", "poison")
@pytest.mark.parametrize("name", TINY)
def test_accuracy_float32(name: str) -> None:
    case = TINY[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float32), backend="triton"), torch.float32)


@interpreted
@pytest.mark.usefixtures("tiny", "poison")
@pytest.mark.parametrize("name", ["both-directions", "strided"])
def test_accuracy_float16(name: str) -> None:  # the interpreter truncates to bfloat16
    case = TINY[name]
    result = run(case, inputs_in(case, torch.float16), backend="triton")
    assert_accurate_in_16_bits(case, result, torch.float16)
    assert result["y"].dtype == torch.float16
    assert result["final_state"].dtype == torch.float32


@interpreted
@pytest.mark.usefixtures("tiny", "poison")
def test_summed_heads_equal_split_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("seqssm.kernels.ssd.triton")
    monkeypatch.setattr(module, "_ENOUGH_SUMS", 1)
    case = SSDCase(l=17, h=4, g=2)
    assert_accurate(case, run(case, inputs_in(case, torch.float32), backend="triton"), torch.float32)


@interpreted
@pytest.mark.usefixtures("tiny", "poison")
def test_mixed_dtypes_are_multiplied_in_float32() -> None:
    case = SSDCase(l=20)
    inputs = inputs_in(case, torch.float32)
    inputs["B"] = inputs["B"].half()
    actual, expected = (run(case, inputs, backend=name) for name in ("triton", "reference"))
    assert actual["dB"].dtype == torch.float16
    torch.testing.assert_close(actual["final_state"], expected["final_state"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual["dx"], expected["dx"], rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.usefixtures("tiny", "poison")
def test_strong_decays_cost_no_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log decays add up to thousands in a chunk: differences of their rounded sums would lose three digits."""
    for name, value in {"_CHUNK": {True: 64}, "_SEGMENT": 64, "_SHORTEST_SEGMENT": 64}.items():
        monkeypatch.setattr(importlib.import_module("seqssm.kernels.ssd.triton"), name, value)
    case = SSDCase(l=64, h=3)
    inputs = inputs_in(case, torch.float32)
    inputs["A"] = torch.tensor([-0.01, -4.0, -64.0])
    inputs["dt"] = inputs["dt"] + 2
    exact = run(case, {k: x.double() for k, x in inputs.items()}, backend="reference")
    actual, plain = (run(case, inputs, backend=name) for name in ("triton", "reference"))
    for key in ("y", "dx", "ddt", "dB", "dC", "dz"):
        error, limit = (distances(x[key], exact[key])[0] for x in (actual, plain))
        assert error <= 2 * limit, f"{key}: {error:.2e}, reference {limit:.2e}"


@interpreted
@pytest.mark.parametrize("groups", [1, 2])
def test_step_equals_scan(groups: int) -> None:
    check_step(groups, torch.float32, "cpu")


def check_step(groups: int, dtype: torch.dtype, device: str) -> None:
    case = SSDCase(l=3, b=2, h=4, p=5, n=6, g=groups, D_p=groups == 2)
    inputs = inputs_in(case, dtype, device)
    y, final_state = ssd(**inputs, dt_softplus=True, backend="reference")
    state = inputs.pop("initial_state").clone()
    for t in range(case.l):
        token = {k: x[:, t] if k in TIMED else x for k, x in inputs.items()}
        out = ssd_step(state, **token, dt_softplus=True, backend="triton")
        torch.testing.assert_close(out, y[:, t], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    torch.testing.assert_close(state, final_state, rtol=1e-4, atol=1e-5)


def on_gpu(case: SSDCase, dtype: torch.dtype) -> Results:
    options = {} if case.options["seq_idx"] is None else {"seq_idx": case.options["seq_idx"].cuda()}
    return run(case, inputs_in(case, dtype, "cuda"), backend="triton", **options)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", SSD_CASES)
def test_accuracy_on_gpu(name: str) -> None:
    # The hardware's exp2 is good to two units in the last place, which a long memory adds up.
    assert_accurate(SSD_CASES[name], on_gpu(SSD_CASES[name], torch.float32), torch.float32, roundings=64)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SSD_CASES)
def test_accuracy_in_16_bits_on_gpu(name: str, dtype: torch.dtype) -> None:
    assert_accurate_in_16_bits(SSD_CASES[name], on_gpu(SSD_CASES[name], dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(64, 128), (64, 256), (80, 64), (136, 72), (256, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slabs_and_equal_bits_on_gpu(
    dtype: torch.dtype, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several segments and slabs, with the widths that models have; the error against float64."""
    module = importlib.import_module("seqssm.kernels.ssd.triton")
    monkeypatch.setattr(module, "_KEPT_BYTES", 8 << 20)
    case = SSDCase(l=3001, b=2, h=4, p=sizes[0], n=sizes[1], g=2, reverse=(True, False))
    inputs = inputs_in(case, dtype, "cuda")
    first, second = (run(case, inputs, backend="triton") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    exact = run(case, {k: x.double() for k, x in inputs.items()}, backend="torch")
    for name, x in first.items():
        error = ((x - exact[name]).norm() / exact[name].norm()).item()
        assert error < (2e-2 if dtype == torch.bfloat16 else 2e-5), f"{name}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_chunks_on_gpu(chunk: int) -> None:
    case = SSDCase(l=500, h=4, p=64, n=32, packed=150, chunk=chunk)
    assert_accurate_in_16_bits(case, on_gpu(case, torch.bfloat16), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_offsets_beyond_two_to_the_31_on_gpu(reverse: bool) -> None:
    """The last tokens of 2**18 rows of a projection 8,512 wide: as a scan of them alone, entered by the state before,
    and the gradients of the first ones, which a reversed scan has at the far end."""
    l, h, p, n, tail = 1 << 18, 64, 64, 128, 512
    generator = torch.Generator("cuda").manual_seed(0)
    fused = torch.randn(1, l, 8512, generator=generator, device="cuda", dtype=torch.bfloat16)
    A = -torch.rand(h, generator=generator, device="cuda") - 1.0
    weight = torch.randn(1, tail, h, p, generator=generator, device="cuda", dtype=torch.bfloat16)

    def scan(rows: Tensor, state: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        _, x, B, C, dt = rows.split([h * p, h * p, n, n, h], dim=-1)
        x, B, C = x.unflatten(-1, (h, p)), B.unsqueeze(2), C.unsqueeze(2)
        options = {"dt_softplus": True, "initial_state": state, "reverse": reverse, "backend": backend}
        return ssd(x, dt, A, B, C, **options)

    end = slice(0, tail) if reverse else slice(l - tail, l)
    before = slice(tail, l) if reverse else slice(0, l - tail)
    with torch.no_grad():
        _, middle = scan(fused[:, before], None, "triton")
    whole = fused.requires_grad_()
    y, state = scan(whole, None, "triton")
    (y[:, end] * weight).float().sum().backward()
    part = fused.detach()[:, end].clone().requires_grad_()
    expected, final = scan(part, middle, "torch")
    (expected * weight).float().sum().backward()
    pairs = [(y[:, end], expected), (state, final), (whole.grad[:, end], part.grad)]
    for got, wanted in pairs:
        error = ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
        assert error < 2e-2, f"{error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_on_gpu(groups: int, dtype: torch.dtype) -> None:
    check_step(groups, dtype, "cuda")


@pytest.mark.gpu
def test_step_in_a_cuda_graph() -> None:
    case = SSDCase(l=1, b=2, h=4, p=64, n=128)
    inputs = inputs_in(case, torch.float32, "cuda")
    initial = inputs.pop("initial_state")
    token = {k: x[:, 0] if k in TIMED else x for k, x in inputs.items()}
    state = initial.clone()
    expected = [ssd_step(state, **token, dt_softplus=True) for _ in range(3)]
    captured = initial.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ssd_step(captured, **token, dt_softplus=True)
    captured.copy_(initial)
    for y in expected:
        graph.replay()
        torch.testing.assert_close(out, y, rtol=0, atol=0)
    torch.testing.assert_close(captured, state, rtol=0, atol=0)


@interpreted
@pytest.mark.usefixtures("tiny")
def test_operator() -> None:
    check_operator("cpu", l=20)


@pytest.mark.gpu
def test_operator_on_gpu() -> None:
    check_operator("cuda", l=300)
    case = SSDCase(l=300, b=2, g=2)

    def operator(**kw: Tensor) -> tuple[Tensor, Tensor]:
        y, state = ssd(**kw | {"x": kw["x"] * 2}, dt_softplus=True, reverse=(False, True))
        return y + 1, state

    expected = outputs_and_gradients(operator, inputs_in(case, torch.float32, "cuda"))
    compiled = outputs_and_gradients(torch.compile(operator, fullgraph=True), inputs_in(case, torch.float32, "cuda"))
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)


def check_operator(device: str, l: int) -> None:
    case = SSDCase(l=l, g=2)
    t = {k: x.requires_grad_() for k, x in inputs_in(case, torch.float32, device).items()}
    every = (t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], t["z"], t["dt_bias"], True, t["initial_state"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.seqssm.ssd.default
    torch.library.opcheck(operator, (*every, None, (False, True), None, True, "triton"), test_utils=tests)
