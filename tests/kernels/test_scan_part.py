"""The Triton scan of parts of a sequence, handed from part to part: in the interpreter, and on a GPU."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from cases import ScanCase, inputs_in, outputs_and_gradients
from torch import Tensor

from seqssm.kernels import selective_scan
from seqssm.kernels.selective_scan.part import scan_part

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRET, reason="runs in a process of its own: see test_in_the_interpreter")
CASES = {
    "plain": ScanCase(l=40, d=5, n=3, state=False),
    "packed": ScanCase(l=41, b=2, d=4, n=2, g=2, packed=5, state=False),
    "reverse": ScanCase(l=37, b=2, d=4, n=2, reverse=True, packed=1, strided=True, state=False),
}
CUTS = (0, 9, 24)  # parts shorter and longer than a segment


def test_in_the_interpreter() -> None:
    if INTERPRET:
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


class Chain:
    """Hands states to the next part, and gradients to the one before, as ``join`` of a part."""

    def __init__(self) -> None:
        self.entering: dict[bool, Tensor] = {}
        self.calls = 0

    def __call__(self, own: Tensor, decay: Tensor, backward: bool) -> Tensor:
        self.calls += 1
        entering = self.entering.get(backward, torch.zeros_like(own))
        self.entering[backward] = own + decay * entering
        return entering


@interpreted
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("history_bytes", [1, 1 << 20])  # a slab a chunk, and all in one
def test_parts_equal_the_whole(name: str, history_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("seqssm.kernels.selective_scan.triton")
    sizes = {"CHUNK": 8, "_SEGMENT": 16, "_SHORTEST_SEGMENT": 16, "_PART_HISTORY_BYTES": history_bytes}
    for attribute, value in {**sizes, "_TILE": 4, "_BLOCK": 32}.items():
        monkeypatch.setattr(module, attribute, value)
    check_parts(CASES[name], "cpu")


def check_parts(case: ScanCase, device: str, cuts: tuple[int, ...] = CUTS) -> None:
    inputs = inputs_in(case, torch.float32, device)
