"""Benchmarks of whole models run end to end."""

import pytest

from seqssm import benchmarks
from seqssm.benchmarks import DecodeCase, ModelCase
from seqssm.kernels import bench
from seqssm.kernels.bench import BOTH, FORWARD
from seqssm.kernels.bench_machine import Rates


@pytest.fixture(autouse=True)
def _fast_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_rates", lambda device: Rates(1e9, 1e8, 1e9, 1e10))


def test_models_and_decoding() -> None:
    names = ["cpu-model-1x32-40", "cpu-model2-1x32-40-checkpointed", "cpu-decode-2x32"]
    rows = benchmarks.main(names, seconds=0.001, peers=False, memory=False, report=lambda line: None)
    passes = [(name, pass_name) for name in names[:2] for pass_name in (FORWARD, BOTH)] + [(names[2], FORWARD)]
    assert [(row["case"], row["pass"]) for row in rows] == passes
    assert all(row["ms"] > 0 and row["error"] < 1e-4 and row["limit_ms"] > 0 for row in rows)


def test_names_say_what_is_built() -> None:
    case = ModelCase.parse("model2-12x128-1048576-checkpointed")
    assert case is not None
    config = case.config()
    assert (case.device, case.tokens, config.n_layers, config.d_model) == ("cuda", 2**20, 12, 128)
    assert config.mixers["m"]["class_path"] == "Mamba2"
    assert config.checkpoint_activations
    assert ModelCase.parse("decode-12x128") is None
    assert DecodeCase.parse("model-12x128-1048576") is None
    for name in (*ModelCase.defaults, *DecodeCase.defaults):
        assert len(bench.select([name], benchmarks.CASES)) == 1 if name.startswith("cpu-") else True


def test_peers_compute_the_same_sizes() -> None:
    for name, implementation in (("cpu-model-1x32-24", "transformers"), ("cpu-model2-1x64-24", "transformers")):
        pytest.importorskip(implementation)
        case = ModelCase.parse(name)
        assert case is not None
        ours, theirs = case.build(bench.OURS), case.build(implementation)
        assert ours(FORWARD)[0].shape == theirs(FORWARD)[0].shape
        count = [sum(leaf.numel() for leaf in run.leaves.values()) for run in (ours, theirs)]
        assert count[0] == count[1]
