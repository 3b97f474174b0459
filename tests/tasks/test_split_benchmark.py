"""The benchmark of split lengths, with two processes on the CPU: it runs, and its two ways agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "seqssm.tasks.split_benchmark"]
    sizes = ["--length", "1001", "--layers", "2", "--d-model", "16", "--steps", "1", "--two-way"]
    command = [sys.executable, *launch, *sizes, "--json", str(tmp_path / "report.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=350)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 x 16, 1,001 bases, 2 processes on CPU" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["steps"]) == ["one process", "1/2 of it alone", "split"]
    assert report["gradient_error"] < 1e-5
    assert report["speedup"] == report["steps"]["one process"]["median_ms"] / report["steps"]["split"]["median_ms"]
