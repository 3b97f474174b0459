"""Windows of a sequence file for prediction, streamed: no index, no labels, memory for a window and a block."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from seqssm.data.dna.alphabet import ENCODE, N, encode
from seqssm.data.dna.reading import TEXT_SUFFIXES, Piece, read_text_sequence, sequence_pieces, starts_with, suffix_of
from seqssm.data.dna.sampling import DNABatch, Sample, collate
from seqssm.errors import UserError


class FastaWindow(NamedTuple):
    """Bases start_bp to end_bp (0-based, exclusive) of a record, as tokens (l,) uint8."""

    record: str
    start_bp: int
    end_bp: int
    tokens: np.ndarray

    @property
    def n_fraction(self) -> float:
        """Share of N: at 1.0 a prediction says nothing about the window."""
        return float((self.tokens == N).mean())


class FastaWindows(IterableDataset[FastaWindow]):
    """Windows that cover every record of a sequence file, in order.

    A record shorter than `window_bp` is one window as it is. In a longer one, windows begin every `stride_bp`
    (default: a window); where the last one would stop short of the end, one more is placed to end there, so that it
    is a full window too and overlaps the one before. `window_bp` None takes records whole.

    The file (plain, gzip or bgzip FASTA, GenBank, EMBL, 2bit, or one bare sequence in .txt) is read once, as it goes:
    raises UserError where the reader meets bad input, as `reading.sequence_pieces` does. `on_read` is told how many
    bytes on disk each read took. Loader workers share the windows out.
    """

    def __init__(
        self,
        path: str | Path,
        window_bp: int | None = None,
        stride_bp: int | None = None,
        *,
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        if window_bp is not None and window_bp < 1:
            raise UserError(f"window_bp is {window_bp}: it must be at least 1")
        if stride_bp is not None and stride_bp < 1:
            raise UserError(f"stride_bp is {stride_bp}: it must be at least 1")
        self.path = Path(path)
        self.window_bp = window_bp
        self.stride_bp = stride_bp or window_bp
        self.on_read = on_read

    def __iter__(self) -> Iterator[FastaWindow]:
        worker = get_worker_info()
        return islice(self._windows(), worker.id, None, worker.num_workers) if worker else self._windows()

    def _pieces(self) -> Iterator[Piece]:
        if suffix_of(self.path) in TEXT_SUFFIXES and not starts_with(self.path, b">"):
            return iter([Piece(self.path.name, read_text_sequence(self.path))])
        return sequence_pieces(self.path, self.on_read)

    def _windows(self) -> Iterator[FastaWindow]:
        cutter = None
        for piece in self._pieces():
            if piece.name is not None:
                if cutter is not None:
                    yield from cutter.finish()
                cutter = _Cutter(piece.name, self.window_bp, self.stride_bp)
            assert cutter is not None  # a file's first piece is named
            yield from cutter.push(piece.letters)
        if cutter is not None:
            yield from cutter.finish()


class _Cutter:
    """Cuts one record, given in pieces, into windows; holds a window and a piece at most."""

    def __init__(self, record: str, window_bp: int | None, stride_bp: int | None) -> None:
        self.record, self.window_bp, self.stride_bp = record, window_bp, stride_bp
        self.buffer = bytearray()
        self.buffer_start_bp = 0
        self.next_start_bp = 0
        self.covered_bp = 0

    def _window(self, start_bp: int, end_bp: int) -> FastaWindow:
        letters = self.buffer[start_bp - self.buffer_start_bp : end_bp - self.buffer_start_bp]
        return FastaWindow(self.record, start_bp, end_bp, ENCODE[np.frombuffer(bytes(letters), np.uint8)])

    def push(self, letters: bytes) -> Iterator[FastaWindow]:
        self.buffer += letters
        if self.window_bp is None or self.stride_bp is None:
            return
        length_bp = self.buffer_start_bp + len(self.buffer)
        while self.next_start_bp + self.window_bp <= length_bp:
            self.covered_bp = self.next_start_bp + self.window_bp
            yield self._window(self.next_start_bp, self.covered_bp)
            self.next_start_bp += self.stride_bp
        keep_from = max(min(self.next_start_bp, length_bp - self.window_bp), self.buffer_start_bp)
        del self.buffer[: keep_from - self.buffer_start_bp]
        self.buffer_start_bp = keep_from

    def finish(self) -> Iterator[FastaWindow]:
        length_bp = self.buffer_start_bp + len(self.buffer)
        if max(self.covered_bp, self.next_start_bp) < length_bp:
            start_bp = 0 if self.window_bp is None else max(length_bp - self.window_bp, 0)
            yield self._window(start_bp, length_bp)


def window_batches(windows: Iterable[FastaWindow], batch_size: int) -> Iterator[tuple[list[FastaWindow], DNABatch]]:
    """Groups of windows in order, each with its batch; the labels of the batch are -1.

    Raises:
        UserError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    iterator = iter(windows)
    while group := list(islice(iterator, batch_size)):
        yield group, collate([Sample(window.tokens, -1, False) for window in group])


def is_sequence(text: str) -> bool:
    """Whether a text is one of IUPAC letters alone."""
    try:
        return len(encode(text)) > 0
    except ValueError:
        return False


def sequence_windows(sequences: Iterable[str]) -> Iterator[FastaWindow]:
    """Sequences as windows, each whole, called ``sequence 1`` and so on.

    Raises:
        UserError: one is empty, no text, or holds other letters than IUPAC's.
    """
    for i, text in enumerate(sequences, 1):
        if not isinstance(text, str):
            raise UserError(f"sequence {i} is no text but a {type(text).__name__}: give a str of IUPAC letters")
        try:
            tokens = encode(text)
        except ValueError as error:
            raise UserError(f"sequence {i}: {error}") from error
        if not len(tokens):
            raise UserError(f"sequence {i} is empty")
        yield FastaWindow(f"sequence {i}", 0, len(tokens), tokens)
