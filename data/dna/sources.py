"""What users have, whatever its layout, as one table of regions: record, start, end, and named text columns.

Besides those of the tables there are always the columns `record` (the record's name) and `file`.

Layouts (`Layout.path`):
- a table (CSV, TSV) with a `sequence` column: each row is a record;
- a table with a `path` column (relative to the table): each row is a sequence file, its other columns hold for all
  records of the file;
- a FASTA, GenBank, EMBL or 2bit file; `labels_table` gives columns by its `record` column;
- a BED file with `fasta`: each line is a region;
- a folder with `train`, `dev`/`val`, `test` files of the first three kinds;
- a folder of class folders, or of split folders of class folders, with sequence files (Genomic Benchmarks).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from seqssm.data.dna.indexing import Sequences, open_sequences
from seqssm.data.dna.library import Library, Regions
from seqssm.data.dna.reading import (
    BED_FOURTH,
    BIOPYTHON_FORMATS,
    FASTA_SUFFIXES,
    STRAND,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Interval,
    Table,
    check_letters,
    read_bed,
    read_table,
    read_text_sequence,
    starts_with,
    suffix_of,
)
from seqssm.data.progress import progress_bar
from seqssm.data.splitting import SPLIT_NAMES, split_name
from seqssm.errors import UserError

SEQUENCE_SUFFIXES = (*FASTA_SUFFIXES, *BIOPYTHON_FORMATS)


@dataclass(frozen=True)
class Layout:
    """Where the data lie and how their columns are called."""

    path: Path
    fasta: Path | None = None
    labels_table: Path | None = None
    label_column: str = "label"
    split_column: str = "split"
    sequence_column: str = "sequence"
    path_column: str = "path"
    record_column: str = "record"
    bed_columns: tuple[str, ...] | None = None
    record_pattern: str | None = None


Columns = dict[str, str]


@dataclass
class Listing:
    """What file names and tables say before any sequence is read.

    `samples_are_files`: each file is a sample (a genome) of its own, named in a table or lying in a class folder.
    """

    layout: Layout
    files: list[tuple[Path, Columns]] = field(default_factory=list)  # sequence files
    tables: list[tuple[Table, Columns]] = field(default_factory=list)  # tables of sequences
    rows: dict[str, Columns] | None = None  # by record name, from labels_table
    intervals: list[Interval] | None = None  # from BED
    samples_are_files: bool = False

    def label_values(self) -> set[str] | None:
        """Every label that the tables name, or None where only the records' names hold them."""
        key = self.layout.label_column
        found = {columns[key] for _, columns in self.files if key in columns}
        for table, columns in self.tables:
            found |= {columns[key]} if key in columns else set(table.column(key, "label_column"))
        for columns in (self.rows or {}).values():
            found |= {columns[key]} if key in columns else set()
        for interval in self.intervals or ():
            found |= {interval.columns[key]} if key in interval.columns else set()
        return found - {""} or None

    def load(self, index_dir: Path | None) -> tuple[Library, Regions]:
        """Index or read every source; returns its records and their regions."""
        library = Library()
        base = self.layout.path if self.layout.path.is_dir() else self.layout.path.parent
        file_columns: list[Columns] = []  # for each record
        self._load_files(library, file_columns, base, index_dir)
        for table, columns in self.tables:
            names, sequences = _table_records(table, self.layout)
            library.add(Sequences.from_records(zip(names, sequences, strict=True)), [table.path.name] * len(names))
            skip = self.layout.sequence_column
            file_columns += [{**columns, **{k: v for k, v in row.items() if k != skip}} for row in table.records()]
        record_columns = self._with_rows(library, file_columns)
        if self.layout.record_pattern is not None:
            _add_pattern_columns(library, record_columns, self.layout.record_pattern)
        if self.intervals is None:
            count = len(library.names)
            minus = np.zeros(count, bool)
            return library, _regions(library, np.arange(count), np.zeros(count), library.lengths, record_columns, minus)
        return library, self._interval_regions(library, record_columns)

    def _load_files(self, library: Library, file_columns: list[Columns], base: Path, index_dir: Path | None) -> None:
        texts: list[tuple[Path, Columns]] = []
        with progress_bar("opening sequence files", len(self.files)) as advance:
            for path, columns in self.files:
                if suffix_of(path) in TEXT_SUFFIXES and not starts_with(path, b">"):
                    texts.append((path, columns))
                else:
                    store = open_sequences(path, index_dir)
                    library.add(store, [_relative(path, base)] * len(store.names))
                    file_columns += [columns] * len(store.names)
                advance(1)
        if texts:
            with progress_bar("reading sequences", len(texts)) as advance:

                def records() -> Iterator[tuple[str, bytes]]:
                    for path, _ in texts:
                        yield _relative(path, base), read_text_sequence(path)
                        advance(1)

                library.add(Sequences.from_records(records()), [_relative(path, base) for path, _ in texts])
            file_columns += [columns for _, columns in texts]

    def _with_rows(self, library: Library, file_columns: list[Columns]) -> list[Columns]:
        if self.rows is None:
            return list(file_columns)
        table = self.layout.labels_table
        unknown = self.rows.keys() - set(library.names)
        if unknown:
            raise UserError(
                f"{table} names the record {min(unknown)!r}, which the sequences do not have "
                f"({len(unknown)} such): correct column {self.layout.record_column!r}"
            )
        empty: Columns = {}
        return [
            {**columns, **self.rows.get(name, empty)} for name, columns in zip(library.names, file_columns, strict=True)
        ]

    def _interval_regions(self, library: Library, record_columns: list[Columns]) -> Regions:
        assert self.intervals is not None
        number = {name: i for i, name in enumerate(library.names)}
        records, columns = [], []
        for name, _, end_bp, own, line in self.intervals:
            if name not in number:
                raise UserError(f"{self.layout.path} line {line}: {name!r} is no record of {self.layout.fasta}")
            record = number[name]
            if end_bp > library.lengths[record]:
                raise UserError(
                    f"{self.layout.path} line {line}: the interval ends at {end_bp}, outside of {name!r} "
                    f"({library.lengths[record]} bp): use coordinates of {self.layout.fasta}"
                )
            records.append(record)
            columns.append({**record_columns[record], **own})
        starts, ends = np.array([(i.start_bp, i.end_bp) for i in self.intervals], np.int64).T
        minus = np.array([interval.columns.get(STRAND) == "-" for interval in self.intervals])
        return _regions(library, np.array(records), starts, ends, columns, minus)


