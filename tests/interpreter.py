"""Kernels on a CPU: Triton must know before it is imported that it is to interpret them.

So the tests of a file that are marked ``interpreted`` run in a process of their own, which another test of it starts
with ``assert_passes_interpreted``.
"""

import os
import subprocess
import sys

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRET, reason="runs in a process of its own: see test_in_the_interpreter")


def assert_passes_interpreted(file: str, *selection: str) -> None:
    """Run a test file in Triton's interpreter; ``selection`` is of pytest's options."""
    if INTERPRET:
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, *selection]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
