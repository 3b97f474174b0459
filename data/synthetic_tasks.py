"""Problems whose answer lies far back: what a model remembers, at any length, beyond those it was trained at.

A sequence of any length is a function of (seed, split, number, length) alone; nothing is read or written. Answers stand
at the sequence's end: the model's outputs at the last t positions are to predict the t targets. Selective copying and
induction heads are those of Gu and Dao (Mamba, 2023, section 4.1); associative recall is that of Ba et al. (2016) with
the pairs scattered over the sequence. In the needle task, of DNA, two motifs decide the label by their order: both
classes have the same k-mers for any k up to the distance between them, so no composition tells the classes apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seqssm.data.dna.sampling import DNABatch
from seqssm.data.loading import EpochSampler, ResumableLoader, ShardSampler, data_rank
from seqssm.errors import UserError

SPLITS = {"train": 0, "val": 1, "test": 2}
Ints = NDArray[np.integer[Any]]


class RecallBatch(NamedTuple):
    """tokens (b,l) uint8; targets (b,t) int64, what the outputs at the last t positions are to be."""

    tokens: Tensor
    targets: Tensor


class _Batches(Dataset[Any]):
    """Batches of one split, made when they are asked for: item i is a function of (seed, split, i)."""

    def __init__(self, data: SyntheticDataModule, split: str, lengths: list[int], rows: list[int]) -> None:
        self.data, self.split, self.lengths, self.rows = data, split, lengths, rows

    def __len__(self) -> int:
        return len(self.rows) if self.split != "train" else self.data.steps_per_epoch

    def __getitem__(self, index: int) -> Any:
        rng = np.random.default_rng([self.data.seed, SPLITS[self.split], index])
        at = int(rng.integers(len(self.lengths))) if self.split == "train" else index
        return self.data.batch(rng, self.rows[at], self.lengths[at])


class SyntheticDataModule(LightningDataModule, ABC):
    """Endless training batches, and evaluation at lengths of choice.

    Args:
        train_lengths: lengths to train at, tokens; each step draws one.
        tokens_per_step: a step takes as many sequences as have so many tokens, at least one.
        steps_per_epoch: training steps between validations.
        val_lengths: validation lengths; default the longest in training.
        val_sequences: validation sequences at each length.
        test_lengths: lengths that ``seqssm test`` and ``seqssm evaluate`` report on; default the powers of two from 2^6
            to 2^20 that the problem fits in.
        test_sequences: test sequences at each length.
        eval_tokens: tokens in a batch of validation and test, at least one sequence.
        num_workers: processes that make batches.
        seed: of everything random, also of what defines the problem.

    Raises:
        UserError: a number that does not work, or a length without room for the problem.
    """

    shortest: ClassVar[int] = 2
    vocabulary_size: int
    targets: ClassVar[int] = 1

    def __init__(
        self,
        train_lengths: list[int] | None = None,
        tokens_per_step: int = 2**14,
        steps_per_epoch: int = 1000,
        val_lengths: list[int] | None = None,
        val_sequences: int = 256,
        test_lengths: list[int] | None = None,
        test_sequences: int = 256,
        eval_tokens: int = 2**20,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train_lengths = train_lengths or [256]
        self.val_lengths = val_lengths or [max(self.train_lengths)]
        self.test_lengths = test_lengths or []
        self.tokens_per_step, self.steps_per_epoch = tokens_per_step, steps_per_epoch
        self.val_sequences, self.test_sequences = val_sequences, test_sequences
        self.eval_tokens, self.num_workers, self.seed = eval_tokens, num_workers, seed

    def check(self) -> None:
        """Raise UserError unless every setting works; a subclass calls it when it knows what it needs."""
        self.test_lengths = self.test_lengths or [2**i for i in range(6, 21) if 2**i >= self.shortest]
        for name in ("tokens_per_step", "steps_per_epoch", "val_sequences", "test_sequences", "eval_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("train_lengths", "val_lengths", "test_lengths"):
            if min(getattr(self, name)) < self.shortest:
                raise UserError(
                    f"{name} has {min(getattr(self, name))}: a sequence of this problem takes {self.shortest} tokens "
                    "at least"
                )

    @abstractmethod
    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Any:
        """So many sequences of a length, drawn with ``rng``."""

    def train_dataloader(self) -> DataLoader:
        """Resumable to the batch."""
        rows = [max(1, self.tokens_per_step // length) for length in self.train_lengths]
        dataset = _Batches(self, "train", self.train_lengths, rows)
        rank, ranks = self._rank()
        sampler = EpochSampler(dataset, 1, ranks, rank)
        if self.trainer is not None:
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return ResumableLoader(dataset, sampler=sampler, **self._loader_arguments())

    def val_dataloader(self) -> DataLoader:
        """Every length in turn."""
        return self._evaluation_loader("val", self.val_lengths, self.val_sequences)

    def test_dataloader(self) -> DataLoader:
        """Every length in turn."""
        rank_zero_info(f"{self.test_sequences} sequences at each of the lengths {self.test_lengths}")
        return self._evaluation_loader("test", self.test_lengths, self.test_sequences)

    def _evaluation_loader(self, split: str, lengths: list[int], sequences: int) -> DataLoader:
        plan = []
        for length in lengths:
            most = min(sequences, max(1, self.eval_tokens // length))
            plan += [(length, min(most, sequences - done)) for done in range(0, sequences, most)]
        dataset = _Batches(self, split, [length for length, _ in plan], [rows for _, rows in plan])
        rank, ranks = self._rank()
        return DataLoader(dataset, sampler=ShardSampler(dataset, ranks, rank), **self._loader_arguments())

    def _rank(self) -> tuple[int, int]:
        return data_rank(self.trainer)

    def _loader_arguments(self) -> dict[str, Any]:
        workers = self.num_workers
        return {"collate_fn": _only, "num_workers": workers, "persistent_workers": workers > 0}


def _only(items: list[Any]) -> Any:
    return items[0]


class RecallDataModule(SyntheticDataModule):
    """A problem of tokens and targets, :class:`RecallBatch`."""

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> RecallBatch:
        tokens, targets = self.draw(rng, rows, length)
        return RecallBatch(torch.from_numpy(tokens.astype(np.uint8)), torch.from_numpy(targets.astype(np.int64)))

    @abstractmethod
    def draw(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ints, Ints]:
        """tokens (rows, length) below 256, and targets (rows, t)."""


class InductionHeads(RecallDataModule):
    """Random tokens; a trigger stands once among them and again at the end: what followed it the first time?

    Tokens 0 to ``vocabulary`` - 1, and the trigger.

    Args:
        vocabulary: ordinary tokens.
        kwargs: as :class:`SyntheticDataModule`.
    """

    shortest = 4

    def __init__(self, vocabulary: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 2 <= vocabulary <= 255:
            raise UserError(f"vocabulary is {vocabulary}: it must lie between 2 and 255")
        self.vocabulary, self.vocabulary_size = vocabulary, vocabulary + 1
        self.save_hyperparameters(logger=False)
        self.check()

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ints, Ints]:
        tokens = rng.integers(0, self.vocabulary, (rows, length), dtype=np.uint8)
        at, row = rng.integers(0, length - 2, rows), np.arange(rows)
        tokens[row, at] = tokens[:, -1] = self.vocabulary
        return tokens, tokens[row, at + 1][:, None]


class SelectiveCopying(RecallDataModule):
    """A few tokens scattered among noise, then as many markers: repeat the tokens, in order, without the noise.

    Tokens 0 to ``vocabulary`` - 1, the noise, and the marker.

    Args:
        vocabulary: tokens to remember from.
        memorize: tokens to remember, t.
        kwargs: as :class:`SyntheticDataModule`.
    """

    def __init__(self, vocabulary: int = 16, memorize: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 2 <= vocabulary <= 254 or memorize < 1:
            raise UserError(
                f"vocabulary is {vocabulary}, memorize {memorize}: give 2 to 254 tokens and remember one at least"
            )
        self.vocabulary, self.memorize, self.vocabulary_size = vocabulary, memorize, vocabulary + 2
        self.shortest = 2 * memorize  # type: ignore[misc]
        self.save_hyperparameters(logger=False)
        self.check()

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ints, Ints]:
        tokens = np.full((rows, length), self.vocabulary, np.uint8)
        tokens[:, -self.memorize :] = self.vocabulary + 1
        targets = rng.integers(0, self.vocabulary, (rows, self.memorize))
        for row, target in zip(tokens, targets, strict=True):
            row[_places(rng, self.memorize, length - self.memorize, 1)] = target
        return tokens, targets


class AssociativeRecall(RecallDataModule):
    """Pairs of a key and a value scattered among noise, then one of the keys: what is its value?

    Tokens: keys, values, and the noise.

    Args:
        keys: keys, and values, to choose from.
        pairs: pairs in a sequence, all of different keys.
        kwargs: as :class:`SyntheticDataModule`.
    """

    def __init__(self, keys: int = 16, pairs: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= pairs <= keys <= 127:
            raise UserError(f"pairs is {pairs}, keys {keys}: a key stands in one pair at most, and 127 are the most")
        self.keys, self.pairs, self.vocabulary_size = keys, pairs, 2 * keys + 1
        self.shortest = 3 * pairs + 1  # type: ignore[misc]
        self.save_hyperparameters(logger=False)
        self.check()

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ints, Ints]:
        tokens = np.full((rows, length), 2 * self.keys, np.uint8)
        keys = rng.permuted(np.tile(np.arange(self.keys), (rows, 1)), axis=1)[:, : self.pairs]
        values = self.keys + rng.integers(0, self.keys, (rows, self.pairs))
        for row, key, value in zip(tokens, keys, values, strict=True):
            places = _places(rng, self.pairs, length - 1, 2)
            row[places], row[places + 1] = key, value
        asked, row_ids = rng.integers(0, self.pairs, rows), np.arange(rows)
        tokens[:, -1] = keys[row_ids, asked]
        return tokens, values[row_ids, asked][:, None]


class Needle(SyntheticDataModule):
    """Random DNA with two motifs, one in the first third and one in the last: which comes first? :class:`DNABatch`.

    The motifs are drawn once, from ``seed``. Labels: ``first`` and ``second``, for the motif that leads.

    Args:
        motif_bp: length of each motif.
        kwargs: as :class:`SyntheticDataModule`.
    """

    def __init__(self, motif_bp: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if motif_bp < 4:
            raise UserError(f"motif_bp is {motif_bp}: shorter than 4 bp, chance has too many of them")
        self.motif_bp = motif_bp
        self.labels = ["first", "second"]
        self.motifs = np.random.default_rng([self.seed, 3]).integers(0, 4, (2, motif_bp), dtype=np.uint8)
        self.shortest = 3 * motif_bp + 3  # type: ignore[misc]
        self.save_hyperparameters(logger=False)
        self.check()

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> DNABatch:
        tokens = rng.integers(0, 4, (rows, length), dtype=np.uint8)
        labels = rng.permuted((np.arange(rows) + rng.integers(2)) % 2)  # equal classes, or one more of either
        third, span = length // 3, np.arange(self.motif_bp)
        starts = np.stack(
            [
                rng.integers(0, third - self.motif_bp + 1, rows),
                rng.integers(length - third, length - self.motif_bp + 1, rows),
            ]
        )
        for place, leads in ((0, labels), (1, 1 - labels)):
            tokens[np.arange(rows)[:, None], starts[place][:, None] + span] = self.motifs[leads]
        return DNABatch(torch.from_numpy(tokens), torch.full((rows,), length), torch.from_numpy(labels))


def _places(rng: np.random.Generator, count: int, length: int, width: int) -> Ints:
    """Sorted starts of ``count`` pieces of ``width`` that do not overlap, at random in ``length`` tokens."""
    free = length - count * (width - 1)
    return np.sort(rng.choice(free, count, replace=False, shuffle=False)) + np.arange(count) * (width - 1)
