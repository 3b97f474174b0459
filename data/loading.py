"""Seeded order; loaders that a Lightning checkpoint remembers to the batch, and shards that show every item once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, DistributedSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def shuffled_rounds(pool: np.ndarray, first: int, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Items first to first + count of the endless sequence of the pool's permutations, which `key` seeds."""
    rounds = range(first // len(pool), (first + count - 1) // len(pool) + 1)
    order = [pool[np.random.default_rng([*key, r, 1]).permutation(len(pool))] for r in rounds]
    skip = first - rounds.start * len(pool)
    return np.concatenate(order)[skip : skip + count]


def data_rank(trainer: Trainer | None) -> tuple[int, int]:
    """Which share of the data this process takes, of how many: processes that work on the same items have one."""
    shares = None if trainer is None else trainer.distributed_sampler_kwargs
    return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)


class EpochSampler(DistributedSampler[int]):
    """Items epoch * n to (epoch + 1) * n - 1, every `num_replicas`-th of them, from a batch onwards when resumed.

    A DistributedSampler, so that Lightning leaves it alone and tells it the epoch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank)
        self.batch_size = batch_size
        self.first_batch = 0
        share = len(dataset) // num_replicas  # type: ignore[arg-type]
        # whole batches only, and as many for every rank, unless the epoch is smaller than one
        self.per_rank = share - share % batch_size if share >= batch_size else share

    def set_epoch(self, epoch: int) -> None:
        """Begin at the epoch's first batch, unless the epoch is the one to be resumed."""
        if epoch != self.epoch:
            self.epoch, self.first_batch = epoch, 0

    def __len__(self) -> int:
        return self.per_rank

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        items = range(first + self.rank, first + self.per_rank * self.num_replicas, self.num_replicas)
        yield from items[self.first_batch * self.batch_size :]


class ResumableLoader(DataLoader):
    """A training loader that a Lightning checkpoint remembers to the batch, also in the middle of an epoch."""

    sampler: EpochSampler
    _batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator, so that workers start after Lightning has set the epoch, not before
        self._batches = self.sampler.first_batch
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch and how many of its batches have been given out."""
        return {"epoch": self.sampler.epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the last batch given out."""
        finished = state["batches"] >= len(self)
        self.sampler.epoch = state["epoch"] + finished
        self.sampler.first_batch = 0 if finished else state["batches"]


class ShardSampler(DistributedSampler[int]):
    """Every `num_replicas`-th item in order, none twice: the scores of a split are over its windows, each once."""

    def __init__(self, dataset: Dataset, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        yield from range(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]
