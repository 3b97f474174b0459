"""Score a checkpoint on held-out data, with bootstrap intervals, beside baselines fitted on the same windows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from seqssm.commands import evaluate_asr
from seqssm.errors import UserError
from seqssm.tasks.base import Loaded, build_task, read_checkpoint
from seqssm.tasks.dna import DNAClassification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a Lightning .ckpt or a folder in hub format")
    parser.add_argument(
        "--data", help="a YAML config whose `data` section to use; default: the data the checkpoint was trained with"
    )
    parser.add_argument("--split", choices=("test", "val"), default="test", help="default: %(default)s")
    parser.add_argument("--output", "-o", type=Path, help="folder for metrics.json, evaluation.md and confusion.png")
    parser.add_argument("--no-baselines", action="store_true", help="leave the baselines out (they are fitted anew)")
    parser.add_argument("--batch-size", type=int, help="windows a forward pass; default: as trained")
    parser.add_argument("--device", default="auto", help="a Lightning accelerator: auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of the baselines and the bootstrap (default: 0)")
    evaluate_asr.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    loaded = read_checkpoint(args.checkpoint)
    if evaluate_asr.is_asr(loaded):
        evaluate_asr.run(loaded, args)
        return
    evaluate(
        args.checkpoint,
        datamodule=build_datamodule(loaded, args.data, args.batch_size),
        folder=args.output,
        split=args.split,
        baselines=not args.no_baselines,
        accelerator=args.device,
        seed=args.seed,
        command=args.command_line,
    )


def build_datamodule(loaded: Loaded, config: str | None, batch_size: int | None) -> pl.LightningDataModule:
    """The DataModule a checkpoint names, or the one of a config's ``data`` section."""
    from jsonargparse import ArgumentError, ArgumentParser

    import seqssm.data.synthetic  # noqa: F401 - makes the short class names known to the parser
    from seqssm.cli import find_config

    if config is not None:
        import yaml

        section = (yaml.safe_load(Path(find_config(config)).read_text()) or {}).get("data")
        if not section:
            raise UserError(f"--data {config} has no `data` section; name a config that seqssm fit could use")
    elif loaded.data:
        section = loaded.data
    else:
        raise UserError("the checkpoint does not say what data it was trained with; give --data CONFIG.yaml")
    if batch_size is not None:
        section = {**section, "init_args": {**section.get("init_args", {}), "batch_size": batch_size}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": section})).data
    except ArgumentError as error:
        raise UserError(f"the data section does not fit: {' '.join(str(error.message).split())}") from error


def evaluate(
    checkpoint: str,
    *,
    datamodule: Any,
    folder: Path | None = None,
    split: str = "test",
    baselines: bool = True,
    accelerator: str = "auto",
    seed: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Predict a split, fit the baselines on the same training windows, print the table and write the report.

    Args:
        checkpoint: a Lightning ``.ckpt`` or a folder in hub format, of a :class:`DNAClassification`.
        datamodule: gives the windows of every split.
        folder: where ``metrics.json``, ``evaluation.md`` and ``confusion.png`` go; None writes nothing.
        split: ``test`` or ``val``.
        baselines: whether to fit and score them.
        accelerator: as Lightning names it.
        seed: of the baselines and the bootstrap.
        command: what the user typed, for the report.
    """
    from seqssm.tasks import report as reports
    from seqssm.tasks.baselines import Windows, default_baselines, run_baselines

    loaded = read_checkpoint(checkpoint)
    if evaluate_asr.is_asr(loaded):
        return evaluate_asr.evaluate_asr(
            checkpoint,
            loaded,
            datamodule=datamodule,
            folder=folder,
            split=split,
            device=accelerator,
            seed=seed,
            command=command,
        )
    task = build_task(loaded, DNAClassification, checkpoint)
    datamodule.prepare_data()
    datamodule.setup("fit")
    if list(datamodule.labels) != task.labels:
        raise UserError(
            f"{checkpoint} knows the classes {', '.join(task.labels)}; the data has {', '.join(datamodule.labels)}"
        )
    dataset = datamodule.grid(split)
    trainer = pl.Trainer(accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False)
    loader = datamodule.test_dataloader() if split == "test" else datamodule.val_dataloader()
    outputs: Any = trainer.predict(task, dataloaders=loader)
    probabilities = torch.cat(outputs).cpu().double().numpy()

    fitted = {}
    if baselines:
        settings = datamodule.settings
        chosen = default_baselines(
            len(task.labels),
            balance=bool(settings["balance"] or task.class_weights == "balanced"),
            reverse_complement=settings["rc_probability"] > 0,
            seed=seed,
            device=str(trainer.strategy.root_device),
        )
        windows = {name: Windows.read(datamodule.grid(name)) for name in {"train", "val", split}}
        fitted = run_baselines(chosen, windows["train"], windows["val"], windows[split])
    report = reports.evaluate(
        probabilities,
        dataset.windows.label,
        {"group": dataset.windows.group, "record": dataset.windows.record},
        task.labels,
        baselines={name: one.probabilities for name, one in fitted.items()},
        baseline_settings={name: one.settings for name, one in fitted.items()},
        data={
            "path": str(datamodule.settings["path"]),
            "split": split,
            "window_bp": datamodule.settings["window_bp"] or "whole sequences",
            "train windows": sum(datamodule.report.counts["train"].values()),
        },
        checkpoint=checkpoint,
        command=command,
        seed=seed,
    )
    text = reports.to_markdown(report)
    print(text)
    if folder is not None:
        print("wrote", ", ".join(str(path) for path in reports.save(report, folder)))
    return report
