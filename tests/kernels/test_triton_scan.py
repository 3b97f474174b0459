"""The Triton selective scan: in Triton's interpreter on the CPU at tiny sizes, and on a GPU (``pytest -m gpu``)."""

import dataclasses
import functools
import importlib

import pytest
import torch
from cases import (
    SCAN_CASES,
    ScanCase,
    assert_accurate,
    assert_same_from_afar,
    far_view,
    inputs_in,
    outputs_and_gradients,
    run,
)
from interpreter import assert_passes_interpreted, interpreted
from ptx import Warp
from torch import Tensor

from seqssm.kernels import selective_scan, selective_scan_step
from seqssm.kernels.launching import Launcher
from seqssm.kernels.triton_tiles import sum_and_store_assembly

TINY = {  # chunks of 8 tokens, segments and tiles of 4
    "one-token": ScanCase(l=1, b=2, d=3, n=2, optional=False, state=False),
    "one-token-reverse": ScanCase(l=1, d=3, n=2, reverse=True),
    "segments": ScanCase(l=19, d=5, n=3),
    "both-directions": ScanCase(l=18, b=2, d=4, n=1, g=2, reverse=(False, True), packed=7),
    "strided": ScanCase(l=9, d=4, n=2, g=2, packed=1, strided=True, reverse=True),
    "channel-blocks": ScanCase(l=5, d=35, n=2),
    "whole-blocks": ScanCase(l=20, d=32, n=2),
}