def _relative(path: Path, base: Path) -> str:
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def list_sources(layout: Layout) -> Listing:
    """Recognise the layout and read its tables; raises UserError for one that is none of those above."""
    listing = Listing(layout)
    path = layout.path
    if not path.exists():
        raise UserError(f"{path} does not exist: set path to a table, a sequence file, a BED file or a folder")
    if path.is_dir():
        _list_folder(listing, path)
    elif suffix_of(path) == ".bed":
        if layout.fasta is None:
            raise UserError(f"{path} is a BED file: set fasta to the sequences it refers to")
        listing.intervals = read_bed(path, layout.bed_columns)
        if layout.bed_columns is None:
            _name_fourth_column(listing.intervals, layout)
        listing.files.append((layout.fasta, {}))
    else:
        _list_file(listing, path, {})
    if layout.labels_table is not None:
        table = read_table(layout.labels_table)
        listing.rows = {}
        for name, row in zip(table.column(layout.record_column, "record_column"), table.records(), strict=True):
            if name in listing.rows:
                raise UserError(f"{table.path} names the record {name!r} twice")
            listing.rows[name] = row
    return listing


def _name_fourth_column(intervals: list[Interval], layout: Layout) -> None:
    """Without names for them, a fourth column of split names is the split (Enformer's intervals), any other a label."""
    values = {interval.columns.get(BED_FOURTH, "") for interval in intervals}
    name = layout.split_column if all(value.lower() in SPLIT_NAMES for value in values) else layout.label_column
    for interval in intervals:
        if BED_FOURTH in interval.columns:
            interval.columns[name] = interval.columns.pop(BED_FOURTH)


