"""What every task shares: configuration that travels with the weights, the optimizer, exact resumption, loading."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

import seqssm
from seqssm import hub
from seqssm.backbone import BackboneConfig
from seqssm.errors import UserError
from seqssm.longcontext.parallel import LengthSplit
from seqssm.optim import parameter_groups, remember_shapes, warmup_cosine

CHECKPOINT_KEY = "seqssm"
T = TypeVar("T", bound="Task")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, stepped every optimizer step.

    Args:
        lr: peak learning rate.
        weight_decay: applied to matrices only: never to A_log, D, dt_bias, norms and biases.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        warmup_fraction: share of all steps in which the rate rises linearly from zero.
        final_fraction: the rate at the last step, as a share of ``lr``.
    """

    lr: float = 2e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_fraction: float = 0.1
    final_fraction: float = 0.02


class Task(pl.LightningModule):
    """A head, a loss, metrics and decoding around one :class:`~seqssm.backbone.Backbone`.

    A subclass passes its own plain-data arguments to ``super().__init__`` as ``head``; together they are the task's
    whole configuration, stored in every checkpoint as JSON-like data, so that a checkpoint is self-contained.
    """

    def __init__(self, backbone: BackboneConfig, optimizer: OptimizerConfig, init_from: str | None, **head: Any):
        super().__init__()
        # Lightning's load_from_checkpoint hands the stored plain data over as it is.
        self.backbone_config = BackboneConfig.from_dict(backbone) if isinstance(backbone, dict) else backbone
        self.optimizer_config = OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer
        self.init_from = init_from
        self._head_args = head
        self.save_hyperparameters({**self.init_args(), "_class_path": class_path(type(self))})

    def init_args(self) -> dict[str, Any]:
        """The arguments that build this task again, as plain data. ``init_from`` is left out: the weights are here."""
        return {
            "backbone": self.backbone_config.to_dict(),
            "optimizer": dataclasses.asdict(self.optimizer_config),
            **self._head_args,
        }

    @classmethod
    def from_init_args(cls, init_args: dict[str, Any]) -> Self:
        """Build a task, with fresh weights, from what :meth:`init_args` gave."""
        args = dict(init_args)
        backbone = BackboneConfig.from_dict(args.pop("backbone"))
        optimizer = OptimizerConfig(**args.pop("optimizer"))
        return cls(backbone=backbone, optimizer=optimizer, **args)

    def load_initial_weights(self) -> None:
        """Copy the backbone and embedding of the checkpoint ``init_from``; a subclass calls it last in ``__init__``.

        Every backbone weight must be there, and no weight of the backbone or the embedding may differ in shape; what
        is new here, and what the checkpoint has beyond it, is printed.
        """
        if self.init_from is None:
            return
        source = read_checkpoint(self.init_from).weights
        own = self.state_dict()
        matching = {k: v for k, v in source.items() if k in own and own[k].shape == v.shape}
        missing = [k for k in own if k.startswith("backbone.") and k not in matching]
        if missing:
            raise UserError(
                f"init_from {self.init_from}: {len(missing)} backbone weights do not fit this model "
                f"(first: {missing[0]}); use the backbone settings that the checkpoint was trained with"
            )
        other = [k for k in source if k.startswith("embedding.") and k in own and k not in matching]
        if other:
            raise UserError(
                f"init_from {self.init_from}: {other[0]} is {tuple(source[other[0]].shape)} there and "
                f"{tuple(own[other[0]].shape)} here; use the embedding settings that the checkpoint was trained with"
            )
        self.load_state_dict(matching, strict=False)
        fresh, unused = sorted(set(own) - set(matching)), sorted(set(source) - set(matching))
        rank_zero_info(
            f"init_from {self.init_from}: {len(matching)} tensors loaded; new: {', '.join(fresh) or 'none'}; "
            f"not used: {', '.join(unused) or 'none'}"
        )

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
        remember_shapes(self)

    def configure_optimizers(self) -> Any:
        c = self.optimizer_config
        optimizer = torch.optim.AdamW(parameter_groups(self, c.weight_decay), lr=c.lr, betas=(c.beta1, c.beta2))
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
        """What a checkpoint says of itself: version, task class and its arguments, all plain data."""
        return {"version": seqssm.__version__, "task": class_path(type(self)), "init_args": self.init_args()}


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# ---- loading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A checkpoint read from disk, in plain data and tensors.

    Attributes:
        description: what :meth:`Task.describe` stored.
        weights: the state dict, on the CPU.
        data: arguments of the DataModule it was trained with: ``{"class_path": ..., "init_args": ...}``, or ``{}``.
    """

    description: dict[str, Any]
    weights: dict[str, Tensor]
    data: dict[str, Any]


def read_checkpoint(checkpoint: str | Path) -> Loaded:
    """Read a Lightning ``.ckpt`` or a folder in hub format. Runs no code from the file.

    Raises:
        UserError: nothing there, not a checkpoint, or not one of this program's.
    """
    path = Path(checkpoint)
    if path.is_dir():
        config, weights = hub.load(path)
        return Loaded(config, weights, config.get("data", {}))
    if not path.is_file():
        raise UserError(f"{checkpoint}: no such checkpoint; give a Lightning .ckpt or a folder that `seqssm` saved")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({str(error).splitlines()[0]}); is the file whole?"
        ) from error
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content:
        raise UserError(f"{path}: not a checkpoint of a seqssm task; train one with `seqssm fit`")
    description = content[CHECKPOINT_KEY]
    return Loaded(description, content["state_dict"], description.get("data", {}))


def load_task(checkpoint: str | Path, expected: type[T]) -> T:
    """Load a trained task in evaluation mode.

    Raises:
        UserError: as :func:`read_checkpoint`, or the checkpoint holds another task than ``expected``.
    """
    return build_task(read_checkpoint(checkpoint), expected, str(checkpoint))


def task_class(loaded: Loaded, name: str) -> type[Task]:
    """The class of the task that a checkpoint holds, which must be one of this program's."""
    path = loaded.description["task"]
    if not path.startswith("seqssm."):
        raise UserError(f"{name}: its task is {path}, which is not one of seqssm's; load it in Python, with its class")
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def build_task(loaded: Loaded, expected: type[T], name: str) -> T:
    """Turn what :func:`read_checkpoint` gave into a module in evaluation mode."""
    cls = task_class(loaded, name)
    if not issubclass(cls, expected):
        raise UserError(f"{name} holds a {cls.__name__}; this command needs a {expected.__name__} checkpoint")
    task = cls.from_init_args(loaded.description["init_args"])
    task.load_state_dict(loaded.weights)
    return task.eval()
