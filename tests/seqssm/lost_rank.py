"""A callback with which one process of a run is lost in the middle of an epoch, see test_strategies.py."""

import lightning.pytorch as pl


class LoseRank(pl.Callback):
    """Raise in process ``rank`` before batch ``batch``."""

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, index: int) -> None:
        if trainer.global_rank == self.rank and index == self.batch:
            raise RuntimeError("the device fell off the bus")
