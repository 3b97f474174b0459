"""A running average of the weights, which generalises better than the weights themselves."""

from __future__ import annotations

from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from seqssm.errors import UserError


class RunningAverage(WeightAveraging):
    """Exponential moving average of the weights for validation, checkpoints and tests.

    The first averages are short, min(decay, (1 + n) / (10 + n)) after n steps, so that a run of a few hundred steps
    does not drag its random start along.

    Args:
        decay: share of the old average that a step keeps: 0.998 remembers about 500 steps.
    """

    def __init__(self, decay: float = 0.998) -> None:
        self.decay = decay
        super().__init__()

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimizer step."""
        return step_idx is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average.

        Raises:
            UserError: checkpoints would hold the weights themselves.
        """
        if stage == "fit" and any(getattr(one, "save_weights_only", False) for one in trainer.checkpoint_callbacks):
            # Lightning asks no callback for what belongs into such a checkpoint.
            raise UserError(
                "ModelCheckpoint with save_weights_only keeps the weights themselves, not their running average, which "
                "validation scores: set save_weights_only: false, or leave RunningAverage out"
            )
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the average where the model is: it was made before the model was moved, and would have every step wait
        for each weight to be copied."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after an optimizer step, without asking the device how often that has been done."""
        done = trainer.global_step
        if done <= self._latest_update_step or not self.should_update(step_idx=done - 1):
            return
        assert self._average_model is not None
        kept = min(self.decay, done / (done + 9)) if self._latest_update_step else 0.0
        averages, weights = _tensors(self._average_model.module), _tensors(pl_module)
        floats = [i for i, one in enumerate(averages) if one.is_floating_point()]
        others = sorted(set(range(len(averages))) - set(floats))  # counters of the norms
        torch._foreach_lerp_([averages[i] for i in floats], [weights[i] for i in floats], 1 - kept)
        if others:
            torch._foreach_copy_([averages[i] for i in others], [weights[i] for i in others])
        self._average_model.n_averaged += 1
        self._latest_update_step = done


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
