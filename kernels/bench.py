"""The benchmark behind ``seqssm bench``: cases by name, timed beside their peers, with the limit of the machine.

A case name says all: ``scan-1x256x1048576`` is a selective scan with b = 1, d = 256, l = 2^20 on the GPU, and with
``cpu-`` before it the same on the CPU. Families of cases (classes derived from ``Case``) read names of their own form;
``kernels/bench_cases.py`` has the kernels', ``seqssm/benchmarks.py`` those of whole models.

What is measured, for each pass (forward; forward and backward):

- time: the median over repeated calls, each timed by itself, ours and the peers' in turn, after one call to warm up.
  A GPU is kept busy beforehand while a call is being queued, so that it is the GPU's own time; what the CPU took to
  queue it, which bounds short sequences outside CUDA graphs, stands beside it as host time;
- peak memory: what a call needs above its inputs and the incoming gradients. On a GPU the allocator's peak; on the CPU
  the growth of the peak resident set, in a fresh process, which sees every allocator;
- error: the relative root-mean-square difference to float64, the worst of the results that can be compared;
- roofline: the time that the machine's limits allow over the time taken. Every case prints its formula.
"""

import ctypes
import fnmatch
import functools
import gc
import multiprocessing
import platform
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from seqssm.errors import UserError
from seqssm.kernels.bench_machine import Rates, describe_machine, measure_rates, milliseconds
from seqssm.kernels.bench_results import format_row, write_json

OURS = "seqssm"
FORWARD, BOTH = "forward", "forward+backward"
_MIB = 2**20
_MOST_CALLS = 500


class Work(NamedTuple):
    """What a stage of a computation cannot do without; the fields of ``Rates``."""

    bytes: float = 0
    exps: float = 0
    lanes: float = 0
    flops: float = 0

    def seconds(self, rates: Rates) -> float:
        """The stage is bound by its scarcest resource."""
        return max(amount / rate for amount, rate in zip(self, rates, strict=True))


