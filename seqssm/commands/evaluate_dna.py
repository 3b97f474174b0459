"""Score a DNA classifier on held-out windows; `seqssm evaluate` calls it for such a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from seqssm.errors import UserError
from seqssm.tasks.base import Loaded, build_task, weights_of
from seqssm.tasks.dna import DNAClassification


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
    from seqssm.tasks.baselines import Windows, default_baselines, run_baselines, select_baselines

    task = build_task(loaded, DNAClassification, checkpoint)
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
    report |= weights_of(loaded)
    text = reports.to_markdown(report)
    print(text)
    if folder is not None:
        print("wrote", ", ".join(str(path) for path in reports.save(report, folder)))
    return report
