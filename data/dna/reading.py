"""Sequence and table files to Python values, in bounded memory, with one clear error for each kind of bad file."""

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from seqssm.data.dna.alphabet import IUPAC_LETTERS
from seqssm.errors import UserError

BLOCK_BYTES = 1 << 23
LONGEST_HEADER_BYTES = 1 << 20
BED_FOURTH = "column 4"
STRAND = "strand"
STRANDS = ("+", "-", ".")
SPACE = b" \t\r\n\v\f"
FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".fas", ".fsa")
TABLE_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIXES = (".txt", ".seq")
OTHER_COMPRESSION = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
BIOPYTHON_FORMATS = {".gb": "genbank", ".gbk": "genbank", ".gbff": "genbank", ".embl": "embl", ".2bit": "twobit"}


def suffix_of(path: Path) -> str:
    """The file's suffix in lower case, that of a compressed file being the one inside."""
    name = path.name.lower()
    for compressed in (".gz", ".bgz", ".bgzf"):
        name = name.removesuffix(compressed)
    return Path(name).suffix


@contextmanager
def open_bytes(path: Path, on_read: Callable[[int], None] | None = None) -> Iterator[BinaryIO]:
    """Open a file or a pipe, plain, gzip or bgzip by its first bytes; `on_read` is told of each block's bytes on disk.

    Raises UserError, also while the caller reads, when the file is missing, empty, truncated or corrupt.
    """
    try:
        with open(path, "rb") as raw:
            magic = raw.peek(2)[:2]  # a pipe cannot be read from its beginning again
            if not magic:
                raise UserError(f"{path} is empty: give a file with sequences")
            _refuse_other_compression(path, raw.peek(6))
            if raw.seekable() and _is_truncated_bgzip(raw):
                raise UserError(f"{path} is a truncated bgzip file: fetch or compress it again")
            stream: BinaryIO = io.BufferedReader(_Counted(raw, on_read), 1 << 20) if on_read else raw
            yield gzip.GzipFile(fileobj=stream) if magic == b"\x1f\x8b" else stream  # type: ignore[misc]
    except EOFError as error:
        raise UserError(f"{path} is a truncated gzip file: fetch or compress it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a corrupt gzip file ({error}): fetch or compress it again") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder where a file is needed") from error
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: no permission") from error
    except OSError as error:  # a socket, links in a circle, a disk that fails
        raise UserError(f"{path} cannot be read: {error.strerror or error}; give a file") from error


def _refuse_other_compression(path: Path, head: bytes) -> None:
    for magic, name in OTHER_COMPRESSION.items():
        if head.startswith(magic):
            raise UserError(f"{path} is compressed by {name}: decompress it, or compress it with gzip or bgzip")


def _is_truncated_bgzip(raw: BinaryIO) -> bool:
    """A bgzip file cut between two blocks is whole gzip; only the missing end block of 28 bytes tells."""
    head = raw.read(16)
    raw.seek(0)
    if head[:4] != b"\x1f\x8b\x08\x04" or head[12:16] != b"BC\x02\x00":
        return False
    raw.seek(-28, io.SEEK_END)
    end = raw.read()
    raw.seek(0)
    return end != bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


class _Counted(io.RawIOBase):
    """A raw stream that reports how many bytes each read took."""

    def __init__(self, raw: BinaryIO, on_read: Callable[[int], None]) -> None:
        self._raw, self._on_read = raw, on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        count = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._on_read(count)
        return count


class Piece(NamedTuple):
    """A run of letters of one record; a record's first piece carries its name, the others None."""

    name: str | None
    letters: bytes


