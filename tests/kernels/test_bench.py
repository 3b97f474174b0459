"""The benchmark: names, measures and files. Timings themselves are not tested."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch

from seqssm.errors import UserError
from seqssm.kernels import bench, bench_cases
from seqssm.kernels.bench import BOTH, FORWARD, OURS, Run, Work
from seqssm.kernels.bench_cases import KERNEL_CASES, ConvCase, ScanCase, SSDCase
from seqssm.kernels.bench_machine import Rates
from seqssm.kernels.bench_results import table

RATES = Rates(bytes=1e9, exps=1e8, lanes=1e9, flops=1e10)


@pytest.fixture(autouse=True)
def _fast_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_rates", lambda device: RATES)


def test_a_run_writes_every_pass_and_keeps_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    lines: list[str] = []
    options = {"families": KERNEL_CASES, "seconds": 0.001, "memory": False, "report": lines.append}
    bench.main(["cpu-ssd-1x2x40"], path, peers=False, **options)
    rows = bench.main(["cpu-conv-2x8x64"], path, **options)
    results = json.loads(path.read_text())
    assert {"device", "torch", "triton", "commit", "rates", "cases"} <= results.keys()
    assert results["torch"] == torch.__version__
    assert [(row["case"], row["pass"]) for row in results["cases"]] == [
        (case, pass_name) for case in ("cpu-ssd-1x2x40", "cpu-conv-2x8x64") for pass_name in (FORWARD, BOTH)
    ]
    assert results["cases"][2:] == rows
    for row in results["cases"]:
        assert row["dtype"] == "float32"
        assert row["ms"] > 0
        assert row["error"] < 1e-5
        tokens = 40 if "ssd" in row["case"] else 128
        assert math.isclose(row["tokens_per_s"], tokens / row["ms"] * 1e3)
        assert math.isclose(row["roofline"], row["limit_ms"] / row["ms"])
    assert results["cases"][0]["peers"] == {}
    assert rows[0]["peers"].keys() == {"torch"}
    text = "\n".join(lines)
    assert f"limit = {ConvCase.formula}" in text
    assert "torch:" in text
    rows = table(path).splitlines()
    assert len(rows) == 4 + 4
    assert rows[-1].startswith("| cpu-conv-2x8x64 | forward+backward | float32 |")


def test_limits_follow_the_formula() -> None:
    conv = ConvCase.parse("cpu-conv-2x8x64")
    assert conv is not None
    count = 2 * 8 * 64
    assert conv.work(FORWARD) == [Work(bytes=count * 8, exps=count * 2, lanes=count * 8)]
    assert Work(bytes=3e9, exps=1e7).seconds(RATES) == 3
    assert Work(bytes=1e6, flops=2e10).seconds(RATES) == 2
    for family in (ScanCase, SSDCase, ConvCase):
        case = family.parse(family.defaults[0])
        assert case is not None
        assert case.device == "cuda"
        one, both = (sum(work.seconds(RATES) for work in case.work(name)) for name in (FORWARD, BOTH))
        assert 1.5 * one < both < 8 * one


def test_the_limit_of_a_million_tokens_is_the_published_estimate() -> None:
    h200 = Rates(bytes=4.28e12, exps=4.18e12, lanes=3.35e13, flops=0.8e15)
    scan, ssd = ScanCase.parse("scan-1x256x1048576"), SSDCase.parse("ssd-1x8x1048576")
    assert scan is not None
    assert ssd is not None
    assert sum(work.seconds(h200) for work in scan.work(FORWARD)) == pytest.approx(1.3e-3, rel=0.05)
    assert 0.5e-3 < sum(work.seconds(h200) for work in ssd.work(FORWARD)) < 1e-3


def test_error_is_that_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SSDCase.parse("cpu-ssd-1x2x40")
    assert case is not None
    assert case.error(BOTH, case.build(OURS)) < 1e-5
    genuine = bench_cases.ssd

    def off_by_a_percent(*args: object, backend: str, **kw: object) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = genuine(*args, backend=backend, **kw)
        return (y if backend == "torch" else 1.01 * y), state

    monkeypatch.setattr(bench_cases, "ssd", off_by_a_percent)
    assert case.error(FORWARD, case.build(OURS)) == pytest.approx(0.01, rel=0.01)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets the peak as Linux does")
def test_peak_memory_is_that_of_one_call() -> None:
    case = ConvCase.parse("cpu-conv-1x256x16384")  # 16 MiB an activation
    assert case is not None
    peak = bench.peak_mib(case, OURS, Run(lambda: torch.empty(0), {}, torch.empty(0)), FORWARD)
    assert peak is not None
    assert 14 < peak < 40


def test_a_peer_that_fails_is_reported_and_the_rest_goes_on() -> None:
    case = ConvCase.parse("cpu-conv-1x4x16")
    assert case is not None

    def fail() -> torch.Tensor:
        raise RuntimeError("no kernel for this\nsecond line")

    ours = case.build(OURS)
    failures: dict[str, str] = {}
    runs = {OURS: ours, "torch": Run(fail, ours.leaves, ours.gradient)}
    times = bench.time_in_turn(case, runs, FORWARD, 0.001, failures)
    assert times.keys() == {OURS}
    assert failures == {"torch": "RuntimeError: no kernel for this"}
    assert bench.time_in_turn(case, runs, BOTH, 0.001, failures).keys() == {OURS}


def test_names_and_patterns() -> None:
    select = functools.partial(bench.select, families=KERNEL_CASES)
    assert [case.name for case in select(["cpu-*"])] == [
        "cpu-scan-1x256x8192",
        "cpu-ssd-1x4x8192",
        "cpu-conv-1x256x8192",
    ]
    (case,) = select(["cpu-scan-3x5x7", "cpu-scan-3x5x7"])
    assert isinstance(case, ScanCase)
    assert (case.b, case.width, case.l, case.tokens) == (3, 5, 7, 21)
    assert [case.n for case in select(["cpu-scan-1x2x3-n5", "cpu-ssd-1x2x3-n64"])] == [5, 64]
    with pytest.raises(UserError, match="no benchmark 'cpu-conv-1x2x3-n5'"):
        select(["cpu-conv-1x2x3-n5"])
    with pytest.raises(UserError, match="no benchmark 'scam-1x2x3'; there are scan-1x256x1048576"):
        select(["scam-1x2x3"])
    if not torch.cuda.is_available():
        assert all(case.device == "cpu" for case in select(None))
        with pytest.raises(UserError, match="needs a CUDA device; cpu-scan-1x2x3 runs here"):
            select(["scan-1x2x3"])


def test_results_that_cannot_be_written_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        bench.main(["cpu-conv-1x4x16"], tmp_path / "no folder" / "results.json", families=KERNEL_CASES)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="is no file of benchmark results"):
        bench.main(["cpu-conv-1x4x16"], tmp_path / "notes.json", families=KERNEL_CASES)
    assert (tmp_path / "notes.json").read_text() == "[1, 2]"
