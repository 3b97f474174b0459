"""Predict the peak memory, speed and longest length of a training run, from a few short steps on this device."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqssm.commands.arguments import positive
from seqssm.errors import UserError

TOLERANCE = 0.15
"""By how much --check lets the prediction of the memory be off."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", "--config", action="append", required=True, help="as for `seqssm fit`; repeatable, later wins"
    )
    parser.add_argument(
        "--length", type=positive, help="bases or frames of a sequence to plan for; default: the config's window"
    )
    parser.add_argument(
        "--measure",
        type=positive,
        nargs="+",
        metavar="LENGTH",
        help="lengths to measure at; default: an eighth, a quarter and three eighths of --length",
    )
    parser.add_argument("--check", action="store_true", help="also run the length itself: predicted beside real")
    parser.add_argument(
        "overrides", nargs="*", help="settings of the config, after --: -- --model.backbone.d_model 256"
    )


def run(args: argparse.Namespace) -> int:
    import math
    import warnings

    from rich.console import Console
    from rich.table import Table

    from seqssm.commands.parsing import said_clearly
    from seqssm.commands.trainer import TaskCLI
    from seqssm.longcontext.planning import make_plan, measure

    # The arguments are handed over explicitly, whatever sys.argv holds.
    warnings.filterwarnings("ignore", message="LightningCLI.s args parameter.*")
    with said_clearly():
        cli = TaskCLI(_arguments(args), run=False)
    trainer, task, data = cli.trainer, cli.model, cli.datamodule
    device = trainer.strategy.root_device
    length, multiple, unit = _length(args.length, task, data)
    lengths = args.measure or [math.ceil(length * share / 8 / multiple) * multiple for share in (1, 2, 3)]
    if min(lengths) < 1 or (not args.measure and max(lengths) >= length):
        raise UserError(f"a length of {length} {unit} is too short to plan for: run it")
    batch_size = data.settings["batch_size"]
    step = make_step(trainer, task, lambda tokens: make_batch(task, batch_size, tokens, device))
    plan = make_plan(step, lengths, device)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    table = Table(title=f"{' + '.join(args.config)} on {name}: batch {batch_size}, precision {trainer.precision}")
    for column in ("", unit, "peak GiB", "s a step", f"{unit}/s"):
        table.add_column(column, justify="left" if not column else "right")

    def row(kind: str, tokens: int, peak: float, seconds: float) -> None:
        rate = batch_size * tokens / seconds
        table.add_row(kind, f"{tokens:,}", f"{peak / 2**30:.3f}", f"{seconds:.3f}", f"{rate:,.0f}")

    for sample in plan.samples:
        row("measured", sample.length, sample.peak_bytes, sample.seconds)
    row("predicted", length, plan.peak_bytes(length), plan.seconds(length))
    real = None
    if args.check:
        real = measure(step, length, device)
        row("real", length, real.peak_bytes, real.seconds)
    console = Console()
    console.print(table)
    capacity = f"{plan.capacity_bytes / 2**30:.1f} GiB"
    longest = plan.longest
    fits = "any length" if longest is None else f"up to {longest // multiple * multiple:,} {unit}"
    console.print(f"In {capacity} fits: {fits}.", highlight=False)
    if real is None:
        return 0
    off = plan.peak_bytes(length) / real.peak_bytes - 1
    console.print(
        f"Predicted memory is off by {off:+.1%} (allowed: {TOLERANCE:.0%}), "
        f"time by {plan.seconds(length) / real.seconds - 1:+.1%}.",
        highlight=False,
    )
    return int(abs(off) > TOLERANCE)


def _arguments(args: argparse.Namespace) -> list[str]:
    from seqssm.cli import find_config

    configs = [part for name in args.config for part in ("--config", find_config(name))]
    alone = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.logger", "false"]
    return [*configs, *alone, *args.overrides]


def _length(asked: int | None, task: Any, data: Any) -> tuple[int, int, str]:
    """The length to plan for, what it must be a multiple of, and its unit."""
    from seqssm.tasks.dna import DNAClassification
    from seqssm.tasks.tagging import AudioTagging

    if isinstance(task, DNAClassification):
        multiple = max(task.patch, task.chunk_length)
        window, unit = data.settings["window_bp"], "bases"
    elif isinstance(task, AudioTagging):
        multiple, window, unit = task.stem.frame_group, None, "frames"
    else:
        raise UserError(
            f"plan knows DNAClassification and AudioTagging, not {type(task).__name__}: time it with `seqssm fit`"
        )
    length = window if asked is None else asked
    if length is None:
        raise UserError(f"the config does not fix the length of a sequence: give --length, in {unit}")
    if length < 1:
        raise UserError(f"--length must be positive, got {length}")
    return length, multiple, unit


def make_batch(task: Any, batch_size: int, length: int, device: torch.device) -> Any:
    """A batch of random sequences of one length, as the data of the task would give it, on the device."""
    from seqssm.data import DNABatch
    from seqssm.data.audio.batches import AudioBatch
    from seqssm.tasks.dna import DNAClassification

    classes = len(task.labels)
    lengths = torch.full((batch_size,), length, device=device)
    labels = torch.arange(batch_size, device=device) % classes
    if isinstance(task, DNAClassification):
        tokens = torch.randint(0, 4, (batch_size, length), dtype=torch.uint8, device=device)
        return DNABatch(tokens, lengths, labels)
    if task.multi_label:
        labels = torch.nn.functional.one_hot(labels, classes).float()
    features = torch.randn(batch_size, length, task.features.n_mels, device=device)
    return AudioBatch(features, lengths, labels)


def make_step(trainer: Any, task: Any, batch: Callable[[int], Any]) -> Callable[[int], None]:
    """One step of training at a length: forward, backward, clipping and AdamW, in the trainer's precision."""
    from seqssm.optim import parameter_groups

    precision = trainer.precision_plugin
    task = precision.convert_module(task).to(trainer.strategy.root_device).train()
    # Outside a training loop there is nobody to log to.
    task.log = lambda *_, **__: None
    groups = parameter_groups(task, task.optimizer_config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-12)

    def step(length: int) -> None:
        one = batch(length)
        with precision.forward_context():
            loss: Tensor = task.training_step(one, 0)
        loss.backward()
        if trainer.gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(task.parameters(), trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()

    return step
