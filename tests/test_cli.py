"""The command line, from a table of sequences to a labelled genome, and what it says of bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

from seqssm.cli import TRAINER_COMMANDS, find_config, main, shipped_configs

BASES = np.array(list("ACGT"))


def sequence(rng: np.random.Generator, at_rich: bool, length: int) -> str:
    return "".join(rng.choice(BASES, length, p=[0.35, 0.15, 0.15, 0.35] if at_rich else [0.15, 0.35, 0.35, 0.15]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a FASTA file, its labels and what `seqssm fit` made of them."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    with open(folder / "genomes.fa", "w") as fasta, open(folder / "labels.tsv", "w") as labels:
        labels.write("record\tlabel\tsplit\n")
        for i in range(24):
            fasta.write(f">contig{i} some text\n{sequence(rng, i % 2 == 0, 600)}\n")
            labels.write(
                f"contig{i}\t{'at' if i % 2 == 0 else 'gc'}\t{('train', 'train', 'val', 'test')[i // 2 % 4]}\n"
            )
    config = f"""
trainer:
  max_epochs: 4
  accelerator: cpu
  enable_progress_bar: false
  num_sanity_val_steps: 0
  logger: {{class_path: CSVLogger, init_args: {{save_dir: {folder}/runs, name: null}}}}
  callbacks:
    - {{class_path: ModelCheckpoint, init_args: {{monitor: val_mcc, mode: max, filename: best}}}}
model:
  class_path: DNAClassification
  init_args:
    backbone: {{d_model: 16, n_layers: 1}}
    optimizer: {{lr: 1.0e-2}}
data:
  class_path: DNADataModule
  init_args:
    path: {folder}/genomes.fa
    labels_table: {folder}/labels.tsv
    window_bp: 100
    batch_size: 8
    index_dir: {folder}/index
