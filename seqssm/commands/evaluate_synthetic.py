"""The accuracy of a synthetic task at each length; `seqssm evaluate` calls it for such a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from seqssm.data.progress import progress_bar
from seqssm.data.synthetic_tasks import Needle, SyntheticDataModule
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.base import Loaded, build_task, task_class
from seqssm.tasks.baselines import Windows, default_baselines, run_baselines, select_baselines
from seqssm.tasks.synthetic import (
    AccuracyByLength,
    NeedleSearch,
    SequenceRecall,
    accuracy_table,
    wilson_interval,
)

BASELINE_TOKENS = 2**26
"""Most tokens that baselines are fitted on at a length; at the longest, fewer windows are as many tokens."""


def is_synthetic(loaded: Loaded, checkpoint: str) -> bool:
    """Whether the checkpoint holds a task of :mod:`seqssm.tasks.synthetic`."""
    return issubclass(task_class(loaded, checkpoint), SequenceRecall | NeedleSearch)


def parse_lengths(text: str) -> list[int]:
    """Lengths between commas, such as ``256,1024,2^20``.

    Raises:
        UserError: one of them is no whole number.
    """
    try:
        return [int(base) ** int(power or 1) for base, _, power in (part.partition("^") for part in text.split(","))]
    except ValueError as error:
        raise UserError(f"--lengths {text}: give tokens between commas, such as 256,1024,2^20") from error


def evaluate_synthetic(loaded: Loaded, args: argparse.Namespace, datamodule: Any) -> None:
    """Print, and write to ``--output``, a table of accuracies with intervals; beside the needle task, baselines'.

    Args:
        loaded: the checkpoint.
        args: of ``seqssm evaluate``: checkpoint, lengths, split, baselines, device, seed, output, command_line.
        datamodule: a :class:`SyntheticDataModule`.
    """
    task = build_task(loaded, task_class(loaded, args.checkpoint), args.checkpoint)
    if not isinstance(datamodule, SyntheticDataModule):
        raise UserError(f"{args.checkpoint} holds a synthetic task; give --data with one of the synthetic configs")
    if args.lengths:
        datamodule.test_lengths = parse_lengths(args.lengths)
        datamodule.check()
    device = pl.Trainer(
        accelerator=args.device, devices=1, logger=False, enable_checkpointing=False
    ).strategy.root_device
    task = task.to(device)
    metric = AccuracyByLength(datamodule.test_lengths).to(device)
    sequences = datamodule.test_sequences * len(datamodule.test_lengths)
    with torch.inference_mode(), progress_bar("sequences", sequences) as advance:
        for batch in datamodule.test_dataloader():
            moved = type(batch)(*(part.to(device) for part in batch))
            metric.update(batch.tokens.shape[1], task.right(moved))  # type: ignore[operator]
            advance(len(batch.tokens))
    rows = metric.compute()
    baselines = {}
    if isinstance(datamodule, Needle) and args.baselines != "none":
        baselines = _baselines(
            datamodule, "majority,k-mers" if args.baselines == "all" else args.baselines, str(device)
        )
    print(accuracy_table(rows, baselines))
    if args.output is not None:
        _write(args, rows, baselines)


def _baselines(data: Needle, names: str, device: str) -> dict[str, dict[int, float]]:
    """Accuracy by length of each baseline, fitted at that length on windows of its own."""
    columns: dict[str, dict[int, float]] = {}
    for length in data.test_lengths:
        chosen = select_baselines(default_baselines(2, seed=data.seed, device=device), names)
        count = min(1024, max(64, BASELINE_TOKENS // length))
        parts = []
        for split, rows in ((0, count), (1, max(32, count // 4)), (2, data.test_sequences)):
            batch = data.batch(np.random.default_rng([data.seed, 7, split, length]), rows, length)
            parts.append(Windows(batch.tokens.numpy(), batch.labels.numpy()))
        for name, fitted in run_baselines(chosen, *parts).items():
            right = fitted.probabilities.argmax(1) == parts[2].labels
            columns.setdefault(name, {})[length] = float(right.mean())
    return columns


def _write(args: argparse.Namespace, rows: list[tuple[int, int, int]], baselines: dict[str, dict[int, float]]) -> None:
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}; choose another --output") from error
    report = {
        "checkpoint": args.checkpoint,
        "command": args.command_line,
        "accuracy": [
            {"length": n, "right": r, "answers": t, "accuracy": r / t, "interval": wilson_interval(r, t)}
            for n, r, t in rows
        ],
        "baselines": baselines,
    }
    with atomic_write(folder / "lengths.json") as file:
        json.dump(report, file, indent=2)
    with atomic_write(folder / "lengths.md") as file:
        file.write(f"`{args.command_line}`\n\n{accuracy_table(rows, baselines)}\n")
    print("wrote", ", ".join(str(folder / name) for name in ("lengths.json", "lengths.md")))
