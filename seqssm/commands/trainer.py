"""The Lightning CLI as this package sets it up."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerStatus

import seqssm.data.audio.datamodule  # imports every DataModule: the parser knows short names of imported classes
import seqssm.data.dna.unlabelled
import seqssm.data.speech.datamodule
import seqssm.data.synthetic
import seqssm.data.synthetic_tasks
import seqssm.tasks.asr
import seqssm.tasks.dna  # the same for tasks
import seqssm.tasks.pretraining
import seqssm.tasks.synthetic
import seqssm.tasks.tagging  # noqa: F401
from seqssm.errors import UserError
from seqssm.tasks.base import Task, read_checkpoint

COMMANDS = ("fit", "validate", "test", "predict")
FROM_DATA = ("labels", "multi_label", "features", "tokenizer", "text", "vocabulary_size")
"""Arguments of a model that are the data's to say; those that a task does not take are left out."""
HOW_NOT_WHAT = ("thresholds", "chunk_length", "chunk_offload", "chunk_kept")
"""Arguments of a model that a resumed run may change: they leave what is learnt as it is."""


POSITIVE = ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch", "log_every_n_steps")
"""Settings of the trainer that Lightning divides by, some of them without a look."""


class SaveConfig(SaveConfigCallback):
    """Writes the config beside the results, in a folder that has none of an earlier run."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        found = Path(trainer.log_dir or ".") / self.config_filename
        if not self.already_saved and trainer.strategy.broadcast(trainer.is_global_zero and found.is_file()):
            raise UserError(
                f"{found} is there from an earlier run, whose results would be mixed with these: move that folder, or "
                "give the logger another name or version"
            )
        super().setup(trainer, pl_module, stage)


class TaskCLI(LightningCLI):
    """``seqssm fit|validate|test|predict``: any :class:`Task` with any DataModule, from YAML and the command line.

    Args:
        args: the command and its arguments; the arguments alone without ``run``.
        run: run the command, or only make the trainer, the model and the data that the arguments ask for.
    """

    def __init__(self, args: list[str], run: bool = True) -> None:
        self._command_line = shlex.join(["seqssm", *args])
        strict = {"exit_on_error": False}
        super().__init__(
            Task,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            parser_kwargs={**strict, **{command: dict(strict) for command in COMMANDS}},
            trainer_defaults={
                "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}}
            },
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The classes are the data's to name; in the model's arguments they travel with the weights.
        for name in FROM_DATA:
            value = functools.partial(_attribute, name)
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=value, apply_on="instantiate")
        parser.add_argument(
            "--evaluate",
            type=bool,
            default=False,
            help="after fit, score the best checkpoint on the test split beside the baselines",
        )

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """As Lightning does; settings that make no sense are the user's."""
        for name in POSITIVE:
            value = self._get(self.config_init, f"trainer.{name}")
            if value is not None and value <= 0:
                raise UserError(f"trainer.{name} is {value}: it must be positive")
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def _parse_ckpt_path(self) -> None:
        """Refuse a checkpoint that disagrees with the config, where Lightning lets the checkpoint win in silence."""
        if not self.config.get("subcommand"):
            return
        path = self.config[self.config.subcommand].get("ckpt_path")
        if not path or not Path(path).is_file():
            return
        stored = read_checkpoint(path).description
        model = self.config[self.config.subcommand]["model"]
        if model["class_path"] != stored["task"]:
            raise UserError(f"--ckpt_path {path} holds a {stored['task']}, the config asks for a {model['class_path']}")
        configured = (
            model["init_args"].as_dict() if hasattr(model["init_args"], "as_dict") else dict(model["init_args"])
        )
        for key, value in stored["init_args"].items():
            if key in configured and key not in (*FROM_DATA, *HOW_NOT_WHAT) and configured[key] != value:
                raise UserError(
                    f"--ckpt_path {path} was trained with model.{key} = {value}, the config says {configured[key]}; "
                    "make them agree to resume, or start from its weights with --model.init_args.init_from"
                )

    def _run_subcommand(self, subcommand: str) -> None:
        """Say what an interrupted run has left, where Lightning ends the program without a word."""
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as error:
            if self.trainer.state.status != TrainerStatus.INTERRUPTED:
                raise
            if subcommand == "fit":
                last = max(self._written(), key=os.path.getmtime, default="")
                found = (
                    f"go on from its last checkpoint with --ckpt_path {last}" if last else "there is no checkpoint yet"
                )
                print(f"seqssm: the run was interrupted: {found}", file=sys.stderr)
            raise KeyboardInterrupt from error

    def _written(self) -> list[str]:
        """The checkpoints of the run that are there."""
        callbacks: list[Any] = self.trainer.checkpoint_callbacks
        paths = [getattr(one, name, "") for one in callbacks for name in ("best_model_path", "last_model_path")]
        return [path for path in dict.fromkeys(paths) if path and os.path.isfile(path)]

    def before_predict(self) -> None:
        """Refuse to compute what nobody keeps: Lightning's command drops what comes out."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(one, BasePredictionWriter) for one in callbacks):
            raise UserError(
                "seqssm predict keeps nothing by itself: add a BasePredictionWriter to trainer.callbacks, or use "
                "seqssm classify, tag, transcribe or evaluate"
            )

    def after_fit(self) -> None:
        written = self._written()
        if written and self.trainer.is_global_zero:
            print(f"seqssm: wrote {', '.join(written)}", file=sys.stderr)
        if not self.config["fit"]["evaluate"]:
            return
        from seqssm.commands.evaluate import evaluate

        callback: Any = self.trainer.checkpoint_callback
        best = callback.best_model_path if callback is not None else ""
        if not best:
            raise UserError("--evaluate needs a ModelCheckpoint callback with `monitor` in trainer.callbacks")
        evaluate(
            best,
            datamodule=self.datamodule,
            folder=Path(self.trainer.log_dir or "."),
            command=self._command_line,
        )


def _attribute(name: str, datamodule: pl.LightningDataModule) -> Any:
    value = getattr(datamodule, name, None)
    if value is not None and hasattr(value, "to_dict"):
        return value.to_dict()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
