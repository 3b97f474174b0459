"""Clips as every reader of a layout gives them, and the tables that readers read."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from seqssm.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv")
MAX_NAMED = 1000  # in one message


@dataclass(frozen=True)
class Clip:
    """A recording or a part of one.

    labels: names, sorted. start_s, end_s: the part, to the end where None. group: what it was cut from, a unit that
    stays on one side of a split and that intervals resample. fold, split: the data set's own, if any.
    """

    path: Path
    labels: tuple[str, ...]
    start_s: float = 0.0
    end_s: float | None = None
    group: str = ""
    fold: str = ""
    split: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        part = f" ({self.start_s:g}-{'' if self.end_s is None else f'{self.end_s:g}'} s)"
        return str(self.path) + (part if self.start_s or self.end_s is not None else "")


@dataclass(frozen=True)
class AudioLayout:
    """Where the clips lie and how columns are called; `AudioTaggingDataModule` says what each field does."""

    path: Path
    format: str = "auto"
    root: Path | None = None
    vocabulary: Path | None = None
    path_column: str = "path"
    label_column: str | None = None
    label_separator: str | None = None
    group_column: str | None = None
    group_pattern: str | None = None


@dataclass
class ClipList:
    """Every clip in the order of the files, the classes that a vocabulary names, and what was left out, by reason."""

    format: str
    clips: list[Clip]
    vocabulary: list[str] | None = None
    several: bool = False  # the layout is one of clips with any number of labels
    left_out: dict[str, int] = field(default_factory=dict)

    def missing(self) -> list[Clip]:
        """Clips whose file does not exist."""
        exists = {path: path.is_file() for path in {clip.path for clip in self.clips}}
        return [clip for clip in self.clips if not exists[clip.path]]


def open_text(path: Path) -> TextIO:
    """A text file in UTF-8; raises UserError when it cannot be opened."""
    try:
        return open(path, newline="", encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and columns of every row."""
    try:
        with open_text(path) as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            check_header(path, reader.fieldnames)
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path} line {reader.line_num} has another number of columns than the header: correct it "
                        "(quote cells that contain commas)"
                    )
                yield reader.line_num, {key.strip(): value.strip() for key, value in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable table ({error}): save it as CSV in UTF-8") from error


def check_header(path: Path, names: Sequence[str] | None) -> None:
    """Raise UserError where a table names a column twice: the cells of one of them would be lost."""
    stripped = [name.strip() for name in names or ()]
    twice = next((name for name in stripped if name and stripped.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path} names the column {twice!r} twice: rename one of them")


def column(row: dict[str, str], names: tuple[str, ...], default: str = "") -> str:
    return next((row[name] for name in names if name in row), default)


def seconds(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"{where}: {text!r} is not a time in seconds")
    return value


def inside(root: Path, cell: str, base: Path, where: str) -> Path:
    """The file a table names, which must lie below the root."""
    if not cell or "\0" in cell:
        raise UserError(f"{where}: {cell!r} is no name of a file: correct the path, or remove the row")
    path = base / cell
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where}: {cell} lies outside of {root}: correct the path, or set root to a folder above it")
    return path


def need(row: dict[str, str], columns: tuple[str, ...], table: Path) -> None:
    missing = [column for column in columns if column not in row]
    if missing:
        raise UserError(f"{table} lacks the column {missing[0]!r} (it has {', '.join(row)}): set format, or correct it")


def listed(counts: Counter[str]) -> str:
    """Names and how often each occurs, for messages."""
    return ", ".join(f"{name!r} ({count})" for name, count in sorted(counts.items())[:MAX_NAMED])
