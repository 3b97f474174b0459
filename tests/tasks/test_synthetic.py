"""Synthetic tasks: chunks against one pass, accuracy by length, and a run of the command line from fit to table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.cli import main
from seqssm.commands.evaluate_synthetic import parse_lengths
from seqssm.data.synthetic_tasks import SelectiveCopying
from seqssm.errors import UserError
from seqssm.tasks.synthetic import AccuracyByLength, SequenceRecall, accuracy_table, wilson_interval

MAMBA = {"m": MixerSpec(class_path="seqssm.mixers.Mamba", init_args={"d_state": 4})}


def make_task(**changes) -> SequenceRecall:
    torch.manual_seed(0)
    config = BackboneConfig(d_model=16, n_layers=2, mixers=MAMBA, backend="torch", **changes.pop("backbone", {}))
    return SequenceRecall(vocabulary_size=8, backbone=config, **changes)


@pytest.mark.parametrize("chunk", [4, 9, 16])
def test_chunks_give_the_answers_and_gradients_of_one_pass(chunk: int) -> None:
    data = SelectiveCopying(vocabulary=6, memorize=5, test_lengths=[37])
    batch = data.batch(np.random.default_rng(0), 3, 37)
    results = []
    for task in (make_task().double(), make_task(chunk_length=chunk).double()):
        logits = task(batch.tokens, 5)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        results.append([logits.detach(), *(p.grad for p in task.parameters())])
    for one_pass, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, one_pass, rtol=1e-9, atol=1e-12)


def test_a_model_that_reads_both_ways_or_hybrid_is_refused() -> None:
    with pytest.raises(UserError, match="recall reads forward only"):
        make_task(backbone={"bidirectional": "tied"})
    with pytest.raises(UserError, match=r"model\.chunk_length gives chunks of 2 positions"):
        make_task(chunk_length=2)


def test_accuracy_is_counted_by_length() -> None:
    metric = AccuracyByLength([256, 64, 1000])
    metric.update(64, torch.tensor([[True, False], [True, True]]))
    metric.update(256, torch.tensor([True]))
    metric.update(64, torch.tensor([False]))
    assert metric.compute() == [(64, 3, 5), (256, 1, 1)]
    lines = accuracy_table([(64, 3, 5), (1000, 1, 1)], {"k-mers": {64: 0.5}}).splitlines()
    assert lines[2] == "| 64 (2^6) | 5 | 0.6000 | 0.2307-0.8824 | 0.5000 |"
    assert lines[3] == "| 1,000 | 1 | 1.0000 | 0.2065-1.0000 |  |"


def test_wilson_interval_against_statsmodels_values() -> None:
    # statsmodels.stats.proportion.proportion_confint(8, 10, method="wilson") and (256, 256).
    assert wilson_interval(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert wilson_interval(256, 256) == pytest.approx((0.98522, 1.0), abs=1e-4)


def test_lengths_as_typed() -> None:
    assert parse_lengths("256,2^10, 1000") == [256, 1024, 1000]
    with pytest.raises(UserError, match="--lengths 1k: give tokens between commas"):
        parse_lengths("1k")


CONFIG = """
trainer:
  max_epochs: {epochs}
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  logger: {{class_path: CSVLogger, init_args: {{save_dir: {folder}, name: runs}}}}
model:
  class_path: {task}
  init_args:
    {model}
    backbone: {{d_model: 16, n_layers: 1, mixers: {{m: {{class_path: Mamba, init_args: {{d_state: 4}}}}}}}}
    optimizer: {{lr: 1.0e-2, weight_decay: 0.0}}
data:
  class_path: {data}
  init_args:
    {problem}
    tokens_per_step: 256
    val_sequences: 32
    test_lengths: [64, 200]
    test_sequences: 64
"""


def fit(folder: Path, **settings) -> str:
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder, **settings))
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    return str(next(folder.rglob("*.ckpt")))


def test_fit_then_a_table_of_accuracies_beyond_the_lengths_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = "vocabulary: 2\n    memorize: 1\n    train_lengths: [8, 16]\n    steps_per_epoch: 100"
    checkpoint = fit(
        tmp_path, epochs=2, task="SequenceRecall", model="chunk_length: 128", data="SelectiveCopying", problem=problem
    )
    capsys.readouterr()
    assert main(["test", "--config", str(tmp_path / "config.yaml"), "--ckpt_path", checkpoint]) == 0
    assert "| 64 (2^6) | 64 | 1.0000 |" in capsys.readouterr().out
    out = tmp_path / "out"
    command = ["evaluate", "--checkpoint", checkpoint, "--lengths", "2^5,300", "--device", "cpu", "-o", str(out)]
    assert main(command) == 0
    assert "| 32 (2^5) | 64 | 1.0000 |" in capsys.readouterr().out
    report = json.loads((out / "lengths.json").read_text())
    assert [row["length"] for row in report["accuracy"]] == [32, 300]
    assert report["accuracy"][0]["interval"][1] == 1.0
    assert main([*command[:3], "--lengths", "1"]) == 2
    assert "test_lengths has 1: a sequence of this problem takes 2 tokens" in capsys.readouterr().err


def test_the_needle_stands_beside_a_baseline_at_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = fit(
        tmp_path,
        epochs=1,
        task="NeedleSearch",
        model="motif: 16\n    pooling: last\n    chunk_length: 32",
        data="Needle",
        problem="train_lengths: [64]\n    steps_per_epoch: 2",
    )
    capsys.readouterr()
    command = [
        "evaluate",
        "--checkpoint",
        checkpoint,
        "--lengths",
        "64,100",
        "--device",
        "cpu",
        "--baselines",
        "k-mers",
    ]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| 95% interval | k-mers |")
    for line in lines[2:4]:
        assert 0.25 < float(line.split("|")[5]) < 0.75  # of 64 at chance: four standard deviations either way
