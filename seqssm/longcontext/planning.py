"""What a training step will need at a length, from a few short ones: memory and time grow along a line.

A state-space model keeps the same for every token, so the peak memory and the time of a step are a constant and a share
a token; both are measured here at a few short lengths on the device itself, and no model of the model is made. A layer
of full attention bends the line of the time upwards, and a plan for one is too fast at long lengths.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from seqssm.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One measured training step.

    Attributes:
        length: tokens of each sequence.
        peak_bytes: on a GPU the allocator's peak; on the CPU the peak resident set of the process.
        seconds: of the step.
    """

    length: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Lines through measured steps.

    Attributes:
        samples: the steps, shortest first.
        capacity_bytes: memory that a step may take on this device.
    """

    samples: tuple[Sample, ...]
    capacity_bytes: int

    def peak_bytes(self, length: int) -> float:
        """Predicted peak memory of a step."""
        return _on_line([(s.length, s.peak_bytes) for s in self.samples], length)

    def seconds(self, length: int) -> float:
        """Predicted duration of a step."""
        return _on_line([(s.length, s.seconds) for s in self.samples], length)

    @property
    def longest(self) -> int | None:
        """The longest length whose step fits the device; None where memory does not grow with the length."""
        fixed, slope = self.peak_bytes(0), self.peak_bytes(1) - self.peak_bytes(0)
        return max(0, int((self.capacity_bytes - fixed) / slope)) if slope > 0 else None


def make_plan(step: Callable[[int], None], lengths: Sequence[int], device: torch.device) -> Plan:
    """Measure a training step at some lengths.

    Args:
        step: runs one step over sequences of the length it is given, gradients and optimizer included.
        lengths: at least two, increasing. The line for memory is that of the two longest: what kernels work with
            grows with the length at first and is bounded then.
        device: where it runs.

    Raises:
        UserError: the lengths are too few, or not even the two shortest of them fit.
    """
    lengths = sorted(set(lengths))
    if len(lengths) < 2:
        raise UserError(f"a plan needs two lengths to measure at, got {lengths}; plan for a longer one")
    step(lengths[0])  # compiles, and makes the optimizer's state
    samples: list[Sample] = []
    for length in lengths:
        try:
            samples.append(measure(step, length, device))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    if len(samples) < 2:
        raise UserError(f"a step at length {lengths[min(len(samples), 1)]} does not fit {device}: use a smaller batch")
    return Plan(tuple(samples), capacity_bytes(device))


def measure(step: Callable[[int], None], length: int, device: torch.device) -> Sample:
    """One step at a length: its peak memory, then its time as the better of two."""
    step(length)  # the allocator's pools, and kernels tuned for the size
    with _peak(device) as peak:
        step(length)
    return Sample(length, peak[0], min(_seconds(step, length, device) for _ in range(2)))


def capacity_bytes(device: torch.device) -> int:
    """Memory that a process may take: a GPU's less what is not PyTorch's; the machine's that is free or ours."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = _kib("/proc/meminfo", "MemAvailable") * 1024 + _kib("/proc/self/status", "VmRSS") * 1024
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    caps = [int(text) for path in limits if path.is_file() and (text := path.read_text().strip()).isdecimal()]
    return min([available, *caps])


def _on_line(points: Sequence[tuple[int, float]], x: float) -> float:
    (x0, y0), (x1, y1) = points[-2:]
    return max(0.0, y1 + (y1 - y0) / (x1 - x0) * (x - x1))


def _seconds(step: Callable[[int], None], length: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step(length)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Gives a list that holds the peak of the block when it is through."""
    peak: list[int] = []
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        _wait(device)
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    if platform.system() != "Linux":
        raise UserError("the memory of a CPU run is measured on Linux alone: plan on a GPU, or on Linux")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    yield peak
    peak.append(_kib("/proc/self/status", "VmHWM") * 1024)


def _kib(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{file} has no {field}")
