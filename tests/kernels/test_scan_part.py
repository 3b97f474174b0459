"""The Triton scan of parts of a sequence, handed from part to part: in the interpreter, and on a GPU."""

import importlib

import pytest
import torch
from cases import ScanCase, assert_accurate, inputs_in, outputs_and_gradients
from interpreter import assert_passes_interpreted, interpreted
from torch import Tensor

from seqssm.kernels.selective_scan.part import scan_part

CASES = {
    "plain": ScanCase(l=30, d=3, n=2, state=False),
    "packed-reverse": ScanCase(l=30, b=2, d=2, n=1, g=2, packed=5, reverse=True, strided=True, state=False),
}
CUTS = (0, 9, 12)  # parts shorter and longer than a segment


def test_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("history_bytes", [1, 1 << 20])  # a slab a chunk, and all in one
def test_parts_equal_the_whole(name: str, history_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("seqssm.kernels.selective_scan.triton")
    sizes = {"CHUNK": 16, "_SEGMENT": 8, "_SHORTEST_SEGMENT": 8, "_PART_HISTORY_BYTES": history_bytes}
    for attribute, value in {**sizes, "_TILE": 4, "_BLOCK": 32}.items():
        monkeypatch.setattr(module, attribute, value)
    check_parts(CASES[name], "cpu", CUTS, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("history_bytes", [1 << 20, 2 << 30])
def test_parts_equal_the_whole_on_gpu(reverse: bool, history_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("seqssm.kernels.selective_scan.triton")
    monkeypatch.setattr(module, "_PART_HISTORY_BYTES", history_bytes)
    case = ScanCase(l=3001, b=2, d=96, n=16, packed=700, reverse=reverse, state=False)
    check_parts(case, "cuda", (0, 257, 1500), 64)


def check_parts(case: ScanCase, device: str, cuts: tuple[int, ...], roundings: int) -> None:
    seq_idx = case.options["seq_idx"]
    seq_idx = None if seq_idx is None else seq_idx.to(device)
    parts = list(zip(cuts, (*cuts[1:], case.l), strict=True))
    if case.reverse:
        parts.reverse()  # reading order

    def passes(to: int) -> Tensor | float:
        """Whether the state goes on from part ``to - 1`` to part ``to``: (b, 1, 1)."""
        if seq_idx is None or not 0 < to < len(parts):
            return 1.0
        border = parts[to][1] if case.reverse else parts[to][0]
        return (seq_idx[:, border] == seq_idx[:, border - 1]).float()[:, None, None]

    def in_parts(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        entering: dict[bool, Tensor] = {}
        calls = []

        def run_part(number: int) -> tuple[Tensor, Tensor]:
            start, end = parts[number]

            def join(own: Tensor, decay: Tensor, backward: bool) -> Tensor:
                # Forward the parts come first to last, and backward last to first: each finds what the one before left.
                calls.append((number, backward))
                enters = entering.get(backward, torch.zeros_like(own)) * passes(number + 1 if backward else number)
                entering[backward] = own + decay * enters
                return enters

            i = {k: x[:, start:end] if x.dim() > 2 else x for k, x in inputs.items()}
            names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
            part_idx = None if seq_idx is None else seq_idx[:, start:end]
            directions = (bool(case.reverse),) * case.g
            return scan_part(*(i[name] for name in names), True, part_idx, directions, join)

        results = [run_part(number) for number in range(len(parts))]
        assert calls == [(number, False) for number in range(len(parts))]
        outputs = [y for y, _ in results]
        return torch.cat(outputs[::-1] if case.reverse else outputs, dim=1), results[-1][1]

    actual = outputs_and_gradients(in_parts, inputs_in(case, torch.float32, device))
    assert_accurate(case, actual, torch.float32, roundings)
