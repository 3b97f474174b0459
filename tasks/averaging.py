"""A running average of the weights, which generalises better than the weights themselves."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class RunningAverage(WeightAveraging):
    """Exponential moving average of the weights for validation, checkpoints and tests.

    The first averages are short, min(decay, (1 + n) / (10 + n)) after n steps, so that a run of a few hundred steps
    does not drag its random start along.

    Args:
        decay: share of the old average that a step keeps: 0.998 remembers about 500 steps.
    """

    def __init__(self, decay: float = 0.998) -> None:
        self.decay = decay
        self._step = 0
        super().__init__(multi_avg_fn=self._average)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimizer step."""
        self._step = step_idx or 0
        return step_idx is not None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the average where the model is: it was made before the model was moved, and would have every step wait
        for each weight to be copied."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    @torch.no_grad()
    def _average(self, averages: list[Tensor], weights: list[Tensor], _: Tensor | int) -> None:
        if not averages[0].is_floating_point():  # counters of the norms
            torch._foreach_copy_(averages, weights)
            return
        kept = min(self.decay, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(averages, weights, 1 - kept)
