"""Sequences split over processes equal whole ones: outputs and every gradient, over gloo on the CPU and over NCCL."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent / "split_cases.py"


def load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("split_cases", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_processes(
    size: int, cases: list[str], folder: Path, timeout: float = 800, **environment: str
) -> list[subprocess.CompletedProcess]:
    """Run the cases in ``size`` processes."""
    command = [sys.executable, str(SCRIPT)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder / "rendezvous"), *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
        for rank in range(size)
    ]
    try:
        return [
            subprocess.CompletedProcess(p.args, p.returncode, out)
            for p in started
            for out in (p.communicate(timeout=timeout)[0],)
        ]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [2, 3])
def test_a_split_sequence_equals_a_whole_one(size: int, tmp_path: Path) -> None:
    module = load_cases()
    backbones = module.BACKBONES if size == 2 else ("m-tied", "2-tied", "s-tied", "m-causal")
    classifiers = module.CLASSIFIERS if size == 2 else ("last", "mean-max-bins")
    cases = [f"backbone/{name}/{variant}" for name in backbones for variant in ("plain", "packed")]
    cases += [f"classifier/{name}/{variant}" for name in classifiers for variant in ("full", "ragged")]
    for result in in_processes(size, cases, tmp_path):
        assert result.returncode == 0, result.stdout[-4000:]
        assert result.stdout.count("passed") == len(cases)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_split_layer_in_one_function_equals_a_whole_one(tmp_path: Path) -> None:
    cases = [f"fused/{name}/{variant}" for name in load_cases().FUSED for variant in ("plain", "packed")]
    for result in in_processes(2, cases, tmp_path, TRITON_INTERPRET="1"):
        assert result.returncode == 0, result.stdout[-4000:]
        assert result.stdout.count("passed") == len(cases)


@pytest.mark.gpu
@pytest.mark.timeout(1800)  # each case compiles kernels of its own
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_split_sequence_equals_a_whole_one_over_nccl(tmp_path: Path) -> None:
    cases = [f"gpu/{name}/{variant}" for name in load_cases().ON_GPUS for variant in ("plain", "packed")]
    for result in in_processes(2, cases, tmp_path, timeout=1700):
        assert result.returncode == 0, result.stdout[-4000:]
        assert result.stdout.count("passed") == len(cases)