"""
    (folder / "config.yaml").write_text(config)
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    return folder


def checkpoint(trained: Path) -> str:
    return str(next((trained / "runs").rglob("best*.ckpt")))


def test_classify_writes_a_row_for_each_window(trained: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(1)
    fasta = trained / "new.fa"
    fasta.write_text(f">one\n{sequence(rng, True, 250)}\n>two\n{sequence(rng, False, 100)}\n")
    table = trained / "out.tsv"
    args = ["classify", str(fasta), "--checkpoint", checkpoint(trained)]
    assert main([*args, "--output", str(table)]) == 0
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    assert rows[0] == ["record", "start_bp", "end_bp", "label", "at", "gc"]
    covered = [(r[0], int(r[1]), int(r[2])) for r in rows[1:]]
    assert covered[0] == ("one", 0, 100)
    assert max(end for record, _, end in covered if record == "one") == 250
    assert covered[-1] == ("two", 0, 100)
    assert {(r[0], r[3]) for r in rows[1:]} == {("one", "at"), ("two", "gc")}
    for row in rows[1:]:
        assert float(row[4]) + float(row[5]) == pytest.approx(1, abs=2e-4)
    capsys.readouterr()
    assert main(args) == 0
    assert capsys.readouterr().out == table.read_text()


def test_evaluate_reports_model_and_baselines(trained: Path) -> None:
    folder = trained / "report"
    assert main(["evaluate", "--checkpoint", checkpoint(trained), "--output", str(folder), "--device", "cpu"]) == 0
    report = json.loads((folder / "metrics.json").read_text())
    accuracy = report["metrics"]["accuracy"]
    assert accuracy["n"] == 36  # 6 records of 6 windows
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert accuracy["value"] > 0.9 > 0.6 > report["baselines"]["majority"]["accuracy"]["value"]
    assert "evaluate --checkpoint" in report["command"]
    assert "| accuracy" in (folder / "evaluation.md").read_text()


def test_evaluate_scores_windows_of_several_lengths(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained / "lengths"
    arguments = ["evaluate", "--checkpoint", checkpoint(trained), "--device", "cpu", "--baselines", "k-mers"]
    assert main([*arguments, "--lengths", "50,2^8,600", "-o", str(folder)]) == 0
    report = json.loads((folder / "lengths.json").read_text())
    # 6 test records of 600 bp.
    assert {n: one["metrics"]["accuracy"]["n"] for n, one in report["lengths"].items()} == {
        "50": 72,
        "256": 12,
        "600": 6,
    }
    for length, one in report["lengths"].items():
        assert one["data"]["window_bp"] == int(length)
        assert one["metrics"]["balanced_accuracy"]["value"] > 0.9
        assert set(one["differences"]) == {"k-mers"}
    table = (folder / "lengths.md").read_text()
    assert "| bases | windows | model | k-mers | model minus k-mers |" in table
    assert "| 256 | 12 | 1.000 [1.000, 1.000] |" in table
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert table.splitlines()[-1] in capsys.readouterr().out
    assert main([*arguments, "--lengths", "700"]) == 2
    assert "longer than every region of the train split" in capsys.readouterr().err
    assert main([*arguments, "--lengths", "some"]) == 2
    assert "--lengths some: give" in capsys.readouterr().err


def test_a_table_stands_in_for_the_data_of_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = tmp_path / "own.csv"
    rng = np.random.default_rng(0)
    splits = ["train", "val", "test"] * 4
    rows = [f"{''.join(rng.choice(BASES, 70))},{i % 2},{split}" for i, split in enumerate(splits)]
    table.write_text("\n".join(["sequence,label,split", *rows]) + "\n")
    options = ["--checkpoint", "dna-promoter-tata", "--baselines", "none", "--device", "cpu"]
    assert main(["evaluate", *options, "--data", str(table), "-o", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert report["data"]["path"] == str(table)
    assert report["metrics"]["accuracy"]["n"] == 4
    assert "Tip:" not in capsys.readouterr().err
    assert main(["evaluate", *options, "--data", str(tmp_path / "missing.csv")]) == 2
    assert "missing.csv does not exist" in capsys.readouterr().err


def test_every_shipped_config_parses(capsys: pytest.CaptureFixture) -> None:
    assert "dna/quickstart" in shipped_configs()
    for name in shipped_configs():
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", name, "--print_config"])
        assert stopped.value.code == 0
        assert "class_path" in capsys.readouterr().out


def test_config_lookup(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("seed_everything: 1\n")
    assert find_config(str(own)) == str(own)
    assert find_config("dna/quickstart") == find_config("dna/quickstart.yaml")


BAD = {
    "unknown command": (["fitt"], "unknown command 'fitt'"),
    "unknown config": (["fit", "--config", "dna/nothing"], "no such file, nor a shipped config"),
    "unknown key": (["fit", "--config", "dna/quickstart", "--model.backbone.d_modell", "3"], "d_modell"),
    "wrong value": (["fit", "--config", "dna/quickstart", "--trainer.max_epochs", "many"], "max_epochs"),
    "unknown option": (["classify", "x.fa", "--checkpoint", "{ckpt}", "--windows", "3"], "arguments: --windows"),
    "no data": (["fit", "--config", "{config}", "--data.labels_table", "missing.tsv"], "missing.tsv"),
    "no fasta": (["classify", "missing.fa", "--checkpoint", "{ckpt}"], "missing.fa does not exist"),
    "tracks and variants": (
        ["classify", "x.fa", "--checkpoint", "{ckpt}", "--tracks", "x", "--vcf", "x.vcf"],
        "run them one by one",
    ),
    "tracks of nothing": (["classify", "missing.fa", "--checkpoint", "{ckpt}", "--tracks", "x"], "missing.fa does not"),
    "no checkpoint": (["classify", "missing.fa", "--checkpoint", "nowhere"], "nowhere: no such checkpoint"),
    "not a checkpoint": (["evaluate", "--checkpoint", "{config}"], "not a readable checkpoint"),
    "no such data": (["evaluate", "--checkpoint", "{ckpt}", "--data", "nowhere"], "--data nowhere: no such file"),
    "data of another task": (
        ["evaluate", "--checkpoint", "{ckpt}", "--data", "tagging/folder"],
        "--data tagging/folder is for AudioTaggingDataModule; the checkpoint's DNAClassification takes DNADataModule",
    ),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: [1,\n", "cannot be read as YAML"),
        ("model: 1\n", "has no `data` section"),
        ("data: 3\n", "has no `data` section"),
        ("data:\n  init_args: {}\n", "has no class_path, such as DNADataModule"),
    ],
)
def test_bad_data_sections(
    trained: Path, tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(content)
    assert main(["evaluate", "--checkpoint", checkpoint(trained), "--data", str(config)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    trained: Path, args: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    args = [a.format(ckpt=checkpoint(trained), config=trained / "config.yaml") for a in args]
    assert main(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("seqssm: error: ")
    assert message in lines[-1]
    assert sum(line.startswith("seqssm: error") for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def test_a_checkpoint_that_disagrees_with_the_config_is_refused(trained: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["test", "--config", str(trained / "config.yaml"), "--ckpt_path", checkpoint(trained)]
    assert main(args) == 0
    capsys.readouterr()
    assert main([*args, "--model.backbone.d_model", "32"]) == 2
    assert "was trained with model.backbone" in capsys.readouterr().err
    assert main([*args, "--model.chunk_length", "64"]) == 0  # how it is computed, not what was learnt
    assert main([*args, "--model.chunk_length", "3"]) == 2
    assert "model.chunk_length gives chunks of 3 positions, shorter than the" in capsys.readouterr().err


def test_overview_names_every_command(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for command in (*TRAINER_COMMANDS, "classify", "evaluate"):
        assert f"  {command} " in out
