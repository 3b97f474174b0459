import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from seqssm.data import DNABatch, DNADataModule
from seqssm.data.dna.alphabet import decode, encode, reverse_complement
from seqssm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning on loaders without workers and on checkpoint folders

Writer = Callable[..., Path]
Dna = Callable[..., str]


@pytest.fixture
def genomes(tmp_path: Path, write_fasta: Writer, random_dna: Dna) -> Path:
    """Three strains of each of two species, four chromosomes each, with a samples table."""
    rows = ["path\tspecies\tstrain"]
    for number in range(6):
        records = {f"chr{c}": random_dna(1000 * c, 10 * number + c) for c in range(1, 5)}
        write_fasta(f"genomes/{number}.fa", records)
        rows.append(f"{number}.fa\t{'ab'[number % 2]}\ts{number}")
    table = tmp_path / "genomes" / "samples.tsv"
    table.write_text("\n".join(rows) + "\n")
    return table


def module(path: Path, **changes: Any) -> DNADataModule:
    arguments: dict[str, Any] = {"label_column": "species", "window_bp": 100, "batch_size": 8, **changes}
    return DNADataModule(str(path), **arguments)


RULES = [
    {"split": "test", "strain": "s4|s5", "record": "chr3"},
    {"split": "drop", "strain": "s4|s5"},
    {"split": "drop", "record": "chr3"},
    {"split": "val", "record": "chr2"},
    {"split": "train"},
]


def test_genomes_to_batches_with_strain_and_chromosome_held_out(genomes: Path) -> None:
    data = module(genomes, split_rules=RULES, balance=True, windows_per_epoch=64, group_column="strain")
    assert data.labels == ["a", "b"]
    data.prepare_data()
    data.setup("fit")
    train, val, test = data.train.windows, data.val.windows, data.test.windows
    assert set(zip(test.group, test.record, strict=True)) == {("s4", "4.fa:chr3"), ("s5", "5.fa:chr3")}
    assert set(val.record) == {f"{n}.fa:chr2" for n in range(4)}
    assert {name.split(":")[1] for name in train.record} == {"chr1", "chr4"}
    assert set(train.group) == {"s0", "s1", "s2", "s3"}
    assert Counter(train.label.tolist()) == {0: 32, 1: 32}
    assert len(val) == 4 * 20
    assert len(test) == 2 * 30
    assert np.array_equal(test.label, np.where(test.group == "s4", 0, 1))
    batches = list(data.test_dataloader())
    assert isinstance(batches[0], DNABatch)
    tokens = torch.cat([batch.tokens for batch in batches])
    for i in (0, 29, 59):  # predictions align with windows
        record, start = test.record_id[i], test.start_bp[i]
        assert np.array_equal(tokens[i].numpy(), data.test.library.tokens(record, start, start + 100))
    assert torch.cat([batch.labels for batch in batches]).tolist() == test.label.tolist()
    assert len(data.grid("train")) == 4 * 50
    assert data.report is not None
    assert data.report.counts == {s: {"a": n, "b": n} for s, n in (("train", 100), ("val", 40), ("test", 30))}
    assert data.report.overlaps == {"val": 0, "test": 0}
    json.dumps(data.report.to_dict())


def test_labels_need_no_sequences(genomes: Path) -> None:
    for fasta in genomes.parent.glob("*.fa"):
        fasta.unlink()
    assert module(genomes).labels == ["a", "b"]


def test_labels_sort_as_numbers_when_they_are_and_classes_restrict(tmp_path: Path, random_dna: Dna) -> None:
    rows = [f"{random_dna(50, i)},{label}" for i, label in enumerate(["10", "9", "100"] * 30)]
    (tmp_path / "data.csv").write_text("sequence,label\n" + "\n".join(rows) + "\n")
    assert DNADataModule(str(tmp_path / "data.csv")).labels == ["9", "10", "100"]
    data = DNADataModule(str(tmp_path / "data.csv"), classes=["10", "9"])
    data.setup()
    assert data.labels == ["9", "10"]
    assert len(data.grid("train")) + len(data.grid("val")) + len(data.grid("test")) == 60
    assert data.report is not None
    assert data.report.left_out["records or intervals of other classes"] == 30


