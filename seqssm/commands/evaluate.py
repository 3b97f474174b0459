"""Score a checkpoint on held-out data, with bootstrap intervals, beside baselines fitted on the same examples."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from seqssm.cli import config_section
from seqssm.commands import evaluate_asr, evaluate_tagging
from seqssm.commands.evaluate_synthetic import evaluate_synthetic, is_synthetic
from seqssm.errors import UserError
from seqssm.tasks.asr_network import ASRNetwork
from seqssm.tasks.base import Loaded, read_checkpoint, task_class
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.network import Network, add_checkpoint_argument, checkpoint_or_default
from seqssm.tasks.pretraining import DNAPretraining
from seqssm.tasks.tagging import AudioTagging
from seqssm.tasks.tagging_network import TaggingNetwork


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--data", help="a YAML config whose `data` section to use; default: the data the checkpoint was trained with"
    )
    parser.add_argument("--split", choices=("test", "val"), default="test", help="default: %(default)s")
    parser.add_argument("--output", "-o", type=Path, help="folder for metrics.json, evaluation.md and figures")
    parser.add_argument(
        "--baselines",
        default="all",
        help="which to fit beside it, between commas: all, none, or their names, such as 'majority,k-mers'",
    )
    parser.add_argument("--batch-size", type=int, help="windows or clips a forward pass; default: as trained")
    parser.add_argument("--device", default="auto", help="a Lightning accelerator: auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of the baselines and the bootstrap (default: 0)")
    evaluate_tagging.add_arguments(parser)
    evaluate_asr.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    args.checkpoint = checkpoint_or_default(args.checkpoint, _network_for(args.data))
    loaded = read_checkpoint(args.checkpoint)
    if evaluate_asr.is_asr(loaded):
        evaluate_asr.run(loaded, args)
        return
    if is_synthetic(loaded, args.checkpoint):
        evaluate_synthetic(loaded, args, build_datamodule(loaded, args.data, None))
        return
    if args.lengths and issubclass(task_class(loaded, args.checkpoint), DNANetwork):
        from seqssm.commands.evaluate_dna import evaluate_lengths

        evaluate_lengths(loaded, args, partial(build_datamodule, loaded, args.data))
        return
    datamodule = build_datamodule(loaded, args.data, args.batch_size)
    if args.lengths or args.needle:
        evaluate_tagging.probe(loaded, args, datamodule)
        return
    evaluate(
        args.checkpoint,
        datamodule=datamodule,
        folder=args.output,
        split=args.split,
        baselines=args.baselines,
        accelerator=args.device,
        seed=args.seed,
        command=args.command_line,
        epochs=args.epochs,
    )


def _network_for(data: str | None) -> type[Network]:
    """What kind of network the data of ``--data`` are for, to choose the shipped one."""
    if data is None or evaluate_asr.is_recordings(data):
        return Network
    kind = str(config_section(data, "data", "--data").get("class_path", "")).rpartition(".")[2]
    kinds: dict[str, type[Network]] = {
        "DNADataModule": DNANetwork,
        "SimulatedGenomes": DNANetwork,
        "AudioTaggingDataModule": TaggingNetwork,
        "SpeechDataModule": ASRNetwork,
    }
    return kinds.get(kind, Network)


def build_datamodule(
    loaded: Loaded, config: str | None, batch_size: int | None, **changes: Any
) -> pl.LightningDataModule:
    """The DataModule a checkpoint names, or the one of a config's ``data`` section, with some arguments changed.

    Raises:
        UserError: there is none, or it is not of the checkpoint's kind.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    import seqssm.data.dna.unlabelled  # makes the short class names known to the parser
    import seqssm.data.synthetic  # noqa: F401
    from seqssm.data.audio.datamodule import AudioTaggingDataModule
    from seqssm.data.dna.datamodule import DNADataModule
    from seqssm.data.synthetic_tasks import SyntheticDataModule

    if config is not None:
        section = config_section(config, "data", "--data")
    elif loaded.data:
        section = loaded.data
    else:
        raise UserError("the checkpoint does not say what data it was trained with; give --data CONFIG.yaml")
    if batch_size is not None:
        changes["batch_size"] = batch_size
    if "features" in loaded.description["init_args"]:
        # Statistics included: what the model was trained on, not what other data would give.
        changes["features"] = loaded.description["init_args"]["features"]
    section = {**section, "init_args": {**section.get("init_args", {}), **changes}}
    task = task_class(loaded, str(loaded.description["task"]))
    kind: type[pl.LightningDataModule] = SyntheticDataModule
    if issubclass(task, DNANetwork | DNAPretraining):
        kind = DNADataModule
    elif issubclass(task, AudioTagging):
        kind = AudioTaggingDataModule
    if "class_path" not in section:
        raise UserError(f"--data {config}: its `data` section has no class_path, such as {kind.__name__}")
    own = [cls.__name__ for cls in _with_subclasses(kind)]
    name = str(section["class_path"])
    if "." not in name and name not in own:
        raise UserError(f"--data {config} is for {name}; the checkpoint's {task.__name__} takes {', '.join(own)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": section})).data
    except ArgumentError as error:
        raise UserError(f"the data section does not fit: {' '.join(str(error.message).split())}") from error


def _with_subclasses(cls: type) -> list[type]:
    return [cls, *(found for one in cls.__subclasses__() for found in _with_subclasses(one))]


def evaluate(
    checkpoint: str,
    *,
    datamodule: Any,
    folder: Path | None = None,
    split: str = "test",
    baselines: str = "all",
    accelerator: str = "auto",
    seed: int = 0,
    command: str = "",
    epochs: int | None = None,
) -> dict[str, Any]:
    """Predict a split, fit the baselines on the same training examples, print the table and write the report.

    Args:
        checkpoint: a Lightning ``.ckpt`` or a folder in hub format, of any task.
        datamodule: gives the examples of every split.
        folder: where ``metrics.json``, ``evaluation.md`` and the figures go; None writes nothing.
        split: ``test`` or ``val``.
        baselines: which to fit and score: ``all``, ``none``, or names between commas; none stand beside a
            recogniser.
        accelerator: as Lightning names it.
        seed: of the baselines and the bootstrap.
        command: what the user typed, for the report.
        epochs: of an audio tagger's CNN baseline; None for as many as the model's.
    """
    loaded = read_checkpoint(checkpoint)
    arguments: dict[str, Any] = {
        "datamodule": datamodule,
        "folder": folder,
        "split": split,
        "seed": seed,
        "command": command,
    }
    if evaluate_asr.is_asr(loaded):
        return evaluate_asr.evaluate_asr(checkpoint, loaded, **arguments, device=accelerator)
    arguments |= {"baselines": baselines, "accelerator": accelerator}
    if issubclass(task_class(loaded, checkpoint), AudioTagging):
        return evaluate_tagging.evaluate_tagging(loaded, checkpoint, **arguments, epochs=epochs)
    if issubclass(task_class(loaded, checkpoint), DNAPretraining):
        from seqssm.commands.evaluate_pretraining import evaluate_pretraining

        return evaluate_pretraining(loaded, checkpoint, **arguments)
    from seqssm.commands.evaluate_dna import evaluate_dna

    return evaluate_dna(loaded, checkpoint, **arguments)