def test_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@pytest.mark.parametrize(("count", "pack"), [(16, 2), (16, 1), (8, 1), (32, 1)])
def test_assembly_that_sums_over_lanes(count: int, pack: int) -> None:
    """The interpreter takes no assembly: run it on a warp in Python."""
    text, registers = sum_and_store_assembly(count, pack)
    values = torch.randn(count, pack, 32, generator=torch.Generator().manual_seed(0))
    warp = Warp()
    operands = [*values.flatten(0, 1), *[torch.full((32,), 4096)] * pack]
    assert registers.count(",") + 1 == pack + len(operands)
    warp.run(text, [torch.zeros(32)] * pack + operands)
    stored = torch.tensor([warp.memory[4096 + 4 * i] for i in range(count)])
    assert len(warp.memory) == count
    torch.testing.assert_close(stored, values.sum((1, 2)), rtol=0, atol=1e-5)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel for whole sequences of 16 states, however few there are."""
    module = importlib.import_module("seqssm.kernels.selective_scan.triton_single")
    monkeypatch.setattr(module, "_ENOUGH_PROGRAMS", 1)


def scanned_whole(case: ScanCase, inputs: dict[str, Tensor], **options: Tensor) -> dict[str, Tensor]:
    """The results of training, with those of inference, which takes that kernel, in the place of the outputs."""
    trained = run(case, inputs, backend="triton", **options)
    with torch.no_grad():
        y, final_state = selective_scan(**inputs, **{**case.options, **options}, backend="triton")
    return trained | {"y": y, "final_state": final_state}


@interpreted
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", TINY)
def test_accuracy_float32(name: str) -> None:
    case = TINY[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float32), backend="triton"), torch.float32)


@interpreted
@pytest.mark.usefixtures("tiny", "whole")
@pytest.mark.parametrize("name", TINY)
def test_accuracy_of_whole_sequences(name: str) -> None:
    case = dataclasses.replace(TINY[name], n=16)
    assert_accurate(case, scanned_whole(case, inputs_in(case, torch.float32)), torch.float32)


@interpreted
@pytest.mark.usefixtures("tiny")
def test_accuracy_float16() -> None:  # the interpreter truncates to bfloat16
    case = TINY["strided"]
    result = run(case, inputs_in(case, torch.float16), backend="triton")
    assert_accurate(case, result, torch.float16)
    assert result["y"].dtype == torch.float16
    assert result["final_state"].dtype == torch.float32


@interpreted
@pytest.mark.usefixtures("tiny")
def test_vectors_of_any_stride() -> None:
    case = ScanCase(l=9, d=4, n=2)
    inputs = inputs_in(case, torch.float32)
    inputs["D"], inputs["delta_bias"] = torch.full((1,), 0.5).expand(4), inputs["delta_bias"].repeat_interleave(2)[::2]
    whole = {name: x.contiguous() for name, x in inputs.items()}
    torch.testing.assert_close(run(case, inputs, backend="triton"), run(case, whole, backend="triton"), rtol=0, atol=0)


@interpreted
@pytest.mark.usefixtures("tiny", "whole")
@pytest.mark.parametrize("reverse", [False, True])
def test_whole_sequences_with_strides_beyond_32_bits(reverse: bool) -> None:
    inputs = inputs_in(ScanCase(l=9, d=3, n=16), torch.float16)
    far = {k: far_view(x) if k in ("u", "delta", "B", "C", "z") else x for k, x in inputs.items()}
    scan = functools.partial(selective_scan, delta_softplus=True, reverse=reverse, backend="triton")
    torch.testing.assert_close(scan(**far), scan(**inputs), rtol=0, atol=0)


@interpreted
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("reverse", [False, True])
def test_strides_beyond_32_bits(reverse: bool) -> None:
    case = ScanCase(l=9, d=3, n=2, reverse=reverse)
    scan = functools.partial(selective_scan, delta_softplus=True, reverse=reverse, backend="triton")
    assert_same_from_afar(case, ("u", "delta", "B", "C", "z"), scan)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "half", "pair"),
    [
        (torch.bfloat16, torch.int16, torch.int32),
        (torch.float16, torch.int32, torch.int64),
        (torch.float32, torch.int32, torch.int64),
    ],
)
def test_pairs_of_B_and_C_are_exact(dtype: torch.dtype, half: torch.dtype, pair: torch.dtype) -> None:
    from seqssm.kernels.selective_scan.triton_single import pair_kernel

    b, l, g, n, reverse = 2, 9, 2, 5, 0b10
    generator = torch.Generator().manual_seed(0)
    B, C = (torch.randn(b, l, g, n, generator=generator).to(dtype) for _ in range(2))
    B[0, 0, 0, 0], C[0, 0, 0, 0], C[0, 1, 0, 0] = float("inf"), -0.0, float("nan")
    pairs = torch.empty(b, g, l, n, dtype=pair)
    pair_kernel[(b * g * 3,)](
        B, C, pairs, *B.stride(), *C.stride(), l, g, n, reverse, BLOCK_T=4, BLOCK_N=4
    )  # fmt: skip
    expected = torch.stack([B, C], dim=-1).transpose(1, 2).to(torch.bfloat16 if half == torch.int16 else torch.float32)
    expected = torch.stack([expected[:, 0], expected[:, 1].flip(1)], dim=1)
    assert torch.equal(pairs.view(half).view(b, g, l, n, 2), expected.view(half))


@interpreted
@pytest.mark.parametrize("segments", [1, 4, 5, 11])  # one span; one; three, the last one short
@pytest.mark.parametrize("backward", [False, True])
def test_states_pass_through_spans(monkeypatch: pytest.MonkeyPatch, segments: int, backward: bool) -> None:
    module = importlib.import_module("seqssm.kernels.selective_scan.triton")
    monkeypatch.setattr(module, "_SPAN", 2)
    generator = torch.Generator().manual_seed(0)
    b, n, d, share = 2, 3, 20, 2
    ends, entering = torch.randn(b, segments, n, d, generator=generator), torch.randn(b, d, n, generator=generator)
    steps, a2 = torch.rand(b, segments, d, generator=generator), -torch.rand(n, d, generator=generator)
    steps[1, segments // 2, 3] = float("inf")  # a reset
    saved = None if backward else torch.empty(b, -(-segments // share), n, d)
    carry, leaving = ends.clone(), torch.empty(b, d, n)
    module._pass_states(
        Launcher((), carry.device), carry, steps, a2, entering, leaving, saved, segments, share, backward
    )
    h, expected = entering.mT, torch.empty_like(ends)
    for s in reversed(range(segments)) if backward else range(segments):
        expected[:, s] = h
        h = torch.exp2(a2 * steps[:, s, None]) * h + ends[:, s]
    torch.testing.assert_close(carry, expected)
    torch.testing.assert_close(leaving, h.mT)
    if saved is not None:
        torch.testing.assert_close(saved, expected[:, ::share])


@interpreted
def test_step_with_strides_beyond_32_bits() -> None:
    token = {k: x[:, 0] if x.dim() > 2 and k != "initial_state" else x
             for k, x in inputs_in(ScanCase(l=1, b=2, d=3, n=2), torch.float16).items()}  # fmt: skip
    state = token.pop("initial_state")
    far = {k: far_view(x) if k in ("u", "delta", "B", "C", "z") else x for k, x in token.items()}
    states = state.clone(), state.clone()
    step = functools.partial(selective_scan_step, delta_softplus=True, backend="triton")
    torch.testing.assert_close(step(states[0], **far), step(states[1], **token), rtol=0, atol=0)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert not torch.equal(states[0], state)


@interpreted
@pytest.mark.parametrize("groups", [1, 2])
def test_step_equals_scan(groups: int) -> None:
    check_step(groups, torch.float32, "cpu")


def check_step(groups: int, dtype: torch.dtype, device: str) -> None:
    case = ScanCase(l=4, b=3, d=8, n=5, g=groups)
    inputs = inputs_in(case, dtype, device)
    y, final_state = selective_scan(**inputs, delta_softplus=True, backend="reference")
    state = inputs.pop("initial_state").clone()
    for t in range(case.l):
        token = {k: x[:, t] if k in ("u", "delta", "B", "C", "z") else x for k, x in inputs.items()}
        out = selective_scan_step(state, **token, delta_softplus=True, backend="triton")
        torch.testing.assert_close(out, y[:, t], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    torch.testing.assert_close(state, final_state, rtol=1e-4, atol=1e-5)


def on_gpu(case: ScanCase, dtype: torch.dtype) -> dict[str, Tensor]:
    options = {} if case.options["seq_idx"] is None else {"seq_idx": case.options["seq_idx"].cuda()}
    return run(case, inputs_in(case, dtype, "cuda"), backend="triton", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCAN_CASES)
def test_accuracy_on_gpu(name: str, dtype: torch.dtype) -> None:
    # The hardware's exp2 is good to two units in the last place, which a long memory adds up.
    assert_accurate(SCAN_CASES[name], on_gpu(SCAN_CASES[name], dtype), dtype, roundings=64)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCAN_CASES)
def test_accuracy_of_whole_sequences_on_gpu(name: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(SCAN_CASES[name], n=16)
    options = {} if case.options["seq_idx"] is None else {"seq_idx": case.options["seq_idx"].cuda()}
    assert_accurate(case, scanned_whole(case, inputs_in(case, dtype, "cuda"), **options), dtype, roundings=64)


@pytest.mark.gpu
def test_many_sequences_on_gpu() -> None:
    """So many that one kernel scans them whole; two runs, and in parts with the state carried over, in equal bits."""
    b, l, d, n = 8, 1000, 1100, 16
    generator = torch.Generator("cuda").manual_seed(0)
    u, delta, z = (torch.randn(b, l, d, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    B, C = (torch.randn(b, l, n, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    A = -torch.rand(d, n, generator=generator, device="cuda") - 0.1
    scan = functools.partial(selective_scan, delta_softplus=True, backend="triton")
    y, state = scan(u, delta, A, B, C, z=z)
    torch.testing.assert_close((y, state), scan(u, delta, A, B, C, z=z), rtol=0, atol=0)
    first = scan(u[:, :333], delta[:, :333], A, B[:, :333], C[:, :333], z=z[:, :333])
    second = scan(u[:, 333:], delta[:, 333:], A, B[:, 333:], C[:, 333:], z=z[:, 333:], initial_state=first[1])
    torch.testing.assert_close((torch.cat([first[0], second[0]], 1), second[1]), (y, state), rtol=0, atol=0)
    exact = selective_scan(
        *(x.double() for x in (u, delta, A, B, C)), z=z.double(), delta_softplus=True, backend="torch"
    )
    assert (y - exact[0]).norm() / exact[0].norm() < 3e-3
    assert (state - exact[1]).norm() / exact[1].norm() < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_slabs_and_equal_bits_on_gpu(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("seqssm.kernels.selective_scan.triton")
    monkeypatch.setattr(module, "_HISTORY_BYTES", 1 << 20)
    case = ScanCase(l=3001, b=2, d=96, n=16, reverse=reverse)
    inputs = inputs_in(case, torch.float32, "cuda")
    first, second = (run(case, inputs, backend="triton") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    exact = run(case, {k: x.double() for k, x in inputs.items()}, backend="torch")
    for name, x in first.items():
        error = (x - exact[name]).norm() / exact[name].norm()
        assert error < 2e-5, f"{name}: {error:.1e}"


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_gpu() -> None:
    """The end of 2048 x 2**20 bfloat16 elements: equal to a scan of the last tokens, entered by the state before."""
    d, l, n, tail = 2048, 1 << 20, 4, 1024
    generator = torch.Generator("cuda").manual_seed(0)
    fused = torch.randn(1, l, d, generator=generator, device="cuda", dtype=torch.bfloat16)
    B, C = (torch.randn(1, l, n, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    A = -torch.rand(d, n, generator=generator, device="cuda") - 1.0
    with torch.no_grad():
        y, state = selective_scan(fused, fused, A, B, C, delta_softplus=True, backend="triton")
        _, middle = selective_scan(*(x[:, :-tail] if x.dim() == 3 else x for x in (fused, fused, A, B, C)),
                                   delta_softplus=True, backend="triton")  # fmt: skip
        last = [x[:, -tail:] if x.dim() == 3 else x for x in (fused, fused, A, B, C)]
        expected, final = selective_scan(*last, delta_softplus=True, initial_state=middle, backend="torch")
    torch.testing.assert_close(y[:, -tail:].float(), expected.float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-4)
    del y, expected
    # Backwards, the gradients of the first tokens live at the far end when the scan runs in reverse.
    leaves = [x.detach().requires_grad_() for x in (fused, A, B, C)]
    far = [x.detach()[:, -tail:].clone().requires_grad_() if x.dim() == 3 else x.detach().clone().requires_grad_()
           for x in (fused, A, B, C)]  # fmt: skip
    y, _ = selective_scan(leaves[0], leaves[0], *leaves[1:], delta_softplus=True, reverse=True, backend="triton")
    y[:, -tail:].float().sum().backward()
    y, _ = selective_scan(far[0], far[0], *far[1:], delta_softplus=True, reverse=True, backend="torch")
    y.float().sum().backward()
    for whole, part in zip(leaves, far, strict=True):
        got = whole.grad[:, -tail:] if whole.dim() == 3 else whole.grad
        error = (got.float() - part.grad.float()).norm() / part.grad.float().norm()
        assert error < 2e-2, f"{error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_on_gpu(groups: int, dtype: torch.dtype) -> None:
    check_step(groups, dtype, "cuda")


@pytest.mark.gpu
def test_step_in_a_cuda_graph() -> None:
    case = ScanCase(l=1, b=2, d=64, n=16)
    inputs = inputs_in(case, torch.float32, "cuda")
    initial = inputs.pop("initial_state")
    token = {k: x[:, 0] if k in ("u", "delta", "B", "C", "z") else x for k, x in inputs.items()}
    state = initial.clone()
    expected = [selective_scan_step(state, **token, delta_softplus=True) for _ in range(3)]
    captured = initial.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = selective_scan_step(captured, **token, delta_softplus=True)
    captured.copy_(initial)
    for y in expected:
        graph.replay()
        torch.testing.assert_close(out, y, rtol=0, atol=0)
    torch.testing.assert_close(captured, state, rtol=0, atol=0)


@pytest.mark.gpu
def test_operator_on_gpu() -> None:
    case = ScanCase(l=300, b=2, d=6, g=2)
    t = {k: x.requires_grad_() for k, x in inputs_in(case, torch.float32, "cuda").items()}
    every = (t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["delta_bias"], True, t["initial_state"])
    torch.library.opcheck(torch.ops.seqssm.selective_scan.default, (*every, None, (False, True), True, "triton"))

    def operator(**kw: Tensor) -> tuple[Tensor, Tensor]:
        y, state = selective_scan(**kw | {"u": kw["u"] * 2}, delta_softplus=True, reverse=(False, True))
        return y + 1, state

    expected = outputs_and_gradients(operator, inputs_in(case, torch.float32, "cuda"))
    compiled = outputs_and_gradients(torch.compile(operator, fullgraph=True), inputs_in(case, torch.float32, "cuda"))
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
