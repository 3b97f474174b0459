"""Score a checkpoint on held-out data, with bootstrap intervals, beside baselines fitted on the same examples."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqssm.cli import config_section, names_data
from seqssm.commands.arguments import DATA_HELP, add_accelerator_argument, positive, seed
from seqssm.commands.parsing import one_line
from seqssm.commands.transcribe import add_decoding_arguments, add_stream_arguments
from seqssm.errors import UserError
from seqssm.files import make_folder
from seqssm.tasks.asr_network import ASRNetwork
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.network import Loaded, Network, add_checkpoint_argument, checkpoint_or_default
from seqssm.tasks.tagging_network import TaggingNetwork

if TYPE_CHECKING:
    import lightning.pytorch as pl

# What trains imports Lightning, which takes longer than to print the help: imported where it is called.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument("--data", help=DATA_HELP)
    parser.add_argument("--split", choices=("test", "val"), default="test", help="default: %(default)s")
    parser.add_argument("--output", "-o", type=Path, help="folder for metrics.json, evaluation.md and figures")
    parser.add_argument(
        "--baselines",
        default="all",
        help="which to fit beside it, between commas: all, none, or their names, such as 'majority,k-mers'",
    )
    parser.add_argument("--batch-size", type=positive, help="windows or clips a forward pass; default: as trained")
    add_accelerator_argument(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the baselines and the bootstrap (default: 0)")
    _add_tagger_arguments(parser)
    _add_recogniser_arguments(parser)


def _add_tagger_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that a tagger takes beside the ones of every task."""
    group = parser.add_argument_group("audio taggers")
    group.add_argument("--epochs", type=positive, help="of the CNN baseline; default: as many as the model's")
    probes = parser.add_argument_group("audio taggers, in place of the evaluation")
    probes.add_argument(
        "--lengths",
        help="scores against the length: of what is heard, such as 1,5,30 s; of DNA, 2^13,2^20 bases; of a synthetic "
        "task, 2^8,2^20 tokens",
    )
    probes.add_argument("--needle", metavar="CLASS", help="hide a clip of this class in an hour of others, and find it")
    probes.add_argument("--needle-s", type=float, default=3600.0, help="seconds of the whole (default: 3600)")
    probes.add_argument(
        "--needle-count", type=positive, default=1, help="clips to hide, one after another (default: 1)"
    )
    probes.add_argument("--background", help="classes of the others, between commas; default: all others")


def _add_recogniser_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that a recogniser takes beside the ones of every task."""
    add_stream_arguments(parser)
    add_decoding_arguments(parser)
    group = parser.add_argument_group("speech recognisers")
    group.add_argument("--packet-ms", type=float, default=100.0, help="sound is sent in such packets (default: 100)")
    group.add_argument(
        "--packets", help="check that packets of so many samples, such as 1,160,160000, give the same bytes"
    )
    group.add_argument("--aligner", help="a checkpoint to align words by; default: the one that is scored, offline")
    group.add_argument("--stream-minutes", type=float, help="also score one stream of so many minutes of the split")
    group.add_argument("--stretch-minutes", type=float, default=10.0, help="of it, to score apart (default: 10)")
    group.add_argument(
        "--gap-s", default="0.5,2", help="least and greatest gap between its utterances (default: 0.5,2)"
    )
    group.add_argument(
        "--sessions", type=positive, help="also serve so many live clients at once, and report their latency"
    )
    group.add_argument("--sessions-s", type=float, default=30.0, help="that each of them speaks (default: 30)")


def run(args: argparse.Namespace) -> None:
    from seqssm.commands import evaluate_asr, evaluate_tagging
    from seqssm.commands.evaluate_synthetic import evaluate_synthetic, is_synthetic
    from seqssm.tasks.base import read_checkpoint, task_class

    if args.output is not None:
        make_folder(args.output)  # what it is about may take hours
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
    if data is None or names_data(data):
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
    loaded: Loaded, data: str | None, batch_size: int | None, **changes: Any
) -> pl.LightningDataModule:
    """The DataModule a checkpoint names, or the one of a config's ``data`` section, with some arguments changed.

    Args:
        loaded: the checkpoint.
        data: a config; or a folder or table, which stands in the place of the checkpoint's own ``path``.
        batch_size: examples a forward pass; None leaves it as it is.
        **changes: arguments of the DataModule.

    Raises:
        UserError: there is none, or it is not of the checkpoint's kind.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    import seqssm.data.dna.unlabelled  # makes the short class names known to the parser
    import seqssm.data.synthetic  # noqa: F401
    from seqssm.data.audio.datamodule import AudioTaggingDataModule
    from seqssm.data.dna.datamodule import DNADataModule
    from seqssm.data.synthetic_tasks import SyntheticDataModule
    from seqssm.tasks.base import task_class
    from seqssm.tasks.pretraining import DNAPretraining
    from seqssm.tasks.synthetic import NeedleSearch
    from seqssm.tasks.tagging import AudioTagging

    if batch_size is not None:
        changes["batch_size"] = batch_size
    if "features" in loaded.description["init_args"]:
        # Statistics included: what the model was trained on, not what other data would give.
        changes["features"] = loaded.description["init_args"]["features"]
    task = task_class(loaded, str(loaded.description["task"]))
    kind: type[pl.LightningDataModule] = SyntheticDataModule
    if issubclass(task, DNANetwork | DNAPretraining) and not issubclass(task, NeedleSearch):
        kind = DNADataModule
    elif issubclass(task, AudioTagging):
        kind = AudioTaggingDataModule
    section = _data_section(loaded, data, kind.__name__)
    section = {**section, "init_args": {**section.get("init_args", {}), **changes}}
    if "class_path" not in section:
        raise UserError(f"--data {data}: its `data` section has no class_path, such as {kind.__name__}")
    own = [cls.__name__ for cls in _with_subclasses(kind)]
    name = str(section["class_path"])
    if "." not in name and name not in own:
        raise UserError(f"--data {data} is for {name}; the checkpoint's {task.__name__} takes {', '.join(own)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": section})).data
    except ArgumentError as error:
        raise UserError(f"the data section does not fit: {one_line(str(error.message))}") from error


def _data_section(loaded: Loaded, data: str | None, kind: str) -> dict[str, Any]:
    """Class path and arguments of the data to score on; see :func:`build_datamodule`."""
    if data is None:
        if not loaded.data:
            raise UserError("the checkpoint does not say what data it was trained with; give --data CONFIG.yaml")
        return loaded.data
    if not names_data(data):
        return config_section(data, "data", "--data")
    same_kind = str(loaded.data.get("class_path", "")).rpartition(".")[2] == kind
    return {"class_path": kind, "init_args": {**(loaded.data["init_args"] if same_kind else {}), "path": data}}


def _with_subclasses(cls: type[Any]) -> list[type[Any]]:
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
    from seqssm.commands import evaluate_asr, evaluate_tagging
    from seqssm.tasks.base import read_checkpoint, task_class
    from seqssm.tasks.pretraining import DNAPretraining
    from seqssm.tasks.tagging import AudioTagging

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
