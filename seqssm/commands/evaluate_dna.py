"""Score a DNA classifier on held-out windows; `seqssm evaluate` calls it for such a checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from seqssm.commands.evaluate_synthetic import parse_lengths
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.base import Loaded, build_task, weights_of
from seqssm.tasks.dna import DNAClassification

BATCH_BP = 2**19
"""Bases a forward pass of a curve over lengths."""


def evaluate_dna(
    loaded: Loaded,
    checkpoint: str,
    *,
    datamodule: Any,
    folder: Path | None,
    split: str,
    baselines: str,
    accelerator: str,
    seed: int,
    command: str,
) -> dict[str, Any]:
    """Predict a split, fit the baselines on the same training windows, print the table and write the report.

    Arguments are those of :func:`seqssm.commands.evaluate.evaluate`.
    """
    from seqssm.tasks import report as reports

    task = build_task(loaded, DNAClassification, checkpoint)
    report = _score(task, checkpoint, datamodule, split, baselines, accelerator, seed, command)
    report |= weights_of(loaded)
    print(reports.to_markdown(report))
    if folder is not None:
        print("wrote", ", ".join(str(path) for path in reports.save(report, folder)))
    return report


def evaluate_lengths(loaded: Loaded, args: argparse.Namespace, build: Callable[..., Any]) -> dict[str, Any]:
    """Score one classifier at several window lengths, the baselines fitted anew at each: a table and a figure.

    Every length has its own grid of windows over the same test regions, without overlap.

    Args:
        loaded: the checkpoint.
        args: of ``seqssm evaluate``: checkpoint, lengths, split, baselines, device, seed, output, command_line.
        build: makes the DataModule, given arguments to change.

    Returns:
        What ``lengths.json`` holds: ``lengths``, a report of ``seqssm evaluate`` by length in bases, and ``command``.
    """
    from seqssm.tasks.plots import length_curve_png

    task = build_task(loaded, DNAClassification, args.checkpoint)
    task.check_unaligned()
    reports = {}
    for length in parse_lengths(args.lengths):
        print(f"{length:,} bp")
        changes = {"window_bp": length, "stride_bp": None, "min_window_bp": None, "warmup_from_bp": None}
        datamodule = build(batch_size=max(1, min(64, BATCH_BP // length)), eval_batch_size=None, **changes)
        reports[length] = _score(
            task, args.checkpoint, datamodule, args.split, args.baselines, args.device, args.seed, args.command_line
        )
    result = {"lengths": reports, "checkpoint": args.checkpoint, "command": args.command_line, **weights_of(loaded)}
    table = length_table(reports)
    print(table)
    if args.output is not None:
        folder = Path(args.output)
        files = {
            "lengths.json": (json.dumps(result, indent=2, allow_nan=False) + "\n").encode(),
            "lengths.md": f"`{args.command_line}`\n\n{table}\n".encode(),
            "lengths.png": length_curve_png(reports),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror}; choose another --output") from error
        for name, content in files.items():
            with atomic_write(folder / name, "wb") as file:
                file.write(content)
        print("wrote", ", ".join(str(folder / name) for name in files))
    return result


def length_table(reports: dict[int, dict[str, Any]], measure: str = "balanced_accuracy") -> str:
    """A Markdown table of one measure by length: the model, the baselines, and the model minus each."""
    baselines = list(next(iter(reports.values()))["baselines"])

    def cell(one: dict[str, Any], form: str) -> str:
        return f"{one['value']:{form}} [{one['low']:{form}}, {one['high']:{form}}]"

    header = ["bases", "windows", "model", *baselines, *(f"model minus {name}" for name in baselines)]
    lines = [header, ["--:"] * len(header)]
    for length, report in reports.items():
        values = [report["metrics"][measure], *(report["baselines"][name][measure] for name in baselines)]
        differences = [report["differences"][name][measure] for name in baselines]
        cells = [*(cell(one, ".3f") for one in values), *(cell(one, "+.3f") for one in differences)]
        lines.append([f"{length:,}", str(values[0]["n"]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _score(
    task: DNAClassification,
    checkpoint: str,
    datamodule: Any,
    split: str,
    baselines: str,
    accelerator: str,
    seed: int,
    command: str,
) -> dict[str, Any]:
    """The report on a split, of the model and of baselines fitted on the windows it was trained on."""
    from seqssm.tasks import report as reports
    from seqssm.tasks.baselines import Windows, default_baselines, run_baselines, select_baselines

    datamodule.prepare_data()
    datamodule.setup("fit")
    if list(datamodule.labels) != task.labels:
        raise UserError(
            f"{checkpoint} knows the classes {', '.join(task.labels)}; the data has {', '.join(datamodule.labels)}"
        )
    dataset = datamodule.grid(split)
    trainer = pl.Trainer(accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False)
    chosen = []
    if baselines != "none":
        settings = datamodule.settings
        candidates = default_baselines(
            len(task.labels),
            balance=bool(settings["balance"] or task.class_weights == "balanced"),
            reverse_complement=settings["rc_probability"] > 0,
            seed=seed,
            device=str(trainer.strategy.root_device),
        )
        chosen = select_baselines(candidates, baselines)
    loader = datamodule.test_dataloader() if split == "test" else datamodule.val_dataloader()
    outputs: Any = trainer.predict(task, dataloaders=loader)
    probabilities = torch.cat(outputs).cpu().double().numpy()

    fitted = {}
    if chosen:
        windows = {name: Windows.read(datamodule.grid(name)) for name in {"train", "val", split}}
        fitted = run_baselines(chosen, windows["train"], windows["val"], windows[split])
    return reports.evaluate(
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
