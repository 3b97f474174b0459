"""Benchmarks of tasks run end to end, by the names that the commands take."""

import pytest

from seqssm.benchmarks import CASES
from seqssm.kernels import bench
from seqssm.kernels.bench import BOTH, FORWARD
from seqssm.kernels.bench_machine import Rates
from seqssm.tasks.benchmarks import ClassifierCase, TaggingCase

FAMILIES = (*CASES, ClassifierCase, TaggingCase)


@pytest.mark.parametrize("variant", ["", "-checkpointed", "-tight", "-chunk16-kept2", "-tight-chunk13"])
def test_a_classifier_step_gives_the_gradients_of_one_exact_pass(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_rates", lambda device: Rates(1e9, 1e8, 1e9, 1e10))
    name = f"cpu-model-dna-2x16-40{variant}"
    rows = bench.main([name], families=FAMILIES, seconds=0.001, memory=False, report=lambda line: None)
    assert [(row["case"], row["pass"]) for row in rows] == [(name, FORWARD), (name, BOTH)]
    assert all(0 < row["error"] < 1e-4 for row in rows)


def test_names_say_what_is_built() -> None:
    case = ClassifierCase.parse("model-dna-12x128-1048576-tight-chunk209920-kept4")
    assert case is not None
    assert (case.device, case.l, case.layers, case.d_model) == ("cuda", 2**20, 12, 128)
    assert (case.checkpointed, case.chunk, case.kept) == ("tight", 209920, 4)
    task = ClassifierCase.parse("cpu-model-dna-1x8-64-checkpointed-chunk16").task()
    assert task.backbone_config.checkpoint_activations is True
    assert (task.chunk_length, task.chunk_kept) == (16, 1)
    assert ClassifierCase.parse("model-12x128-1048576") is None
    assert ClassifierCase.parse("model-dna-12x128-1048576-kept2") is None
    assert all(ClassifierCase.parse(name) for name in ClassifierCase.defaults)


def test_a_family_is_all_of_its_default_cases() -> None:
    names = [case.name for case in bench.select(["cpu-model", "cpu-decode"], FAMILIES)]
    assert names == [
        name for family in FAMILIES for name in family.defaults if name.startswith(("cpu-model-", "cpu-decode-"))
    ]
    assert len(names) == 3