def sequence_pieces(path: Path, on_read: Callable[[int], None] | None = None) -> Iterator[Piece]:
    """Stream a sequence file: FASTA by blocks of a few MB, GenBank, EMBL and 2bit through Biopython by record.

    Biopython's FASTA parser holds a whole record; a plant chromosome is gigabases, hence the block reader.
    Raises UserError for anything but named, non-empty records with unique names and IUPAC letters.
    """
    biopython_format = BIOPYTHON_FORMATS.get(suffix_of(path))
    if biopython_format is None:
        pieces = _fasta_pieces(path, on_read)
    else:
        pieces = _biopython_pieces(path, biopython_format)
    names: set[str] = set()
    name, length = "", 0
    for piece in pieces:
        if piece.name is not None:
            if names and not length:
                raise UserError(f"{path}: record {name!r} has no sequence: remove it or complete the file")
            name, length = piece.name, 0
            if name in names:
                raise UserError(f"{path}: record name {name!r} stands twice: names must be unique in a file")
            names.add(name)
        check_letters(piece.letters, f"{path}: record {name!r}", length)
        length += len(piece.letters)
        yield piece
    if not names:
        raise UserError(f"{path} has no records: give a file with sequences")
    if not length:
        raise UserError(f"{path}: record {name!r} has no sequence: remove it or complete the file")


def check_letters(letters: bytes, where: str, offset: int = 0) -> None:
    """Raise UserError naming `where` and the 1-based position of the first letter outside the IUPAC code."""
    bad = letters.translate(None, IUPAC_LETTERS)
    if bad:
        at = offset + letters.index(bad[:1]) + 1
        raise UserError(
            f"{where} has {chr(bad[0])!r} at position {at}, which is no IUPAC nucleotide letter: "
            "remove gaps and other symbols (proteins are not read)"
        )


def _fasta_pieces(path: Path, on_read: Callable[[int], None] | None) -> Iterator[Piece]:
    with open_bytes(path, on_read) as stream:
        block = stream.read(BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip(SPACE)
        if not block:
            raise UserError(f"{path} is empty: give a file with sequences")
        if block[:1] != b">":
            raise UserError(f"{path} is not FASTA: it starts with {block[:1].decode('latin-1')!r} instead of '>'")
        header: bytes | None = None  # the header line read so far, or None inside a sequence
        line_start = True
        while block:
            at = 0
            while at < len(block):
                if header is not None:
                    end = block.find(b"\n", at)
                    header += block[at:] if end < 0 else block[at:end]
                    if len(header) > LONGEST_HEADER_BYTES:
                        raise UserError(f"{path} is not FASTA: a header line is longer than a megabyte")
                    if end < 0:
                        break
                    yield Piece(_record_name(header, path), b"")
                    header, at, line_start = None, end + 1, True
                elif line_start and block[at : at + 1] == b">":
                    header, at = b"", at + 1
                else:
                    end = block.find(b"\n>", at)
                    letters = (block[at:] if end < 0 else block[at:end]).translate(None, SPACE)
                    if letters:
                        yield Piece(None, letters)
                    if end < 0:
                        line_start = block.endswith(b"\n")
                        break
                    header, at = b"", end + 2
            block = stream.read(BLOCK_BYTES)
        if header is not None:
            yield Piece(_record_name(header, path), b"")


def _record_name(header: bytes, path: Path) -> str:
    words = header.split(maxsplit=1)
    if b"\r" in header.rstrip(b"\r"):
        raise UserError(
            f"{path} has the line ends of old Macs (\\r alone): convert it with `mac2unix`, or tr '\\r' '\\n'"
        )
    if not words:
        raise UserError(f"{path}: a header line '>' has no name: name every record")
    return words[0].decode("utf-8", "replace")


def _biopython_pieces(path: Path, biopython_format: str) -> Iterator[Piece]:
    from Bio import SeqIO
    from Bio.Seq import UndefinedSequenceError

    with open_bytes(path) as stream:
        handle = stream if biopython_format == "twobit" else io.TextIOWrapper(stream, "utf-8", "replace")
        try:
            for record in SeqIO.parse(handle, biopython_format):
                yield Piece(record.id, b"")
                yield Piece(None, bytes(record.seq))
        except UndefinedSequenceError as error:
            raise UserError(f"{path}: record {record.id!r} has no sequence: remove it or complete the file") from error
        except ValueError as error:
            raise UserError(f"{path} is not a {biopython_format} file: {error}") from error


def read_text_sequence(path: Path) -> bytes:
    """The letters of a file that holds one bare sequence, white space removed."""
    with open_bytes(path) as stream:
        letters = stream.read().translate(None, SPACE)
    if not letters:
        raise UserError(f"{path} is empty: give a file with a sequence")
    check_letters(letters, str(path))
    return letters


def starts_with(path: Path, mark: bytes) -> bool:
    """Whether the file's text, uncompressed and without leading white space, starts with `mark`."""
    with open_bytes(path) as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip(SPACE).startswith(mark)


@dataclass
class Table:
    """A CSV or TSV file with a header line: `rows` are the cells, `lines` each row's line number in the file."""

    path: Path
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str, option: str) -> list[str]:
        """The cells of one column; raises UserError naming the option that says which column it is."""
        if name not in self.columns:
            raise UserError(f"{self.path} has no column {name!r} (it has {', '.join(self.columns)}): set {option}")
        at = self.columns.index(name)
        return [row[at] for row in self.rows]

    def records(self) -> Iterator[dict[str, str]]:
        """Each row as a dictionary."""
        for row in self.rows:
            yield dict(zip(self.columns, row, strict=True))


