"""The table of mixers: the same windows and budget for each, and what is said of bad input."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from seqssm.cli import main
from seqssm.errors import UserError
from seqssm.tasks.mixer_table import MODELS, Budget, Genome, Row, compare, table, train

BUDGET = Budget(tokens=2**11, step_tokens=2**8, layers=1, d_model=32, lr=1e-2)
CPU = torch.device("cpu")


def write_genome(path: Path, lengths: dict[str, int], motif: str | None = None) -> Path:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for name, length in lengths.items():
            letters = "".join(rng.choice(list("ACGT"), length)) if motif is None else motif * (length // len(motif))
            file.write(f">{name}\n{letters}\n")
    return path


def test_each_model_learns_what_repeats(tmp_path: Path) -> None:
    genome = Genome(write_genome(tmp_path / "g.fa", {"a": 3000, "b": 3000}, "ACCGTTTA"), 64)
    rows: list[Row] = []
    steps: list[int] = []
    compare(genome, [64], list(MODELS), BUDGET, rows.append, steps.append, CPU)
    assert [row.model for row in rows] == list(MODELS)
    assert sum(steps) == len(MODELS) * BUDGET.steps
    for row in rows:
        assert row.val_nats < np.log(4) - 0.05, row  # of a uniform guess
        assert row.tokens_per_s > 0
        assert row.peak_mib is None
    assert rows[0].parameters == rows[3].parameters  # a hybrid of one layer is Mamba
    assert rows[0] == dataclasses.replace(rows[3], model="mamba", tokens_per_s=rows[0].tokens_per_s)
    assert len(table(rows).splitlines()) == 2 + len(rows)


def test_windows_are_the_same_for_every_model_and_never_of_the_held_out_record(tmp_path: Path) -> None:
    path = write_genome(tmp_path / "g.fa", {"a": 500, "short": 20, "b": 400, "c": 300})
    genome = Genome(path, 64)
    assert genome.held_out == "c"
    assert [len(record) for record in genome.training] == [500, 400]
    one, two = (genome.windows(np.random.default_rng(1), 50, 64) for _ in range(2))
    assert torch.equal(one, two)
    inside = [record.tobytes() for record in genome.training]
    assert all(any(window.numpy().tobytes() in record for record in inside) for window in one)
    assert genome.validation_windows(64).shape == (4, 64)
    assert Genome(path, 64, "a").held_out == "a"


def test_a_run_is_repeated_to_the_last_digit(tmp_path: Path) -> None:
    genome = Genome(write_genome(tmp_path / "g.fa", {"a": 500, "b": 500}), 64)
    first, second = (train(genome, 64, "mamba", BUDGET, lambda n: None, CPU) for _ in range(2))
    assert first == dataclasses.replace(second, tokens_per_s=first.tokens_per_s)


def test_bad_input(tmp_path: Path) -> None:
    path = write_genome(tmp_path / "g.fa", {"a": 500, "b": 100})
    with pytest.raises(UserError, match="two records must have 200 bp"):
        Genome(path, 200)
    with pytest.raises(UserError, match="no record 'c'"):
        Genome(path, 64, "c")
    genome = Genome(path, 64)
    with pytest.raises(UserError, match="must divide the 256 tokens of a step"):
        compare(genome, [48], ["mamba"], BUDGET, print, print, CPU)
    with pytest.raises(UserError, match="less than one step"):
        compare(genome, [64], ["mamba"], dataclasses.replace(BUDGET, tokens=100), print, print, CPU)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    genome = write_genome(tmp_path / "g.fa", {"a": 500, "b": 300})
    small = ["--tokens", "512", "--step-tokens", "2^8", "--layers", "1", "--width", "16", "--device", "cpu"]
    command = ["mixers", str(genome), "--lengths", "32,64", "--models", "s4d,attention", *small]
    assert main([*command, "--json", str(tmp_path / "m.json")]) == 0
    assert "| 64 | attention |" in capsys.readouterr().out
    report = json.loads((tmp_path / "m.json").read_text())
    assert [(row["length"], row["model"]) for row in report["rows"]] == [
        (length, name) for length in (32, 64) for name in ("s4d", "attention")
    ]
    assert report["held_out"] == "b"
    assert report["budget"]["tokens"] == 512
    assert main(["mixers", str(genome), "--models", "lstm"]) == 2
    assert "there is no lstm" in capsys.readouterr().err
