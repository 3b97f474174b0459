"""The running average of the weights."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from seqssm.errors import UserError
from seqssm.tasks.averaging import RunningAverage


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.norm = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.norm(self.line(batch)).square().mean() + self.line.weight.sum()

    def on_train_batch_end(self, *_: object) -> None:
        self.seen.append(self.line.weight.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_weights_are_averaged_with_a_short_memory_at_first() -> None:
    model = Line()
    trainer = pl.Trainer(
        max_steps=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[RunningAverage(decay=0.6)],
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.arange(60.0).view(60, 1), batch_size=2))
    expected = model.seen[0]
    for n, weight in enumerate(model.seen):
        kept = min(0.6, (1 + n) / (10 + n))
        expected = weight if n == 0 else kept * expected + (1 - kept) * weight
    torch.testing.assert_close(model.line.weight.item(), expected, rtol=1e-5, atol=1e-6)
    assert int(model.norm.num_batches_tracked) == 30


def test_checkpoints_without_the_average_are_refused(tmp_path: Path) -> None:
    callbacks = [RunningAverage(), pl.callbacks.ModelCheckpoint(tmp_path, save_weights_only=True)]
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=callbacks
    )  # fmt: skip
    with pytest.raises(UserError, match="not their running average"):
        trainer.fit(Line(), DataLoader(torch.arange(60.0).view(60, 1), batch_size=2))


@pytest.mark.gpu
def test_the_average_is_kept_where_the_model_is() -> None:
    average = RunningAverage(decay=0.6)
    trainer = pl.Trainer(
        max_steps=3, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[average],
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(torch.arange(60.0).view(60, 1), batch_size=2))
    assert average._average_model is not None
    assert {one.device.type for one in average._average_model.state_dict().values()} == {"cuda"}
