"""Settings of a training that make no sense: one line that names the key, before any work."""

from pathlib import Path

import numpy as np
import pytest

from seqssm.cli import main
from seqssm.commands.parsing import one_line

TABLE = "".join(f"{''.join(np.random.default_rng(i).choice(list('ACGT'), 40))},{'ab'[i % 2]}\n" for i in range(40))


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "table.csv").write_text("sequence,label\n" + TABLE)
    (folder / "config.yaml").write_text(f"""
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  logger: {{class_path: CSVLogger, init_args: {{save_dir: {folder}, name: null, version: once}}}}
model:
  class_path: DNAClassification
  init_args: {{backbone: {{d_model: 8, n_layers: 1, backend: torch}}}}
data:
  class_path: DNADataModule
  init_args: {{path: {folder}/table.csv, batch_size: 8, index_dir: {folder}/index}}
""")
    return ["fit", "--config", str(folder / "config.yaml")]


BAD = {
    "wrong type": (["--data.batch_size", "abc"], "data.batch_size: expected int, got abc"),
    "wrong type in a union": (["--data.window_bp", "2.5"], "data.window_bp: expected int, got 2.5"),
    "wrong key": (["--data.nonsense", "3"], "data: Option 'nonsense' is not accepted; `--print_config` shows"),
    "wrong key inside": (["--model.backbone.nope", "3"], "model: unrecognized arguments: --backbone.nope=3; `--print_"),
    "wrong choice": (["--model.backbone.bidirectional", "x"], "expected one of 'none', 'tied', 'untied', got x"),
    "wrong class": (["--model", "Nope"], "model: there is no class Nope"),
    "no workers": (["--data.num_workers", "-1"], "num_workers is -1: it must not be negative"),
    "no held-out batch": (["--data.eval_batch_size", "0"], "eval_batch_size is 0: it must be at least 1"),
    "seed of the data": (["--data.seed", "-1"], "seed is -1: it must not be negative"),
    "guard": (["--data.guard_bp", "-1"], "guard_bp is -1: it must not be negative"),
    "seed": (["--seed_everything", "-1"], "seed_everything: -1 is not in bounds"),
    "rate": (["--model.optimizer.lr", "-1"], "optimizer.lr is -1.0: it must not be negative"),
    "decay": (["--model.optimizer.weight_decay", "-1"], "optimizer.weight_decay is -1.0: it must not be negative"),
    "warm-up": (["--model.optimizer.warmup_fraction", "3"], "optimizer.warmup_fraction is 3.0: it must lie between"),
    "dropout": (["--model.backbone.dropout", "2"], "dropout lie between 0 and 1"),
    "backend": (["--model.backbone.backend", "cuda"], "backbone.backend must be auto or one of reference, torch"),
    "backend of another device": (["--model.backbone.backend", "triton"], "backend triton does not run on cpu"),
    "no state": (
        ["--model.backbone.mixers", "{m: {class_path: Mamba, init_args: {d_state: 0}}}"],
        "Mamba: d_state must be at least 1, got 0",
    ),
    "no heads": (
        ["--model.backbone.mixers", "{m: {class_path: Attention, init_args: {heads: 0}}}"],
        "Attention: heads must be at least 1, got 0",
    ),
    "no bins": (["--model.pool_bins", "0"], "model.pool_bins is 0: it must be at least 1"),
    "smoothing": (["--model.label_smoothing", "2"], "model.label_smoothing is 2.0: it must lie between 0 and 1"),
    "epochs": (["--trainer.max_epochs", "-5"], "`max_epochs` must be a non-negative integer or -1"),
    "accelerator": (["--trainer.accelerator", "banana"], "trainer: You selected an invalid accelerator name"),
    "steps": (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches is 0: it must be positive"),
    "checks": (["--trainer.val_check_interval", "0"], "trainer.val_check_interval is 0"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_a_bad_setting_is_one_line(
    fit: list[str], args: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([*fit, *args]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seqssm: error")]
    assert message in line
    assert "Given value" not in line
    assert "NoneType" not in line


def test_one_class_a_sequence_trains_without_held_out_data_and_an_earlier_run_is_not_overwritten(
    fit: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "two.csv").write_text("sequence,label\nACGTTACG,a\nTTTGGGCA,b\n")
    args = [*fit, "--data.path", str(tmp_path / "two.csv"), "--trainer.logger.init_args.save_dir", str(tmp_path)]
    assert main(args) == 0
    (checkpoint,) = (tmp_path / "once" / "checkpoints").iterdir()
    assert capsys.readouterr().err.splitlines()[-1] == f"seqssm: wrote {checkpoint}"
    saved = (tmp_path / "once" / "config.yaml").read_bytes()
    assert main([*args, "--trainer.max_epochs", "2"]) == 2
    assert "once/config.yaml is there from an earlier run" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "once" / "config.yaml").read_bytes() == saved


def test_predictions_that_nobody_keeps_are_not_computed(fit: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["predict", *fit[1:], "--trainer.logger", "false"]) == 2
    assert "seqssm predict keeps nothing by itself: add a BasePredictionWriter" in capsys.readouterr().err


def test_a_message_of_one_line_stays_as_it_is() -> None:
    assert (
        one_line("unrecognized arguments: --nope 3")
        == "unrecognized arguments: --nope 3; `--print_config` shows every setting"
    )
    assert one_line("Problems parsing config: no flow\n  in line 2") == "Problems parsing config: no flow; in line 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:\n  a: 1\nmodel: {}\ndata:\n  b: 2\n", "data stands twice, in lines 1 and 4: make it one section"),
        ("model:\n  init_args: {lr: 1}\n  init_args: {lr: 2}\n", "init_args stands twice, in lines 2 and 3"),
        ("a: &a [*a]\n", "an anchor of its YAML refers to itself"),
        ("model: [1,\n", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_configs_that_a_parser_would_misread(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    for args in (["fit", "--config"], ["fit", "-c"], ["evaluate", "--checkpoint", "dna-promoter-tata", "--data"]):
        assert main([*args, str(tmp_path / "odd.yaml")]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
