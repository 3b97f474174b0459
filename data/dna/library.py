"""Records of any number of sources under one numbering, and stretches of them with named text columns."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from seqssm.data.dna.indexing import Sequences
from seqssm.errors import UserError


@dataclass
class Library:
    """All records of all sources under one numbering.

    Attributes: `names` (record names), `files` (the file of each record), `lengths` (r,) int64 in bases.
    """

    stores: list[Sequences] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    _first: list[int] = field(default_factory=list)

    def add(self, store: Sequences, files: list[str]) -> int:
        """Append a source's records; returns the number of its first one."""
        first = len(self.names)
        self.stores.append(store)
        self._first.append(first)
        self.names += store.names
        self.files += files
        self.__dict__.pop("lengths", None)
        return first

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.concatenate([store.lengths for store in self.stores])

    def unique_names(self) -> list[str]:
        """Record names, prefixed by their file's where two files have records of one name."""
        if len(set(self.names)) == len(self.names):
            return self.names
        return [f"{file}:{name}" for file, name in zip(self.files, self.names, strict=True)]

    def _locate(self, record: int) -> tuple[Sequences, int]:
        at = int(np.searchsorted(self._first, record, side="right")) - 1
        return self.stores[at], record - self._first[at]

    def tokens(self, record: int, start_bp: int, end_bp: int) -> np.ndarray:
        """Tokens (end_bp - start_bp,) uint8 of a stretch of a record."""
        store, local = self._locate(record)
        return store.tokens(local, start_bp, end_bp)

    def letters(self, record: int, start_bp: int, end_bp: int) -> np.ndarray:
        """Letters (end_bp - start_bp,) uint8 of a stretch as in the file, case preserved; a view."""
        store, local = self._locate(record)
        return store.letters(local, start_bp, end_bp)

    def token_rows(self, record: np.ndarray, start_bp: np.ndarray, length: int) -> np.ndarray:
        """Tokens (w,length) uint8 of stretches of equal length."""
        rows = np.empty((len(record), length), np.uint8)
        owner = np.searchsorted(self._first, record, side="right") - 1
        for at in np.unique(owner):
            mine = owner == at
            rows[mine] = self.stores[at].token_rows(record[mine] - self._first[at], start_bp[mine], length)
        return rows

    def n_count(self, record: np.ndarray, start_bp: np.ndarray, end_bp: np.ndarray) -> np.ndarray:
        """Ambiguous bases in each interval, (w,) int64."""
        counts = np.zeros(len(record), np.int64)
        owner = np.searchsorted(self._first, record, side="right") - 1
        for at in np.unique(owner):
            mine = owner == at
            local = record[mine] - self._first[at]
            counts[mine] = self.stores[at].n_count(local, start_bp[mine], end_bp[mine])
        return counts


@dataclass
class Regions:
    """Stretches of records, each with its columns: arrays of equal length. Those of `minus` (r,) bool are to be read
    from the other strand."""

    record: np.ndarray
    start_bp: np.ndarray
    end_bp: np.ndarray
    columns: dict[str, np.ndarray]
    minus: np.ndarray

    def __len__(self) -> int:
        return len(self.record)

    def __getitem__(self, which: np.ndarray) -> "Regions":
        columns = {name: values[which] for name, values in self.columns.items()}
        return Regions(self.record[which], self.start_bp[which], self.end_bp[which], columns, self.minus[which])

    def column(self, name: str, option: str) -> np.ndarray:
        """A column's values (r,), str; raises UserError naming the option that asked for it."""
        if name not in self.columns:
            raise UserError(f"{option} names the column {name!r}, but the data have {', '.join(sorted(self.columns))}")
        return self.columns[name]
