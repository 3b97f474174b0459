"""Score an audio tagger on held-out clips; `seqssm evaluate` calls it for such a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seqssm.data.audio import AudioTaggingDataModule
from seqssm.errors import UserError
from seqssm.tasks.base import Loaded, build_task, weights_of
from seqssm.tasks.tagging import AudioTagging

DEFAULT_EPOCHS = 30


def evaluate_tagging(
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
    epochs: int | None = None,
) -> dict[str, Any]:
    """Predict a split, fit the baselines on the same clips, print the table and write the report.

    Arguments are those of :func:`seqssm.commands.evaluate.evaluate`; ``epochs`` are the CNN baseline's, by default as
    many as the model was trained for.
    """
    from seqssm.tasks import report as reports
    from seqssm.tasks.audio_baselines import Clips, audio_baselines
    from seqssm.tasks.baselines import run_baselines, select_baselines
    from seqssm.tasks.plots import precision_recall_png
    from seqssm.tasks.tagging_metrics import best_thresholds

    task = build_task(loaded, AudioTagging, checkpoint)
    datamodule.prepare_data()
    _check(task, datamodule, checkpoint)
    datamodule.setup("fit")
    classes = len(task.labels)
    train, validation = (Clips(datamodule, name, classes) for name in ("train", "val"))
    held_out = validation if split == "val" else Clips(datamodule, split, classes)
    device = _device(accelerator)
    probabilities = _predict(task, held_out, device)

    fitted = {}
    if baselines != "none":
        epochs = epochs or loaded.description.get("epochs") or DEFAULT_EPOCHS
        chosen = select_baselines(audio_baselines(classes, epochs=epochs, seed=seed, device=device), baselines)
        fitted = run_baselines(chosen, train, validation, held_out)
    thresholds = {reports.MODEL: np.array(task.thresholds)}
    for name, one in fitted.items() if task.multi_label else ():
        tuned = best_thresholds(torch.from_numpy(one.validation), torch.from_numpy(validation.labels))
        thresholds[name] = np.array(tuned)
    tables = {reports.MODEL: probabilities, **{name: one.probabilities for name, one in fitted.items()}}
    clips = datamodule.clips(split)
    report = reports.evaluate(
        probabilities,
        held_out.labels,
        {"source": np.array([str(clip.group or clip.path) for clip in clips])},
        task.labels,
        baselines={name: table for name, table in tables.items() if name != reports.MODEL},
        baseline_settings={name: one.settings for name, one in fitted.items()},
        data={
            "path": str(datamodule.settings["path"]),
            "split": split,
            "train clips": len(train),
            "parameters": sum(p.numel() for p in task.parameters()),
            **({"mixed": "every clip is a mixture of clips"} if datamodule.settings.get("mix_clips") else {}),
        },
        checkpoint=checkpoint,
        command=command,
        seed=seed,
        ranked=True,
        thresholds=thresholds,
        item="clip",
    )
    report |= weights_of(loaded)
    print(reports.to_markdown(report))
    if folder is not None:
        targets = held_out.labels if task.multi_label else np.eye(classes, dtype=np.int64)[held_out.labels]
        drawn = {name: table for name, table in tables.items() if name != "majority"}
        figures = {"precision_recall.png": precision_recall_png(drawn, targets, task.labels)}
        print("wrote", ", ".join(str(path) for path in reports.save(report, folder, figures)))
    return report


def _check(task: AudioTagging, datamodule: Any, checkpoint: str) -> None:
    if not isinstance(datamodule, AudioTaggingDataModule):
        raise UserError(f"{checkpoint} is an audio tagger: --data must name an AudioTaggingDataModule")
    if list(datamodule.labels) != task.labels:
        raise UserError(
            f"{checkpoint} knows the classes {', '.join(task.labels)}; the data has {', '.join(datamodule.labels)}"
        )
    if datamodule.multi_label != task.multi_label:
        kinds = {True: "any number of labels a clip", False: "one label a clip"}
        raise UserError(f"{checkpoint} gives {kinds[task.multi_label]}; the data has {kinds[datamodule.multi_label]}")


@torch.inference_mode()
def _predict(task: AudioTagging, clips: Any, device: str) -> NDArray[np.float64]:
    from seqssm.data.progress import progress_bar

    task.to(device)
    outputs = []
    with progress_bar("tagging", len(clips)) as advance:
        for batch in clips.batches():
            logits = task(batch.features.to(device), batch.lengths.to(device))
            outputs.append(task.probabilities(logits.double()).cpu())
            advance(len(batch.lengths))
    return torch.cat(outputs).numpy()


def _device(accelerator: str) -> str:
    gpu = accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
    return "cuda" if gpu else "cpu"


def probe(loaded: Loaded, args: argparse.Namespace, datamodule: Any) -> None:
    """``--lengths`` and ``--needle`` of ``seqssm evaluate``: print a Markdown table each."""
    from seqssm.tasks.tag_robustness import run_lengths, run_needle

    task = build_task(loaded, AudioTagging, args.checkpoint).to(_device(args.device))
    _check(task, datamodule, args.checkpoint)
    if datamodule.settings.get("mix_clips"):
        raise UserError("--lengths and --needle make scenes of single clips: give --data without mix_clips")
    clips = datamodule.clips(args.split)
    if args.lengths:
        try:
            lengths = [float(part) for part in args.lengths.split(",")]
        except ValueError as error:
            raise UserError(f"--lengths {args.lengths}: give seconds between commas, such as 1,5,30") from error
        if min(lengths) < 0.1:
            raise UserError("--lengths: a tenth of a second at least")
        print(run_lengths(task, clips, lengths, args.seed))
    if args.needle:
        if args.needle not in task.labels:
            raise UserError(f"--needle {args.needle}: the classes are {', '.join(task.labels)}")
        background = args.background.split(",") if args.background else []
        unknown = set(background) - set(task.labels)
        if unknown:
            raise UserError(f"--background {', '.join(sorted(unknown))}: the classes are {', '.join(task.labels)}")
        print(run_needle(task, clips, args.needle, background, args.needle_s, args.needle_count, args.seed))
