"""Mixers side by side: each trained on the same DNA with the same budget, for its loss, speed and memory by length.

Every model predicts the next base, sees the same windows in the same order, and has the same width, learning rate and
number of tokens; attention, which has fewer weights than a Mamba layer, has a gated MLP that makes up for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.data.dna.alphabet import N, encode
from seqssm.data.dna.reading import sequence_pieces
from seqssm.errors import UserError
from seqssm.optim import parameter_groups, warmup_cosine
from seqssm.tasks.pretraining import DNAPretraining

SPECS = {
    "m": MixerSpec(class_path="Mamba"),
    "2": MixerSpec(class_path="Mamba2"),
    "s": MixerSpec(class_path="S4D"),
    "a": MixerSpec(class_path="Attention", init_args={"heads": 2}),
}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"pattern": "m"},
    "mamba2": {"pattern": "2"},
    "s4d": {"pattern": "s"},
    "hybrid": {"pattern": "mmmmmmma"},
    "attention": {"pattern": "a", "mlp_ratio": 1.0},
}
"""What of a :class:`~seqssm.backbone.BackboneConfig` makes each; ``hybrid`` has one attention layer in eight."""

VALIDATION_TOKENS = 2**20
_WARM_STEPS = 3  # kernels are compiled and the allocator's pools filled


@dataclass(frozen=True)
class Budget:
    """What every model gets.

    Args:
        tokens: bases in training.
        step_tokens: bases of a step, at any length of its windows.
        layers, d_model: size.
        lr: peak learning rate: a tenth of the steps of warm-up, then half a cosine.
        seed: of the weights and windows.
    """

    tokens: int = 2**24
    step_tokens: int = 2**17
    layers: int = 8
    d_model: int = 128
    lr: float = 2e-3
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.tokens // self.step_tokens


@dataclass(frozen=True)
class Row:
    """One model at one length.

    Attributes:
        model, length, parameters: which.
        train_nats, val_nats: cross entropy a base: of the last tenth of the training steps, and over 2^20 bases of a
            record that was not trained on, in windows of the same length.
        tokens_per_s: of the median training step, optimizer included.
        peak_mib: the allocator's peak in training; None on the CPU.
    """

    model: str
    length: int
    parameters: int
    train_nats: float
    val_nats: float
    tokens_per_s: float
    peak_mib: float | None


class Genome:
    """Records of a sequence file, one of them held out.

    Args:
        path: FASTA (also gz), GenBank, EMBL, 2bit.
        longest: bases of the longest window.
        held_out: name of the record to validate on; the last that is long enough when None.

    Raises:
        UserError: the file cannot be read, or has too little.
    """

    def __init__(self, path: Path, longest: int, held_out: str | None = None) -> None:
        parts: dict[str, list[NDArray[np.uint8]]] = {}
        name = ""
        for piece in sequence_pieces(path):
            name = piece.name if piece.name is not None else name
            parts.setdefault(name, []).append(encode(piece.letters))
        records = {name: np.concatenate(part) for name, part in parts.items()}
        if held_out is not None and held_out not in records:
            raise UserError(f"{path} has no record {held_out!r}: --held-out must be one of {', '.join(records)}")
        enough = [name for name, record in records.items() if len(record) >= longest]
        if len(enough) < 2 or (held_out is not None and held_out not in enough):
            raise UserError(f"{path}: two records must have {longest:,} bp, one to train and one to validate on")
        self.held_out = held_out or enough[-1]
        self.validation = records[self.held_out]
        self.training = [records[name] for name in enough if name != self.held_out]

    def windows(self, rng: np.random.Generator, rows: int, length: int) -> Tensor:
        """(rows, length) uint8, from anywhere in the training records."""
        room = np.array([len(record) - length + 1 for record in self.training])
        which = rng.choice(len(room), rows, p=room / room.sum())
        starts = rng.integers(room[which])
        return _stack([self.training[i][at : at + length] for i, at in zip(which, starts, strict=True)])

    def validation_windows(self, length: int) -> Tensor:
        """(rows, length) uint8, about 2^20 bases in all, side by side from the held-out record's start."""
        rows = max(1, min(VALIDATION_TOKENS, len(self.validation)) // length)
        return _stack(np.split(self.validation[: rows * length], rows))


def compare(
    genome: Genome,
    lengths: Sequence[int],
    models: Sequence[str],
    budget: Budget,
    done: Callable[[Row], None],
    advance: Callable[[int], None],
    device: torch.device,
) -> None:
    """Train every model at every length, one at a time.

    Args:
        genome: the data.
        lengths: of windows, bases; each divides ``budget.step_tokens``.
        models: names in ``MODELS``.
        budget: what each gets.
        done: takes each row as it is finished.
        advance: takes the number of training steps since the last call.
        device: where.

    Raises:
        UserError: a length does not fit the budget.
    """
    for length in lengths:
        if length < 2 or budget.step_tokens % length:
            raise UserError(f"length {length:,} must divide the {budget.step_tokens:,} tokens of a step")
    if budget.steps < 1:
        raise UserError(f"{budget.tokens:,} tokens are less than one step of {budget.step_tokens:,}")
    for length in lengths:
        for name in models:
            done(train(genome, length, name, budget, advance, device))


def train(
    genome: Genome, length: int, name: str, budget: Budget, advance: Callable[[int], None], device: torch.device
) -> Row:
    """One row of the table."""
    torch.manual_seed(budget.seed)
    config = BackboneConfig(d_model=budget.d_model, n_layers=budget.layers, mixers=SPECS, **MODELS[name])
    task = DNAPretraining(backbone=config).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(task, 0.1), lr=budget.lr, betas=(0.9, 0.95))
    schedule = warmup_cosine(optimizer, max(1, budget.steps // 10), budget.steps, 0.02)
    rows = budget.step_tokens // length

    def step(tokens: Tensor) -> Tensor:
        loss = _loss(task, tokens.to(device, non_blocking=True), device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    _warm(step, task, optimizer, genome.windows(np.random.default_rng(1), rows, length), device)
    rng = np.random.default_rng([budget.seed, length])
    losses, seconds = [], []
    for _ in range(budget.steps):
        tokens = genome.windows(rng, rows, length)
        begin = time.perf_counter()
        losses.append(step(tokens).item())
        seconds.append(time.perf_counter() - begin)
        schedule.step()
        advance(1)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return Row(
        name,
        length,
        sum(p.numel() for p in task.parameters()),
        statistics.fmean(losses[-max(1, budget.steps // 10) :]),
        _validate(task, genome.validation_windows(length), rows, device),
        budget.step_tokens / statistics.median(seconds),
        peak,
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| bases | model | parameters | train nats | validation nats a base | tokens/s | peak MiB |",
        "| --: | --- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        peak = "" if row.peak_mib is None else f"{row.peak_mib:,.0f}"
        lines.append(
            f"| {row.length:,} | {row.model} | {row.parameters:,} | {row.train_nats:.4f} | {row.val_nats:.4f} "
            f"| {row.tokens_per_s:,.0f} | {peak} |"
        )
    return "\n".join(lines)


def _loss(task: DNAPretraining, tokens: Tensor, device: torch.device) -> Tensor:
    lengths = torch.full((len(tokens),), tokens.shape[1], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = task(tokens, lengths)[:, :-1]
    target = tokens[:, 1:].long()
    return F.cross_entropy(logits.float().flatten(0, 1), target.masked_fill(target >= N, -100).flatten())


def _warm(
    step: Callable[[Tensor], Tensor],
    task: DNAPretraining,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    device: torch.device,
) -> None:
    """Some steps that leave no trace but compiled kernels."""
    weights = {name: value.clone() for name, value in task.state_dict().items()}
    for _ in range(_WARM_STEPS):
        step(tokens)
    task.load_state_dict(weights)
    optimizer.state.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@torch.inference_mode()
def _validate(task: DNAPretraining, windows: Tensor, rows: int, device: torch.device) -> float:
    task.eval()
    parts = windows.split(rows)
    losses = [_loss(task, part.to(device), device).item() * len(part) for part in parts]
    return sum(losses) / len(windows)


def _stack(windows: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(windows))
