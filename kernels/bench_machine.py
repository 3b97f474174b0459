"""The machine that a benchmark runs on: what it is called, what it can do in a second, and how long a call takes it."""

import importlib.metadata
import math
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Rates(NamedTuple):
    """What the machine can do in a second: bytes moved, exponentials, float32 operations, multiply-and-adds counted
    twice in matrix products."""

    bytes: float
    exps: float
    lanes: float
    flops: float


def milliseconds(function: Callable[[], object], device: str) -> tuple[float, float | None]:
    """Duration of one call and, on a GPU, of queueing it."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Empties the cache, and keeps the GPU busy for a millisecond while the call is being queued.
        room = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        for _ in range(4):
            room.zero_()
        start.record()
        begin = time.perf_counter()
        function()
        host = time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), host * 1e3
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3, None


def measure_rates(device: str) -> Rates:
    """Limits of this machine. Copies and matrix products are measured, the rest is counted: a GPU's multiprocessor has
    16 special-function and 128 float32 units; a CPU's float32 units are those of its matrix products, and ten of their
    operations make an exponential."""
    if device == "cuda":
        x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        y = torch.empty_like(x)
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        properties = torch.cuda.get_device_properties("cuda")
        clocks = properties.multi_processor_count * _sm_clock_hz()
        return Rates(
            bytes=2 * x.numel() / _best_seconds(lambda: y.copy_(x), device),
            exps=16 * clocks,
            lanes=128 * clocks,
            flops=2 * 8192**3 / _best_seconds(lambda: a @ a, device),
        )
    x, a = torch.empty(2**26, dtype=torch.uint8), torch.randn(1024, 1024)
    y = torch.empty_like(x)
    flops = 2 * 1024**3 / _best_seconds(lambda: a @ a, device)
    copied = 2 * x.numel() / _best_seconds(lambda: y.copy_(x), device)
    return Rates(bytes=copied, exps=flops / 2 / 10, lanes=flops / 2, flops=flops)


def _best_seconds(function: Callable[[], object], device: str) -> float:
    """The best of half a second of calls: a limit is what the machine can do, not what it does on average."""
    end, best = time.perf_counter() + 0.5, math.inf
    while time.perf_counter() < end:
        best = min(best, milliseconds(function, device)[0])
    return best / 1e3


def _sm_clock_hz() -> float:
    """Highest clock of the multiprocessors."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 1e6
    except (OSError, subprocess.CalledProcessError, ValueError):
        return 1.98e9  # an H200's


def describe_machine() -> dict[str, Any]:
    """Device, versions and commit: what a figure depends on."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numba": _version("numba"),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
