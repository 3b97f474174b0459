"""Fit the scale and the bias of a DNA classifier's logits on its validation windows, and write it to a new folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from seqssm.commands.arguments import DATA_HELP, add_accelerator_argument, positive
from seqssm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a Lightning .ckpt, a folder in hub format, or a shipped name")
    parser.add_argument("folder", type=Path, help="to write, in hub format")
    parser.add_argument("--data", help=DATA_HELP)
    parser.add_argument(
        "--window-bp",
        type=positive,
        help="calibrate for windows of so many bases, of which longer ones hold more evidence; default: as trained",
    )
    parser.add_argument("--batch-size", type=positive, help="windows a forward pass; default: as trained")
    add_accelerator_argument(parser)


def run(args: argparse.Namespace) -> None:
    import lightning.pytorch as pl
    import torch
    import torch.nn.functional as F

    from seqssm.commands.evaluate import build_datamodule
    from seqssm.tasks.base import Loaded, build_task, read_checkpoint
    from seqssm.tasks.calibration import fit_scaling, rescale
    from seqssm.tasks.dna import DNAClassification
    from seqssm.tasks.exporting import export_loaded, refuse_to_replace

    refuse_to_replace(args.folder, args.checkpoint)
    loaded = read_checkpoint(args.checkpoint)
    task = build_task(loaded, DNAClassification, args.checkpoint)
    changes: dict[str, Any] = {"eval_windows": None}
    if args.window_bp is not None:
        changes |= {"window_bp": args.window_bp, "stride_bp": None, "min_window_bp": None, "warmup_from_bp": None}
    datamodule: Any = build_datamodule(loaded, args.data, args.batch_size, **changes)
    datamodule.prepare_data()
    datamodule.setup("fit")
    if list(datamodule.labels) != task.labels:
        raise UserError(
            f"{args.checkpoint} knows the classes {', '.join(task.labels)}; the data has {', '.join(datamodule.labels)}"
        )
    labels = torch.from_numpy(datamodule.grid("val").windows.label)
    trainer = pl.Trainer(accelerator=args.device, devices=1, logger=False, enable_checkpointing=False)
    outputs: Any = trainer.predict(task, dataloaders=datamodule.val_dataloader())
    logits = torch.cat(outputs).cpu().double().clamp_min(1e-30).log()
    counts = torch.bincount(labels, minlength=len(task.labels)).double()
    balance = bool(datamodule.settings["balance"] or task.class_weights == "balanced")
    weights = 1 / counts[labels] if balance else torch.ones(len(labels), dtype=torch.float64)

    def loss(logits: torch.Tensor) -> float:
        nll = F.cross_entropy(logits, labels, reduction="none")
        return float((nll * weights).sum() / weights.sum())

    scale, bias = fit_scaling(logits, labels, weights)
    if bool(((scale * logits + bias).argmax(1) == labels).all()):
        raise UserError(
            f"all of the {len(labels)} validation windows come out right, so that the log loss falls for ever as the "
            "scale grows: hold out more windows, or ones that are harder"
        )
    rescale(task.cpu(), scale, bias)
    print(
        f"log loss on {len(labels)} validation windows {loss(logits):.4f} -> {loss(scale * logits + bias):.4f}: logits "
        f"times {scale:.3f}, and "
        + ", ".join(f"{name} {value:+.3f}" for name, value in zip(task.labels, bias.tolist(), strict=True))
    )
    data = loaded.data
    if args.window_bp is not None and data:
        data = {**data, "init_args": {**data["init_args"], "window_bp": args.window_bp}}
    folder = export_loaded(Loaded(loaded.description, task.state_dict(), data), args.folder, args.checkpoint)
    print(f"wrote {folder}")