@dataclass
class Run:
    """One implementation, ready to be called.

    Args:
        function: the forward pass; its one differentiable output.
        leaves: the tensors that take gradients, by name.
        gradient: the gradient of the output.
    """

    function: Callable[[], Tensor]
    leaves: Mapping[str, Tensor]
    gradient: Tensor

    def __call__(self, pass_name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and the gradients of the leaves (none for a forward pass)."""
        if pass_name == FORWARD:
            with torch.no_grad():
                return self.function(), ()
        output = self.function()
        return output, torch.autograd.grad(output, list(self.leaves.values()), self.gradient)


@dataclass(frozen=True)
class Case(ABC):
    """One benchmark: a frozen dataclass of sizes, which a subclass reads from a name and builds."""

    name: str
    device: str
    l: int

    defaults: ClassVar[tuple[str, ...]] = ()
    passes: ClassVar[tuple[str, ...]] = (FORWARD, BOTH)
    formula: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def parse(cls, name: str) -> Self | None:
        """The case called ``name``, or None when the name belongs to another family."""

    @abstractmethod
    def build(self, implementation: str) -> Run:
        """Make the inputs and the call. ImportError when a peer is not installed."""

    @abstractmethod
    def work(self, pass_name: str) -> list[Work]:
        """The stages that the pass cannot do without, one after another."""

    @abstractmethod
    def error(self, pass_name: str, run: Run) -> float | None:
        """Largest relative root-mean-square difference to float64."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens that one call reads."""

    @property
    def peers(self) -> tuple[str, ...]:
        """Other implementations, by name; those that are not installed are left out."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def shrunk(self) -> Self:
        """A small relative, to load and compile what the first call loads and compiles."""
        return replace(self, l=min(self.l, 64))


def main(
    names: Sequence[str] | None = None,
    json_path: Path | None = None,
    *,
    families: Sequence[type[Case]],
    seconds: float | None = None,
    peers: bool = True,
    memory: bool = True,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run benchmarks, report each as it is done, and write them down.

    Args:
        names: case names, or families (``"model"``) and patterns (``"cpu-*"``) of the default cases; None for every
            default case of the best device here.
        json_path: JSON file to write. Cases in it that are not run again stay.
        families: the kinds of cases there are.
        seconds: time to spend on each implementation and pass; 2 on a GPU and 5 on the CPU when None.
        peers: time other libraries too, where they import.
        memory: measure the peak memory (on the CPU: a process for each implementation).
        report: takes one line of text at a time.

    Returns:
        One dict for each case and pass, as in the JSON file's ``cases``.

    Raises:
        UserError: an unknown case, a GPU case without a GPU, or a file that cannot be written.
    """
    cases = select(names, families)
    machine = describe_machine()
    if json_path is not None:
        write_json(json_path, machine, [])  # it fails now, not after an hour
    report("  ".join(f"{key}: {value}" for key, value in machine.items() if key != "rates"))
    rates: dict[str, Rates] = {}
    rows: list[dict[str, Any]] = []
    for case in cases:
        if case.device not in rates:
            rates[case.device] = measure_rates(case.device)
            machine.setdefault("rates", {})[case.device] = rates[case.device]._asdict()
            report(
                f"{case.device} limits: " + ", ".join(f"{k} {v:.3g}/s" for k, v in rates[case.device]._asdict().items())
            )
        report(f"\n{case.name}: limit = {case.formula}")
        for row in measure(case, rates[case.device], seconds, peers, memory):
            rows.append({**row, "commit": machine["commit"]})
            report(format_row(row))
        if json_path is not None:  # after each case: a long run that is cut short keeps what it has
            write_json(json_path, machine, rows)
    return rows


def select(names: Sequence[str] | None, families: Sequence[type[Case]]) -> list[Case]:
    """The cases of names, families and patterns, in order, each once."""
    defaults = [name for family in families for name in family.defaults]
    if not names:
        cuda = torch.cuda.is_available()
        names = [name for name in defaults if name.startswith("cpu-") != cuda]
    chosen: dict[str, Case] = {}
    for name in names:
        for match in fnmatch.filter(defaults, name) or fnmatch.filter(defaults, f"{name}-*") or [name]:
            case = next((c for c in (family.parse(match) for family in families) if c is not None), None)
            if case is None:
                raise UserError(
                    f"no benchmark {name!r}; there are {', '.join(defaults)}, and the same with other sizes"
                )
            if case.device == "cuda" and not torch.cuda.is_available():
                raise UserError(f"benchmark {match} needs a CUDA device; cpu-{match} runs here")
            chosen[match] = case
    return list(chosen.values())


def measure(
    case: Case, rates: Rates, seconds: float | None = None, peers: bool = True, memory: bool = True
) -> list[dict[str, Any]]:
    """Measure one case in all its passes, ours and the peers'."""
    seconds = seconds if seconds is not None else 2.0 if case.device == "cuda" else 5.0
    failures: dict[str, str] = {}
    runs = {OURS: case.build(OURS)}
    for peer in case.peers if peers else ():
        try:
            runs[peer] = case.build(peer)
        except ImportError:
            continue
    rows = []
    for pass_name in case.passes:
        times = time_in_turn(case, runs, pass_name, seconds, failures)
        peaks = {}
        if memory:
            for name in times:
                peaks[name] = peak_mib(case, name, runs[name], pass_name)
        ms, host_ms = times[OURS]
        limit_ms = 1e3 * sum(work.seconds(rates) for work in case.work(pass_name))
        rows.append(
            {
                "case": case.name,
                "pass": pass_name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "ms": ms,
                "host_ms": host_ms,
                "tokens_per_s": case.tokens / ms * 1e3,
                "peak_mib": peaks.get(OURS),
                "roofline": limit_ms / ms,
                "limit_ms": limit_ms,
                "formula": case.formula,
                "error": case.error(pass_name, runs[OURS]),
                "peers": {name: value for name, (value, _) in times.items() if name != OURS},
                "peers_host_ms": {name: value for name, (_, value) in times.items() if name != OURS},
                "peers_peak_mib": {name: value for name, value in peaks.items() if name != OURS},
                "peers_failed": dict(failures),
            }
        )
    return rows


# ---- time -----------------------------------------------------------------------------------------------------------


def time_in_turn(
    case: Case, runs: Mapping[str, Run], pass_name: str, seconds: float, failures: dict[str, str]
) -> dict[str, tuple[float, float | None]]:
    """Median milliseconds of each implementation, and of queueing it on a GPU; called in turn, so that a slow moment of
    the machine hits all alike.

    The first calls, on a small relative of the case and on the case itself, warm up; if the latter takes a minute or
    more it is the only one. A peer that raises is noted in ``failures`` and left out.
    """
    samples: dict[str, list[tuple[float, float | None]]] = {}
    left_ms: dict[str, float] = {}
    for name, run in runs.items():
        if name in failures:
            continue
        try:
            case.shrunk().build(name)(pass_name)
            first = milliseconds(functools.partial(run, pass_name), case.device)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if name == OURS:
                raise
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        single = first[0] >= 60e3
        samples[name], left_ms[name] = ([first], 0.0) if single else ([], seconds * 1e3)
    while any(left > 0 for left in left_ms.values()) and max(map(len, samples.values())) < _MOST_CALLS:
        for name in [name for name, left in left_ms.items() if left > 0]:
            samples[name].append(milliseconds(functools.partial(runs[name], pass_name), case.device))
            left_ms[name] -= samples[name][-1][0]
    return {name: _medians(times) for name, times in samples.items()}


def _medians(times: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    host = [queueing for _, queueing in times if queueing is not None]
    return statistics.median(ms for ms, _ in times), statistics.median(host) if host else None


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_mib(case: Case, implementation: str, run: Run, pass_name: str) -> float | None:
    """Peak MiB of one call above its inputs; None where it cannot be measured."""
    if case.device == "cuda":
        run(pass_name)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(pass_name)
        return (torch.cuda.max_memory_allocated() - before) / _MIB
    if platform.system() != "Linux":
        return None
    # A resident set never shrinks reliably: only a process that has done nothing else shows what the call needs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_in_fresh_process, case, implementation, pass_name, torch.get_num_threads()).result()


def _peak_in_fresh_process(case: Case, implementation: str, pass_name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    case.shrunk().build(implementation)(pass_name)
    run = case.build(implementation)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_kib("VmRSS")
    run(pass_name)
    return max(0, _status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
