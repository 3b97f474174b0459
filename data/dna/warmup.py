"""Length warm-up: training windows double in length, stage by stage, while every step sees as many bases."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch.utils.data import Dataset

from seqssm.data.dna.sampling import Sample, TrainingDataset
from seqssm.errors import UserError

B = TypeVar("B")


class LengthWarmUp(Dataset[list[Sample]]):
    """Items of equally many bases: one long window in the last stage, 2^s windows 2^s times shorter s stages before.

    Sampler, batch size and the number of steps in an epoch stay what they are, whatever the stage, and the stage
    follows from the epoch alone: a run resumes to the batch as it does without a warm-up. Schedule: HyenaDNA (Nguyen
    et al., 2023, section 3.2), with the tokens of a step held constant.

    Args:
        stages: the windows of each stage, shortest first; a stage has twice as many to an epoch as the next one.
        epochs_per_length: how long a stage lasts, in epochs; the last one stays.
    """

    def __init__(self, stages: Sequence[TrainingDataset], epochs_per_length: int) -> None:
        self.stages = list(stages)
        self.epochs_per_length = epochs_per_length

    def __len__(self) -> int:
        return len(self.stages[-1])

    def __getitem__(self, index: int) -> list[Sample]:
        epoch, at = divmod(index, len(self))
        stage = self.stage(epoch)
        count = len(stage) // len(self)
        first = epoch * len(stage) + at * count
        return [stage[i] for i in range(first, first + count)]

    def stage(self, epoch: int) -> TrainingDataset:
        """What an epoch draws from."""
        return self.stages[min(epoch // self.epochs_per_length, len(self.stages) - 1)]

    @property
    def epochs(self) -> int:
        """Epochs before windows have their full length."""
        return (len(self.stages) - 1) * self.epochs_per_length

    def schedule(self, batch_size: int) -> str:
        """One line for the user: which epochs train on what."""
        parts = []
        for number, stage in enumerate(self.stages):
            count = batch_size * len(stage) // len(self)
            parts.append(f"from epoch {number * self.epochs_per_length} {count} x {stage.window_bp:,} bp")
        return "windows a step: " + ", ".join(parts)


def window_lengths(first_bp: int, window_bp: int | None) -> list[int]:
    """Lengths from the first to the full one, each twice the one before.

    Raises:
        UserError: there is no full length, or it is not a power of two times the first.
    """
    if window_bp is None:
        raise UserError("warmup_from_bp needs window_bp, the length to warm up to")
    times = window_bp // max(first_bp, 1)
    if first_bp < 1 or times < 2 or window_bp % first_bp or times & (times - 1):
        raise UserError(
            f"warmup_from_bp is {first_bp}: window_bp ({window_bp}) must be 2, 4, 8 ... times as long; "
            "lengths double until they reach it"
        )
    return [first_bp << i for i in range(times.bit_length())]


def collate_items(items: Sequence[list[Sample]], collate: Callable[[Sequence[Sample]], B]) -> B:
    """The windows of all items in one batch, as ``collate`` makes it of samples."""
    return collate([sample for item in items for sample in item])
