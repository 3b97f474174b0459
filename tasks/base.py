"""What every task shares: configuration that travels with the weights, the optimizer, exact resumption, loading."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

import seqssm
from seqssm import hub
from seqssm.backbone import BackboneConfig
from seqssm.errors import UserError
from seqssm.longcontext.parallel import LengthSplit
from seqssm.optim import parameter_groups, remember_shapes, warmup_cosine
from seqssm.tasks.initial import start_from
from seqssm.tasks.network import (
    CHECKPOINT_KEY,
    Loaded,
    N,
    Network,
    build_expected,
    class_path,
    read_checkpoint,
    weights_of,
)

__all__ = [
    "CHECKPOINT_KEY",
    "Loaded",
    "OptimizerConfig",
    "Task",
    "build_task",
    "class_path",
    "load_task",
    "read_checkpoint",
    "task_class",
    "weights_of",
]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, stepped every optimizer step.

    Args:
        lr: peak learning rate.
        weight_decay: applied to matrices only: never to A_log, D, dt_bias, norms and biases.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: what is added to a gradient's size before it is divided by it: gradients far below it hardly move a weight.
            Those of step sizes that start next to zero are as small as the step sizes.
        warmup_fraction: share of all steps in which the rate rises linearly from zero.
        final_fraction: the rate at the last step, as a share of ``lr``.
    """

    lr: float = 2e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_fraction: float = 0.1
    final_fraction: float = 0.02

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise UserError(f"optimizer.eps is {self.eps}: it must be positive")
        for name in ("lr", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: it must lie between 0 and 1")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: it must lie between 0 and 1")