def read_table(path: Path) -> Table:
    """Read a comma- or tab-separated file (also gzip) whose first line names the columns."""
    csv.field_size_limit(min(sys.maxsize, 1 << 62))  # the default refuses sequences beyond 128 kb
    with open_bytes(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        try:
            header = text.readline().rstrip("\r\n")
            if not header.strip():
                raise UserError(f"{path} has no header line: name its columns in the first line")
            delimiter = "\t" if "\t" in header else ","
            columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
            if len(set(columns)) < len(columns):
                raise UserError(f"{path} names a column twice ({', '.join(columns)})")
            rows, lines = [], []
            reader = csv.reader(text, delimiter=delimiter)
            for row in reader:
                if not any(row):
                    continue
                if len(row) != len(columns):
                    raise UserError(
                        f"{path} line {reader.line_num + 1} has {len(row)} cells where the header has {len(columns)}"
                    )
                rows.append([cell.strip() for cell in row])
                lines.append(reader.line_num + 1)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not a text table: it has bytes that are not UTF-8") from error
        except csv.Error as error:
            raise UserError(f"{path} is not a table: {error}") from error
    if not rows:
        raise UserError(f"{path} has a header but no rows")
    return Table(path, columns, rows, lines)


class Interval(NamedTuple):
    """One line of a BED file: 0-based, half-open."""

    record: str
    start_bp: int
    end_bp: int
    columns: dict[str, str]
    line: int


def read_bed(path: Path, names: Sequence[str] | None) -> list[Interval]:
    """Read a BED file; `names` names the columns after chrom, start and end (all of them or the first few).

    A header line that starts with `chrom` or `#chrom` names them itself; with neither, the fourth column, where there
    is one, is called `BED_FOURTH`, and the sixth `strand` where it is one. Raises UserError at a malformed line.
    """
    intervals = []
    with open_bytes(path) as stream:
        for number, line in enumerate(io.TextIOWrapper(stream, "utf-8", "replace"), start=1):
            cells = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            if not cells or not cells[0]:
                continue
            if cells[0].lower() in ("chrom", "#chrom"):
                names = cells[3:] if names is None else names
                continue
            if cells[0].startswith("#") or cells[0] in ("track", "browser"):
                continue
            try:
                start_bp, end_bp = int(cells[1]), int(cells[2])
            except (IndexError, ValueError) as error:
                raise UserError(f"{path} line {number} is not BED: it needs chrom, start and end") from error
            if not 0 <= start_bp < end_bp:
                raise UserError(f"{path} line {number}: start {start_bp} and end {end_bp} are not an interval")
            if len(cells) - 3 < len(names or ()):
                raise UserError(
                    f"{path} line {number} has {len(cells)} columns where chrom, start, end, "
                    f"{', '.join(names or ())} are expected: set bed_columns"
                )
            columns = dict(zip([BED_FOURTH] if names is None else names, cells[3:], strict=False))
            if names is None and len(cells) > 5 and cells[5] in STRANDS:
                columns[STRAND] = cells[5]
            if columns.get(STRAND, ".") not in STRANDS:
                raise UserError(f"{path} line {number}: the strand {columns[STRAND]!r} is none of {' '.join(STRANDS)}")
            intervals.append(Interval(cells[0], start_bp, end_bp, columns, number))
    if not intervals:
        raise UserError(f"{path} has no intervals")
    return intervals
