"""A sequence file as a memory map of one byte a base, built once and found again by the file's checksum.

Index file: the letters of all records end to end, case preserved; then an npz archive of the tables (names, offsets,
runs of N); then the archive's position (8 bytes) and a magic word. One file, written beside its final name and
renamed, so that readers see all of it or nothing and two builders at once cost time only.
"""

import errno
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from seqssm.data.dna.alphabet import ENCODE, N
from seqssm.data.dna.reading import Piece, sequence_pieces
from seqssm.data.progress import progress_bar
from seqssm.errors import UserError

MAGIC = b"seqssm-dna-1\0\0\0\0"
STALE_SECONDS = 24 * 3600
_IS_N = ENCODE >= N


def default_index_dir() -> Path:
    """`$XDG_CACHE_HOME/seqssm/dna`, or `~/.cache/seqssm/dna`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqssm" / "dna"


class Sequences:
    """The records of one source: random access to tokens, and counts of N without reading a base.

    Attributes: `names` (list of str), `lengths` (r,) int64 in bases.
    """

    def __init__(self, letters: np.ndarray | Path, tables: "_Tables") -> None:
        self._letters = letters
        self._map: np.ndarray | None = letters if isinstance(letters, np.ndarray) else None
        self._tables = tables
        self.names: list[str] = tables.names
        self.offsets = np.concatenate([[0], np.cumsum(tables.lengths)]).astype(np.int64)
        self.lengths = np.asarray(tables.lengths, np.int64)
        self._run_starts, self._run_ends = tables.runs()
        self._run_total = np.concatenate([[0], np.cumsum(self._run_ends - self._run_starts)])

    @classmethod
    def from_records(cls, records: Iterable[tuple[str, bytes]]) -> "Sequences":
        """Hold named sequences in memory; the letters must have been checked."""
        letters, tables = io.BytesIO(), _Tables()
        for name, sequence in records:
            tables.add(Piece(name, sequence))
            letters.write(sequence)
        return cls(np.frombuffer(letters.getvalue(), np.uint8), tables)

    @classmethod
    def from_index(cls, path: Path) -> "Sequences":
        """Open an index file; the bases stay on disk. Raises ValueError when the file is incomplete."""
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - 8 - len(MAGIC), 0))
            trailer = file.read()
            if trailer[8:] != MAGIC:
                raise ValueError(f"{path} is not a complete index")
            file.seek(int.from_bytes(trailer[:8], "little"))
            return cls(path, _Tables.load(file.read()[: -len(trailer)]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": self._map if isinstance(self._letters, np.ndarray) else None}

    def letters(self, record: int, start_bp: int, end_bp: int) -> np.ndarray:
        """Letters (end_bp - start_bp,) uint8 as in the file, case preserved; a view."""
        offset = int(self.offsets[record])
        return self._all_letters()[offset + start_bp : offset + end_bp]

    def _all_letters(self) -> np.ndarray:
        if self._map is None:  # opened where it is used: a memory map would travel to a worker as a copy
            assert isinstance(self._letters, Path)
            self._map = np.memmap(self._letters, np.uint8, "r", shape=(int(self.offsets[-1]),))
        return self._map

    def tokens(self, record: int, start_bp: int, end_bp: int) -> np.ndarray:
        """Tokens (end_bp - start_bp,) uint8."""
        return ENCODE[self.letters(record, start_bp, end_bp)]

    def token_rows(self, record: np.ndarray, start_bp: np.ndarray, length: int) -> np.ndarray:
        """Tokens (w,length) uint8 of stretches of equal length."""
        begin = self.offsets[record] + start_bp
        return ENCODE[self._all_letters()[begin[:, None] + np.arange(length)]]

    def n_count(self, record: np.ndarray, start_bp: np.ndarray, end_bp: np.ndarray) -> np.ndarray:
        """How many bases of each interval are N (or another ambiguous letter): (w,) int64."""
        offset = self.offsets[record]
        return self._n_before(offset + end_bp) - self._n_before(offset + start_bp)

    def _n_before(self, position: np.ndarray) -> np.ndarray:
        if not len(self._run_starts):
            return np.zeros(position.shape, np.int64)
        run = np.searchsorted(self._run_starts, position)  # runs that begin before the position
        past_end = np.maximum(self._run_ends[np.maximum(run - 1, 0)] - position, 0) * (run > 0)
        return self._run_total[run] - past_end


class _Tables:
    """What an index knows of its letters: record names and lengths, runs of N in coordinates of the whole file."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.lengths: list[int] = []
        self._edges: list[np.ndarray] = []
        self._total = 0

    def add(self, piece: Piece) -> None:
        """Take in the next letters of the last record, or of a new one when the piece is named."""
        if piece.name is not None:
            self.names.append(piece.name)
            self.lengths.append(0)
        if not piece.letters:
            return
        is_n = _IS_N[np.frombuffer(piece.letters, np.uint8)]
        if is_n.any():
            self._edges.append(np.flatnonzero(np.diff(is_n, prepend=False, append=False)) + self._total)
        self._total += len(piece.letters)
        self.lengths[-1] += len(piece.letters)

    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the runs of N, in order; a run may be cut in two that touch."""
        edges = np.concatenate(self._edges) if self._edges else np.zeros(0, np.int64)
        return edges[::2], edges[1::2]

    def dump(self) -> bytes:
        buffer = io.BytesIO()
        names = np.frombuffer("\n".join(self.names).encode(), np.uint8)
        edges = np.concatenate(self._edges) if self._edges else np.zeros(0, np.int64)
        np.savez(buffer, names=names, lengths=np.array(self.lengths, np.int64), edges=edges)
        return buffer.getvalue()

    @classmethod
    def load(cls, archive: bytes) -> "_Tables":
        tables = cls()
        with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
            tables.names = arrays["names"].tobytes().decode().split("\n")
            tables.lengths = arrays["lengths"].tolist()
            tables._edges = [arrays["edges"]]
        return tables


def open_sequences(path: Path, index_dir: Path | None = None) -> Sequences:
    """The records of a sequence file through its index, which is built first where there is none.

    `index_dir` defaults to `default_index_dir()`. Raises UserError for a bad file (`reading.sequence_pieces`) and for
    a folder that cannot take the index; nothing half-written stays.
    """
    folder = default_index_dir() if index_dir is None else Path(index_dir)
    index = folder / f"{checksum(path)}.index"
    try:
        return Sequences.from_index(index)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last after a power cut
        _build(path, index)
        return Sequences.from_index(index)
    except PermissionError as error:
        raise UserError(f"cannot read the sequence index {index}: no permission; set index_dir") from error


def checksum(path: Path) -> str:
    """BLAKE2b of the file's bytes, 128 bits in hex."""
    digest = hashlib.blake2b(MAGIC, digest_size=16)
    try:
        with open(path, "rb") as file, progress_bar(f"checking {path.name}", os.path.getsize(path)) as advance:
            while block := file.read(1 << 22):
                digest.update(block)
                advance(len(block))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _build(path: Path, index: Path) -> None:
    with _new_file(index) as file, progress_bar(f"indexing {path.name}", os.path.getsize(path)) as advance:
        tables = _Tables()
        for piece in sequence_pieces(path, advance):
            tables.add(piece)
            file.write(piece.letters)
        position = file.tell()
        file.write(tables.dump() + position.to_bytes(8, "little") + MAGIC)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name beside its own, renamed when complete and removed on any failure."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(".*.tmp"):  # left by a killed process
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                stale.unlink(missing_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)  # a shared cache: mkstemp lets only its maker read
        os.replace(temporary, path)
        temporary = ""
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "no space is left" if full else error.strerror
        raise UserError(
            f"cannot write the sequence index in {path.parent}: {reason}; set index_dir to a folder with a byte of "
            "space for each base"
        ) from error
    finally:
        if temporary:
            os.unlink(temporary)