class Task(Network, pl.LightningModule):
    """A head, a loss, metrics and decoding around one :class:`~seqssm.backbone.Backbone`.

    A subclass passes its own plain-data arguments to ``super().__init__``, under their names; together they are the
    task's whole configuration, stored in every checkpoint as JSON-like data, so that a checkpoint is self-contained.
    One whose model answers without Lightning derives from that model's :class:`~seqssm.tasks.network.Network`, too,
    which comes first: ``class DNAClassification(DNANetwork, Task)``.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        init_from: str | None = None,
        **own: Any,
    ) -> None:
        super().__init__(backbone, **own)
        self.optimizer_config = OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer
        self.init_from = init_from
        self.save_hyperparameters({**self.init_args(), "_class_path": class_path(type(self))})

    def init_args(self) -> dict[str, Any]:
        """The arguments that build this task again, as plain data. ``init_from`` is left out: the weights are here."""
        return {"optimizer": dataclasses.asdict(self.optimizer_config), **super().init_args()}

    @classmethod
    def from_init_args(cls, init_args: Mapping[str, Any]) -> Self:
        """Build a task, with fresh weights, from what :meth:`init_args` gave."""
        args = dict(init_args)
        return super().from_init_args({**args, "optimizer": OptimizerConfig(**args.pop("optimizer"))})

    def load_initial_weights(self) -> None:
        """Start from the checkpoint ``init_from``; a subclass calls it last in ``__init__``.

        The backbone must fit wholly, and what else both have, in its shapes; the parts that depend on the classes are
        taken only where these are the same. What is not taken is printed.

        Raises:
            UserError: it does not fit.
        """
        if self.init_from is not None:
            rank_zero_info(start_from(self, read_checkpoint(self.init_from), self.init_from))

    def split_length(self, split: LengthSplit) -> None:
        """Run sequences whose length is split over processes, from now on; a strategy calls it before training.

        Raises:
            UserError: the task, or this model of it, cannot.
        """
        raise UserError(
            f"{type(self).__name__} cannot have the length of its sequences split over processes: "
            "use another strategy, such as --trainer.strategy ddp"
        )

    # ---- training ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if getattr(self, "chunk_length", 0) and isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError(
                "model.chunk_length recomputes chunks in the backward pass, when a sharded strategy has given the "
                "weights back: use trainer.strategy ddp, or chunk_length 0"
            )
        backend, place = self.backbone_config.backend, self.trainer.strategy.root_device.type
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if (backend == "triton" and place != "cuda" and not interpreted) or (backend == "numba" and place != "cpu"):
            raise UserError(f"backbone.backend {backend} does not run on {place}: choose auto, or trainer.accelerator")
        remember_shapes(self)

    def configure_optimizers(self) -> Any:
        c = self.optimizer_config
        groups = parameter_groups(self, c.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
        total = self._total_steps()
        schedule = warmup_cosine(optimizer, int(c.warmup_fraction * total), total, c.final_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _total_steps(self) -> int:
        """Optimizer steps of the whole run.

        ``trainer.estimated_stepping_batches`` would say so too, but it sets up the training loader before Lightning
        restores a checkpoint, which then forgets where in the epoch that loader was.
        """
        trainer, datamodule = self.trainer, getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            total = trainer.estimated_stepping_batches
        else:
            batches, limit = len(datamodule.train_dataloader()), trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            epochs = float("inf") if trainer.max_epochs in (None, -1) else trainer.max_epochs
            total = -(-batches // trainer.accumulate_grad_batches) * epochs
            total = total if trainer.max_steps == -1 else min(total, trainer.max_steps)
        if total == float("inf"):
            raise UserError("set trainer.max_epochs or trainer.max_steps: the learning rate falls to the run's end")
        return int(total)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout and other random choices depend on the step alone: a resumed run repeats an uninterrupted one.
        seed = torch.initial_seed() if self._base_seed is None else self._base_seed
        self._base_seed = seed
        torch.manual_seed(hash((seed, self.current_epoch, batch_idx, self.global_rank)) % 2**63)

    _base_seed: int | None = None

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        about = {"data": self._describe_data(), "base_seed": self._base_seed, "epochs": self.trainer.max_epochs}
        checkpoint[CHECKPOINT_KEY] = {**self.describe(), **about}

    def _describe_data(self) -> dict[str, Any]:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            return {}
        arguments = {key: value for key, value in datamodule.hparams.items() if not key.startswith("_")}
        return {"class_path": class_path(type(datamodule)), "init_args": arguments}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._base_seed = checkpoint.get(CHECKPOINT_KEY, {}).get("base_seed")

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of itself: version, task class and its arguments, all plain data.

        ``network`` names the class that answers, and those of the arguments that only training needs.
        """
        about = {"version": seqssm.__version__, "task": class_path(type(self)), "init_args": self.init_args()}
        answers = next(
            cls for cls in type(self).__mro__ if issubclass(cls, Network) and not issubclass(cls, pl.LightningModule)
        )
        if answers is not Network:
            taken = inspect.signature(answers).parameters
            training = [key for key in about["init_args"] if key not in taken]
            about["network"] = {"class_path": class_path(answers), "training_args": training}
        return about


# ---- loading -------------------------------------------------------------------------------------------------------


def load_task(checkpoint: str | Path, expected: type[N]) -> N:
    """Load a trained task in evaluation mode.

    Raises:
        UserError: as :func:`read_checkpoint`, or the checkpoint holds another task than ``expected``.
    """
    return build_task(read_checkpoint(checkpoint), expected, str(checkpoint))


def task_class(loaded: Loaded, name: str) -> type[Task]:
    """The class of the task that a checkpoint holds, which must be one of this program's."""
    cls = hub.own_class(loaded.description["task"], name)
    if not issubclass(cls, Task):
        raise UserError(f"{name} holds a {cls.__name__}, which is not one of seqssm's tasks: load it in Python")
    return cls


def build_task(loaded: Loaded, expected: type[N], name: str) -> N:
    """Turn what :func:`read_checkpoint` gave into a module in evaluation mode."""
    return build_expected(task_class(loaded, name), expected, loaded.description["init_args"], loaded.weights, name)
