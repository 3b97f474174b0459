"""Windows over regions: a fixed grid, or seeded random draws that depend on (seed, epoch, index) alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seqssm.data.dna.alphabet import COMPLEMENT, ENCODE, PAD, reverse_complement
from seqssm.data.dna.library import Library
from seqssm.data.loading import shuffled_rounds
from seqssm.errors import UserError

MAX_DRAWS = 200
MANY_BP = 4096
"""Longer windows are read one by one: there, what it costs to find them no longer matters."""
LOWER_CASE_BIT = 0x20  # of ASCII letters


class DNABatch(NamedTuple):
    """tokens (b,l) uint8, padded on the right with PAD; lengths (b,) int64; labels (b,) int64."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor


class UnlabelledBatch(NamedTuple):
    """tokens (b,l) uint8, padded on the right with PAD; lengths (b,) int64; lower (b,l) bool: in lower case."""

    tokens: Tensor
    lengths: Tensor
    lower: Tensor


@dataclass(frozen=True)
class Windows:
    """Windows in data set order, as arrays of equal length.

    record_id, group_id: (w,) int64 into `record_names` and `group_names`; start_bp, length: (w,) int64;
    label: (w,) int64 class ids; minus: (w,) bool, read from the other strand.
    """

    record_id: np.ndarray
    start_bp: np.ndarray
    length: np.ndarray
    label: np.ndarray
    group_id: np.ndarray
    minus: np.ndarray
    record_names: np.ndarray
    group_names: np.ndarray

    def __len__(self) -> int:
        return len(self.record_id)

    def __getitem__(self, which: np.ndarray) -> "Windows":
        """The chosen windows, by index array, mask or slice."""
        arrays = ("record_id", "start_bp", "length", "label", "group_id", "minus")
        return replace(self, **{name: getattr(self, name)[which] for name in arrays})

    @property
    def end_bp(self) -> np.ndarray:
        """(w,) int64, exclusive."""
        return self.start_bp + self.length

    @property
    def record(self) -> np.ndarray:
        """(w,) record names, unique to a record."""
        return self.record_names[self.record_id]

    @property
    def group(self) -> np.ndarray:
        """(w,) group names: the unit to resample for intervals."""
        return self.group_names[self.group_id]


