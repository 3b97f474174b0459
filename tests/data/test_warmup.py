"""Length warm-up: what a step sees at each stage, that resuming changes nothing, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from seqssm.data import DNABatch, DNADataModule
from seqssm.data.dna.warmup import window_lengths
from seqssm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def genomes(tmp_path: Path, write_fasta: Callable[..., Path], random_dna: Callable[..., str]) -> Path:
    rows = ["path\tspecies"]
    for number in range(4):
        write_fasta(f"genomes/{number}.fa", {f"chr{c}": random_dna(1000 * c, 10 * number + c) for c in range(1, 5)})
        rows.append(f"{number}.fa\t{'ab'[number % 2]}")
    table = tmp_path / "genomes" / "samples.tsv"
    table.write_text("\n".join(rows) + "\n")
    return table


def module(path: Path, **changes: Any) -> DNADataModule:
    settings: dict[str, Any] = {
        "label_column": "species",
        "window_bp": 256,
        "warmup_from_bp": 64,
        "windows_per_epoch": 20,
        "batch_size": 4,
        "balance": True,
        "split_rules": [{"split": "val", "record": "chr3"}, {"split": "test", "record": "chr2"}, {"split": "train"}],
        "leakage_report": False,
        **changes,
    }
    return DNADataModule(str(path), **settings)


class Recorder(LightningModule):
    """Learns nothing; writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, int]] = []
        self.seen: list[bytes] = []
        self.classes: list[list[int]] = []
        self.val_lengths: set[int] = set()

    def training_step(self, batch: DNABatch, _: int) -> torch.Tensor:
        self.shapes.append(tuple(batch.tokens.shape))
        self.classes.append(batch.labels.bincount(minlength=2).tolist())
        self.seen.append(batch.tokens.numpy().tobytes())
        return (self.weight * batch.lengths.float().mean()).sum()

    def validation_step(self, batch: DNABatch, _: int) -> None:
        self.val_lengths |= set(batch.lengths.tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path: Path, **changes: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=tmp_path, num_sanity_val_steps=0, **{"max_epochs": 6, **quiet, **changes})


@pytest.mark.parametrize("workers", [0, 1])
def test_lengths_double_at_constant_bases_a_step_and_a_run_resumes_anywhere(
    genomes: Path, tmp_path: Path, workers: int
) -> None:
    def data() -> DNADataModule:
        return module(genomes, warmup_epochs=2, num_workers=workers)

    whole = Recorder()
    saver = ModelCheckpoint(tmp_path / "steps", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    ends = ModelCheckpoint(tmp_path / "ends", save_top_k=-1, filename="{epoch}")
    trainer(tmp_path, callbacks=[saver, ends]).fit(whole, datamodule=data())
    assert whole.shapes == 10 * [(16, 64)] + 10 * [(8, 128)] + 10 * [(4, 256)]  # five steps an epoch
    assert len(set(whole.seen)) == 30
    assert np.array_equal(np.sum(whole.classes[:5], 0), [40, 40])  # balanced at every length
    assert whole.val_lengths == {256}
    # Inside the first stage, at its end, inside an epoch of the second, at an epoch's end between two stages.
    checkpoints = {"steps/step=3.ckpt": 3, "steps/step=10.ckpt": 10, "steps/step=13.ckpt": 13, "ends/epoch=3.ckpt": 20}
    for name in list(checkpoints)[2 * workers :]:
        rest = Recorder()
        trainer(tmp_path).fit(rest, datamodule=data(), ckpt_path=tmp_path / name)
        assert rest.seen == whole.seen[checkpoints[name] :], name


def test_the_last_stage_is_training_without_warm_up(genomes: Path) -> None:
    warm, plain = module(genomes), module(genomes, warmup_from_bp=None)
    for data in (warm, plain):
        data.setup("fit")
    assert warm.warmup.schedule(4) == (
        "windows a step: from epoch 0 16 x 64 bp, from epoch 1 8 x 128 bp, from epoch 2 4 x 256 bp"
    )
    for epoch in (2, 7):
        for i in range(epoch * 20, epoch * 20 + 20):
            (sample,) = warm.warmup[i]
            assert np.array_equal(sample.tokens, plain.train[i].tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_from_bp": 96}, r"window_bp \(256\) must be 2, 4, 8"),
        ({"warmup_from_bp": 256}, "must be 2, 4, 8"),
        ({"warmup_from_bp": 0}, "warmup_from_bp is 0"),
        ({"window_bp": None}, "needs window_bp"),
        ({"sampling": "grid"}, "needs sampling: random"),
        ({"warmup_epochs": 0}, "warmup_epochs is 0"),
    ],
)
def test_schedules_that_do_not_work_are_refused(genomes: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(genomes, **changes)


def test_a_run_too_short_for_its_warm_up_is_refused(genomes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes 2 epochs and trainer\.max_epochs is 2"):
        trainer(tmp_path, max_epochs=2).fit(Recorder(), datamodule=module(genomes))


def test_lengths_are_powers_of_two_apart() -> None:
    assert window_lengths(1000, 8000) == [1000, 2000, 4000, 8000]