def test_labels_take_the_names_they_are_given(tmp_path: Path, random_dna: Dna) -> None:
    rows = [f"{random_dna(50, i)},{i % 2},{('train', 'val', 'test')[i % 3]}" for i in range(60)]
    (tmp_path / "data.csv").write_text("sequence,label,split\n" + "\n".join(rows) + "\n")
    names = {"0": "promoter", "1": "other"}  # not in the order of the labels
    data, plain = (DNADataModule(str(tmp_path / "data.csv"), label_names=n) for n in (names, None))
    assert data.labels == ["other", "promoter"]
    data.setup()
    plain.setup()
    for split in ("train", "val", "test"):
        assert np.array_equal(data.grid(split).windows.label, 1 - plain.grid(split).windows.label)
    with pytest.raises(UserError, match=r"label_names: .*data.csv has no label yes; column 'label' holds 0, 1"):
        DNADataModule(str(tmp_path / "data.csv"), label_names={"yes": "promoter"}).setup()


def test_train_sequences_that_stand_in_test_are_dropped_and_counted(
    tmp_path: Path, random_dna: Dna, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {i: random_dna(60, i) for i in range(60)}
    turned = "".join("TGCA"["ACGT".index(c)] for c in reversed(made[50]))
    splits = {
        "train": [(made[i], i % 2) for i in range(40)] + [(turned, 0), (made[51].lower(), 1), (made[45], 1)],
        "dev": [(made[i], i % 2) for i in range(40, 50)],
        "test": [(made[i], i % 2) for i in range(50, 60)],
    }
    (tmp_path / "gue").mkdir()
    for name, rows in splits.items():
        text = "sequence,label\n" + "".join(f"{sequence},{label}\n" for sequence, label in rows)
        (tmp_path / "gue" / f"{name}.csv").write_text(text)
    data = DNADataModule(str(tmp_path / "gue"))
    data.setup("fit")
    assert data.report is not None
    assert data.report.left_out["train sequences that also stand in test"] == 2
    assert data.report.left_out["train sequences that also stand in val"] == 1
    assert len(data.grid("train")) == 40
    assert data.report.shared_sequences == {"val": 0, "test": 0}
    assert data.report.shared_kmers["test"] == 0.0
    printed = capsys.readouterr().out
    assert "left out: 2 train sequences that also stand in test" in printed
    kept = DNADataModule(str(tmp_path / "gue"), drop_shared=False)
    kept.setup("fit")
    assert kept.report is not None
    assert len(kept.grid("train")) == 43
    assert kept.report.shared_sequences == {"val": 1, "test": 2}
    assert kept.report.shared_kmers["test"] > 0.1
    assert data.test is not None
    assert data.test.windows.record.tolist() == [f"test.csv:{line}" for line in range(2, 12)]
    assert data.test.windows.group.tolist() == data.test.windows.record.tolist()


def test_training_batches_are_padded_turned_and_labelled(tmp_path: Path, random_dna: Dna) -> None:
    made = [random_dna(20 + i, i) for i in range(40)]
    rows = [f"{letters},{i % 2},{'train' if i < 30 else 'test'}" for i, letters in enumerate(made)]
    (tmp_path / "data.csv").write_text("sequence,label,split\n" + "\n".join(rows) + "\n")
    data = DNADataModule(str(tmp_path / "data.csv"), val_fraction=0, batch_size=30, rc_probability=0.5)
    data.setup()
    assert data.val is None
    assert data.val_dataloader() == []
    recorder = Recorder()
    trainer(tmp_path).fit(recorder, datamodule=data)
    assert len(recorder.seen) == 3
    (batch,) = data.train_dataloader()
    known = {tuple(encode(letters).tolist()): i for i, letters in enumerate(made[:30])}
    turned = reverse_complement(batch.tokens, batch.lengths)
    found, flipped = [], 0
    for row, other, length, label in zip(batch.tokens, turned, batch.lengths, batch.labels, strict=True):
        straight = known.get(tuple(row[:length].tolist()))
        i = known[tuple(other[:length].tolist())] if straight is None else straight
        flipped += straight is None
        assert label == i % 2
        found.append(i)
    assert sorted(found) == list(range(30))
    assert 5 <= flipped <= 25


@pytest.mark.parametrize("window_bp", [None, 20])
@pytest.mark.parametrize("split", ["train", "test"])
def test_intervals_on_the_other_strand_are_read_from_there(
    split: str, window_bp: int | None, tmp_path: Path, write_fasta: Writer, random_dna: Dna
) -> None:
    genome = random_dna(2000)
    fasta = write_fasta("genome.fa", {"chr1": genome})
    bed = tmp_path / "sites.bed"
    lines = [f"chr1\t{at}\t{at + 40}\tk{i % 2}\t0\t{'+-'[i // 2 % 2]}" for i, at in enumerate(range(0, 2000, 40))]
    bed.write_text("\n".join(lines) + "\n")
    options: dict[str, Any] = {"fasta": str(fasta), "window_bp": window_bp, "sampling": "grid", "rc_probability": 0.0}
    data = module(bed, label_column="label", split_rules=[{"split": split}], batch_size=5, **options)
    data.setup("fit" if split == "train" else "test")
    loader = data.train_dataloader() if split == "train" else data.test_dataloader()
    seen = {decode(row) for batch in loader for row in batch.tokens}
    expected = set()
    for line in lines:
        _, start, end, _, _, strand = line.split("\t")
        for at in range(int(start), int(end), window_bp or 40):
            letters = genome[at : at + (window_bp or 40)]
            expected.add(letters if strand == "+" else letters[::-1].translate(str.maketrans("ACGT", "TGCA")))
    assert seen == expected


def test_a_set_to_test_on_alone_needs_no_train(genomes: Path) -> None:
    data = module(genomes, split_rules=[{"split": "test"}])
    data.setup("test")
    assert data.train is None
    assert data.test is not None
    assert len(data.test) == 6 * 100
    with pytest.raises(UserError, match="leaves nothing to train on"):
        data.train_dataloader()


def test_evaluation_windows_can_be_capped_evenly(genomes: Path) -> None:
    data = module(genomes, split_rules=RULES, eval_windows=20)
    data.setup()
    assert Counter(data.test.windows.label.tolist()) == {0: 10, 1: 10}
    starts = data.test.windows.start_bp[data.test.windows.label == 0]
    assert starts[0] == 0
    assert starts[-1] == 2900
    assert (np.diff(starts) > 0).all()


def test_position_split_keeps_a_guard_of_a_window(genomes: Path) -> None:
    data = module(genomes, split_positions={"train": [0, 0.5], "val": [0.5, 0.7], "test": [0.7, 1]})
    data.setup("fit")
    chr4 = data.grid("train").windows.record == "0.fa:chr4"
    assert data.grid("train").windows.end_bp[chr4].max() == 1900
    assert data.test.windows.start_bp[data.test.windows.record == "0.fa:chr4"].min() == 2800
    assert data.report is not None
    assert data.report.overlaps == {"val": 0, "test": 0}


class Recorder(LightningModule):
    """Learns nothing; writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[bytes] = []

    def training_step(self, batch: DNABatch, _: int) -> torch.Tensor:
        self.seen.append(batch.tokens.numpy().tobytes())
        return (self.weight * batch.lengths.float().mean()).sum()

    def validation_step(self, batch: DNABatch, _: int) -> None:
        pass

    def predict_step(self, batch: DNABatch, _: int) -> torch.Tensor:
        return batch.labels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path: Path, **changes: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=tmp_path, max_epochs=3, num_sanity_val_steps=0, **quiet, **changes)


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_training_sees_what_an_uninterrupted_run_sees(genomes: Path, tmp_path: Path, workers: int) -> None:
    def data() -> DNADataModule:
        return module(genomes, split_rules=RULES, windows_per_epoch=40, num_workers=workers, leakage_report=False)

    whole = Recorder()
    saver = ModelCheckpoint(tmp_path / "steps", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    ends = ModelCheckpoint(tmp_path / "ends", save_top_k=-1, filename="{epoch}")
    trainer(tmp_path, callbacks=[saver, ends]).fit(whole, datamodule=data())
    assert len(whole.seen) == 15
    assert len(set(whole.seen)) == 15
    checkpoints = {"steps/step=3.ckpt": 3, "steps/step=5.ckpt": 5, "steps/step=8.ckpt": 8, "ends/epoch=1.ckpt": 10}
    for name in list(checkpoints)[2 * workers :]:
        done = checkpoints[name]
        rest = Recorder()
        trainer(tmp_path).fit(rest, datamodule=data(), ckpt_path=tmp_path / name)
        assert rest.seen == whole.seen[done:], name


def test_the_checkpoint_holds_labels_counts_and_plain_arguments(genomes: Path, tmp_path: Path) -> None:
    fitter = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    fitter.fit(Recorder(), datamodule=module(genomes, split_rules=RULES))
    fitter.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["DNADataModule"]["labels"] == ["a", "b"]
    assert checkpoint["DNADataModule"]["counts"]["test"] == {"a": 30, "b": 30}
    again = DNADataModule(**checkpoint["datamodule_hyper_parameters"])
    assert again.hparams == module(genomes, split_rules=RULES).hparams
    again.load_state_dict(checkpoint["DNADataModule"])
    with pytest.raises(UserError, match=r"trained on the classes \['a', 'z'\]"):
        again.load_state_dict({"labels": ["a", "z"], "counts": {}})


def test_prediction_goes_over_the_test_windows_in_order(genomes: Path, tmp_path: Path) -> None:
    data = module(genomes, split_rules=RULES)
    labels = torch.cat(trainer(tmp_path).predict(Recorder(), datamodule=data))  # type: ignore[arg-type]
    assert labels.tolist() == data.test.windows.label.tolist()


def test_bad_input_is_one_clear_line(genomes: Path, tmp_path: Path, write_fasta: Writer, random_dna: Dna) -> None:
    def build(path: Path, **changes: Any) -> None:
        data = module(path, **changes)
        data.prepare_data()
        data.setup("fit")

    def fails(message: str, path: Path, **changes: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            build(path, **changes)
        assert "\n" not in str(caught.value)

    def table(name: str, *rows: str) -> Path:
        (tmp_path / name).write_text("\n".join(rows) + "\n")
        return tmp_path / name

    fails(
        "window_bp 5000 is longer than every region of the train split .the longest has 4000 bp",
        genomes,
        window_bp=5000,
    )
    fails(
        "class 'a' has 0 windows in the test split, 1 needed",
        genomes,
        split_rules=[{"split": "test", "species": "b", "record": "chr3"}, *RULES[2:]],
    )
    fails(
        "class 'b' has 30 windows in the test split, 31 needed",
        genomes,
        min_class_windows=31,
        split_rules=[{"split": "test", "species": "a", "record": "chr3"}, *RULES],
    )
    fails("leaves nothing to train on", genomes, split_rules=[{"split": "test"}])
    fails("two classes or more, found .'a'.", genomes, classes=["a"])
    fails("max_n_fraction is 1.5", genomes, max_n_fraction=1.5)
    fails("batch_size is 0", genomes, batch_size=0)
    fails("group_column names the column 'genus'", genomes, group_column="genus", split_rules=RULES)
    fails("set index_dir", genomes, index_dir="/proc/index")
    write_fasta("n.fa", {f"r{i}": "N" * 500 for i in range(20)})
    rows = [f"r{i}\t{'ab'[i % 2]}" for i in range(20)]
    labels = table("labels.tsv", "record\tspecies", *rows)
    fails("all .* windows of the train split have more than 50% N", tmp_path / "n.fa", labels_table=str(labels))
    fails(
        "all .* windows of the train split have more than 100% N",
        tmp_path / "n.fa",
        labels_table=str(labels),
        max_n_fraction=1.0,
    )
    write_fasta("r.fa", {f"r{i}": random_dna(500, i) for i in range(20)})
    fails(
        "record 'r19' of r.fa has no label .1 such.: add it to",
        tmp_path / "r.fa",
        labels_table=str(table("short.tsv", "record\tspecies", *rows[:-1])),
    )
    fails(
        "names the record 'r20', which",
        tmp_path / "r.fa",
        labels_table=str(table("long.tsv", "record\tspecies", *rows, "r20\ta")),
    )
    fails("comes without labels: set labels_table", tmp_path / "r.fa")
    fails("no column 'species'", table("t.csv", "sequence,label", "ACGT,1"))
    fails("unknown split 'exam'", table("t.csv", "sequence,species,split", "ACGT,a,exam", "ACGA,b,train"))


def test_all_train_sequences_in_test_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sequence,label,split\nACGT,a,train\nGGGA,b,train\nACGT,a,test\nGGGA,b,test\n")
    with pytest.raises(UserError, match="every train sequence also stands"):
        DNADataModule(str(tmp_path / "t.csv"), val_fraction=0).setup()