def grid_windows(regions: Windows, window_bp: int | None, stride_bp: int | None, min_window_bp: int | None) -> Windows:
    """Windows at every `stride_bp` (default: a window) of each region, all whole; None for `window_bp` takes regions
    as they are. A region shorter than a window is taken whole from `min_window_bp` on, otherwise left out; what
    remains behind the last whole window of a longer one is left out too (nothing is padded with N)."""
    if window_bp is None:
        return regions
    stride_bp = stride_bp or window_bp
    shortest = window_bp if min_window_bp is None else min(min_window_bp, window_bp)
    regions = regions[regions.length >= shortest]
    count = np.maximum((regions.length - window_bp) // stride_bp, 0) + 1
    which = np.repeat(np.arange(len(regions)), count)
    step = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    grid = regions[which]
    return replace(grid, start_bp=grid.start_bp + step * stride_bp, length=np.minimum(grid.length, window_bp))


def within_n_cap(windows: Windows, library: Library, max_n_fraction: float) -> np.ndarray:
    """Mask (w,) of the windows whose share of N is at most the cap; a window of nothing but N never is."""
    n_count = library.n_count(windows.record_id, windows.start_bp, windows.end_bp)
    return (n_count <= max_n_fraction * windows.length) & (n_count < windows.length)


class Sample(NamedTuple):
    """One window: tokens (l,) uint8 of its strand, its class id, whether `collate` is to turn it to the other one, and,
    where it was asked for, which letters are in lower case (l,) bool: repeats, in a soft-masked genome."""

    tokens: np.ndarray
    label: int
    flip: bool
    lower: np.ndarray | None = None


class WindowDataset(Dataset[Sample]):
    """The windows of `windows` in their order, every epoch the same; with their case, if it is asked for."""

    def __init__(self, library: Library, windows: Windows, case: bool = False) -> None:
        self.library = library
        self.windows = windows
        self.case = case

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Sample:
        return _read(self.library, self.windows, index, False, self.case)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Several at once, as the loaders ask for a batch."""
        at = np.asarray(indices)
        return _read_rows(self.library, self.windows, at, np.zeros(len(at), bool), self.case)


def _read(library: Library, windows: Windows, at: int, flip: bool, case: bool) -> Sample:
    start_bp = int(windows.start_bp[at])
    letters = library.letters(int(windows.record_id[at]), start_bp, start_bp + int(windows.length[at]))
    tokens, lower = ENCODE[letters], (letters & LOWER_CASE_BIT) != 0 if case else None
    if windows.minus[at]:
        tokens, lower = COMPLEMENT[tokens[::-1]], None if lower is None else lower[::-1].copy()
    return Sample(tokens, int(windows.label[at]), flip, lower)


def _read_rows(library: Library, windows: Windows, at: np.ndarray, flip: np.ndarray, case: bool) -> list[Sample]:
    """What :func:`_read` gives for each of the windows ``at`` (n,); much faster for many short ones of one length."""
    lengths = windows.length[at]
    if case or len(at) < 2 or lengths.min() < lengths.max() or lengths[0] > MANY_BP:
        return [_read(library, windows, int(one), bool(turn), case) for one, turn in zip(at, flip, strict=True)]
    rows = library.token_rows(windows.record_id[at], windows.start_bp[at], int(lengths[0]))
    minus = windows.minus[at]
    rows[minus] = COMPLEMENT[rows[minus, ::-1]]
    labels = windows.label[at].tolist()
    return [Sample(row, label, turn) for row, label, turn in zip(rows, labels, flip.tolist(), strict=True)]


class TrainingDataset(Dataset[Sample]):
    """An unending sequence of windows, `len(self)` of them to an epoch; item i is a function of (seed, i) alone.

    `candidates` are whole regions to draw from anywhere (`random_start`), or fixed windows to take in random order,
    each once before any comes again. With `balance`, every class gives the same number of windows to an epoch. With
    `case`, samples say which letters are in lower case.
    `windows` describes epoch 0: items 0 to len(self) - 1.
    """

    def __init__(
        self,
        library: Library,
        candidates: Windows,
        *,
        windows_per_epoch: int,
        seed: int,
        window_bp: int | None = None,
        random_start: bool = False,
        balance: bool = False,
        rc_probability: float = 0.0,
        max_n_fraction: float = 1.0,
        case: bool = False,
    ) -> None:
        self.case = case
        self.library = library
        self.candidates = candidates
        self.windows_per_epoch = windows_per_epoch
        self.seed = seed
        self.window_bp = window_bp
        self.random_start = random_start
        self.balance = balance
        self.rc_probability = rc_probability
        self.max_n_fraction = max_n_fraction
        self._epoch = -1
        self.windows, _ = self.draw(0)

    def __len__(self) -> int:
        return self.windows_per_epoch

    def __getitem__(self, index: int) -> Sample:
        epoch, at = divmod(index, self.windows_per_epoch)
        windows, flip = self._draw_once(epoch)
        return _read(self.library, windows, at, bool(flip[at]), self.case)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Several at once, as the loaders ask for a batch."""
        epoch, at = np.divmod(np.asarray(indices), self.windows_per_epoch)
        if (epoch != epoch[0]).any():
            return [self[index] for index in indices]
        windows, flip = self._draw_once(int(epoch[0]))
        return _read_rows(self.library, windows, at, flip[at], self.case)

    def _draw_once(self, epoch: int) -> tuple[Windows, np.ndarray]:
        if epoch != self._epoch:
            self._drawn = self.draw(epoch)
            self._epoch = epoch
        return self._drawn

    def draw(self, epoch: int) -> tuple[Windows, np.ndarray]:
        """The epoch's windows in training order, and which of them are read from the other strand (w,) bool."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.random_start:
            windows = self._draw_starts(rng)
        else:
            windows = self.candidates[self._draw_fixed(rng, epoch)]
        return windows, rng.random(self.windows_per_epoch) < self.rc_probability

    def _pools(self) -> list[np.ndarray]:
        """Candidates to draw from in equal shares: those of each class, or all of them."""
        if not self.balance:
            return [np.arange(len(self.candidates))]
        return [np.flatnonzero(self.candidates.label == label) for label in np.unique(self.candidates.label)]

    def _pool_of_item(self, rng: np.random.Generator, pools: int) -> np.ndarray:
        return rng.permutation(np.arange(self.windows_per_epoch) % pools)

    def _draw_fixed(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        pools = self._pools()
        pool_of_item = self._pool_of_item(rng, len(pools))
        chosen = np.empty(self.windows_per_epoch, np.int64)
        for number, pool in enumerate(pools):
            items = np.flatnonzero(pool_of_item == number)
            chosen[items] = shuffled_rounds(pool, epoch * len(items), len(items), (self.seed, number))
        return chosen

    def _draw_starts(self, rng: np.random.Generator) -> Windows:
        assert self.window_bp is not None
        regions, pools = self.candidates, self._pools()
        starts = np.maximum(regions.length - self.window_bp + 1, 1)  # a region taken whole has one
        pool_of_item = self._pool_of_item(rng, len(pools))
        region = np.zeros(self.windows_per_epoch, np.int64)
        offset = np.zeros(self.windows_per_epoch, np.int64)
        missing = np.arange(self.windows_per_epoch)
        for _ in range(MAX_DRAWS):
            for number, pool in enumerate(pools):
                items = missing[pool_of_item[missing] == number]
                ends = np.cumsum(starts[pool])
                position = rng.integers(0, ends[-1], len(items))
                at = np.searchsorted(ends, position, side="right")
                region[items] = pool[at]
                offset[items] = position - (ends[at] - starts[pool[at]])
            windows = self._at(region, offset)
            missing = missing[~within_n_cap(windows[missing], self.library, self.max_n_fraction)]
            if not len(missing):
                return windows
        name = regions.record[region[missing[0]]]
        raise UserError(
            f"hardly a window of {self.window_bp} bp has under {self.max_n_fraction:.0%} N (in {name!r}, for one): "
            "raise max_n_fraction or lower window_bp"
        )

    def _at(self, region: np.ndarray, offset: np.ndarray) -> Windows:
        assert self.window_bp is not None
        drawn = self.candidates[region]
        return replace(drawn, start_bp=drawn.start_bp + offset, length=np.minimum(drawn.length, self.window_bp))


def collate(samples: Sequence[Sample]) -> DNABatch:
    """Pad on the right to the longest, then turn the marked rows to the other strand all at once."""
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    tokens = np.full((len(samples), int(lengths.max())), PAD, np.uint8)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample.tokens)] = sample.tokens
    batch = torch.from_numpy(tokens)
    flip = torch.tensor([sample.flip for sample in samples])
    if flip.any():
        batch[flip] = reverse_complement(batch[flip], lengths[flip])
    return DNABatch(batch, lengths, torch.tensor([sample.label for sample in samples]))


def collate_unlabelled(samples: Sequence[Sample]) -> UnlabelledBatch:
    """`collate` for samples that were read with their case."""
    tokens, lengths, _ = collate(samples)
    lower = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, sample in zip(lower, samples, strict=True):
        assert sample.lower is not None
        marks = torch.from_numpy(sample.lower)
        row[: len(marks)] = marks.flip(0) if sample.flip else marks
    return UnlabelledBatch(tokens, lengths, lower)