def _list_file(listing: Listing, path: Path, columns: Columns) -> None:
    layout = listing.layout
    if suffix_of(path) in BIOPYTHON_FORMATS or starts_with(path, b">"):
        listing.files.append((path, columns))
        return
    if suffix_of(path) in FASTA_SUFFIXES:
        raise UserError(f"{path} is not FASTA: it does not start with '>'")
    table = read_table(path)
    if layout.sequence_column in table.columns:
        listing.tables.append((table, columns))
    elif layout.path_column in table.columns:
        listing.samples_are_files = True
        for line, row in zip(table.lines, table.records(), strict=True):
            if not row[layout.path_column]:
                raise UserError(f"{path} line {line}: the column {layout.path_column!r} is empty: name a file in it")
            listing.files.append((path.parent / row[layout.path_column], {**columns, **row}))
        _refuse_repeats(path, [file for file, _ in listing.files])
    else:
        raise UserError(
            f"{path} has neither a column {layout.sequence_column!r} nor {layout.path_column!r} "
            f"(it has {', '.join(table.columns)}): set sequence_column or path_column"
        )


def _refuse_repeats(table: Path, files: list[Path]) -> None:
    seen: set[Path] = set()
    for file in files:
        if file in seen:
            raise UserError(f"{table} names the file {file.name!r} twice")
        seen.add(file)


def _list_folder(listing: Listing, folder: Path) -> None:
    layout = listing.layout
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and _stem(entry).lower() in SPLIT_NAMES]
    folders = [entry for entry in entries if entry.is_dir()]
    if files:
        for file in files:
            _list_file(listing, file, {layout.split_column: split_name(_stem(file), str(folder))})
    elif folders and all(entry.name.lower() in SPLIT_NAMES for entry in folders):
        for entry in folders:
            _list_classes(listing, entry, {layout.split_column: split_name(entry.name, str(folder))})
    else:
        _list_classes(listing, folder, {})
    if not (listing.files or listing.tables):
        raise UserError(
            f"{folder} has neither train/dev/test files nor class folders with sequence files "
            f"({', '.join((*SEQUENCE_SUFFIXES, *TEXT_SUFFIXES))}, also .gz)"
        )


def _list_classes(listing: Listing, folder: Path, columns: Columns) -> None:
    listing.samples_are_files = True
    for entry in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        files = sorted(f for f in entry.iterdir() if suffix_of(f) in (*SEQUENCE_SUFFIXES, *TEXT_SUFFIXES))
        for file in files:
            listing.files.append((file, {**columns, listing.layout.label_column: entry.name}))


def _stem(path: Path) -> str:
    suffix = suffix_of(path)
    known = (*TABLE_SUFFIXES, *SEQUENCE_SUFFIXES, *TEXT_SUFFIXES)
    return path.name[: path.name.lower().rfind(suffix)] if suffix in known else path.name


def _table_records(table: Table, layout: Layout) -> tuple[list[str], list[bytes]]:
    sequences = []
    for line, cell in zip(table.lines, table.column(layout.sequence_column, "sequence_column"), strict=True):
        letters = cell.encode()
        if not letters:
            raise UserError(f"{table.path} line {line} has an empty sequence")
        check_letters(letters, f"{table.path} line {line}")
        sequences.append(letters)
    return [f"{table.path.name}:{line}" for line in table.lines], sequences


def _add_pattern_columns(library: Library, record_columns: list[Columns], pattern: str) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"record_pattern {pattern!r} is not a regular expression: {error}") from error
    if not compiled.groupindex:
        raise UserError(f"record_pattern {pattern!r} has no named group (?P<column>...)")
    for i, name in enumerate(library.names):
        match = compiled.search(name)
        if match is None:
            raise UserError(f"record_pattern {pattern!r} does not match the record {name!r} of {library.files[i]}")
        record_columns[i] = {**record_columns[i], **{k: v or "" for k, v in match.groupdict().items()}}


def _regions(
    library: Library,
    record: np.ndarray,
    start_bp: np.ndarray,
    end_bp: np.ndarray,
    columns: list[Columns],
    minus: np.ndarray,
) -> Regions:
    named = {name: [row.get(name, "") for row in columns] for name in {name for row in columns for name in row}}
    named["record"] = [library.names[r] for r in record]
    named["file"] = [library.files[r] for r in record]
    arrays = {name: np.array(values, dtype=object) for name, values in named.items()}
    return Regions(record.astype(np.int64), start_bp.astype(np.int64), end_bp.astype(np.int64), arrays, minus)
