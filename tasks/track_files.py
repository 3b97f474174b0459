"""Rows along chromosomes as files: TSV, bedGraph, BED, and embeddings as .npy or zarr."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, Any

import numpy as np

from seqssm.data.dna.indexing import Sequences
from seqssm.errors import UserError
from seqssm.tasks.tracks import Rows

ZARR_CHUNK_BYTES = 1 << 24


class TextFile:
    """Lines that a killed process wrote can be cut off again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115 - closed by close()

    def add(self, lines: list[str]) -> None:
        if lines:
            try:
                self._file.write(("\n".join(lines) + "\n").encode())
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}; free space, then run again") from error

    def mark(self) -> int:
        self._file.flush()
        return self._file.tell()

    def rewind(self, mark: int) -> None:
        self._file.flush()
        if self.path.stat().st_size < mark:
            raise UserError(f"{self.path} has lost what was written to it; delete {self.path.parent} to start again")
        os.truncate(self.path, mark)
        self._file.seek(mark)

    def close(self) -> None:
        self._file.close()


class ProbabilityTable:
    """PREFIX.tsv: a line for each row, with NA for one of nothing but N."""

    def __init__(self, folder: Path, labels: list[str]) -> None:
        self.labels = labels
        self.files = {".tsv": TextFile(folder / "tracks.tsv")}

    def write(self, rows: Rows) -> None:
        assert rows.probabilities is not None
        file = self.files[".tsv"]
        if rows.first == 0:
            file.add(["\t".join(["record", "start_bp", "end_bp", "label", *self.labels])])
        missing = "\t".join(["NA"] * (len(self.labels) + 1))
        best = rows.probabilities.argmax(1).tolist()
        cells = zip(rows.start_bp.tolist(), rows.end_bp.tolist(), rows.empty.tolist(), best, strict=True)
        form = "\t".join(["%.4f"] * len(self.labels))
        file.add(
            [
                f"{rows.record}\t{start}\t{end}\t{missing if empty else self.labels[top] + chr(9) + form % tuple(p)}"
                for (start, end, empty, top), p in zip(cells, rows.probabilities.tolist(), strict=True)
            ]
        )

    def mark(self) -> Any:
        return self.files[".tsv"].mark()

    def rewind(self, mark: Any) -> None:
        self.files[".tsv"].rewind(mark)


class BedGraphs:
    """PREFIX.LABEL.bedgraph for each class: its probability, rows of nothing but N left out.

    Without a header, as the tools that make bigWig of it want it.
    """

    def __init__(self, folder: Path, labels: list[str]) -> None:
        names = [re.sub(r"[^\w.+-]+", "_", label) for label in labels]
        if len(set(names)) < len(names):
            raise UserError(f"the classes {', '.join(labels)} do not give files of different names")
        self.files = {f".{n}.bedgraph": TextFile(folder / f"{n}.bedgraph") for n in names}

    def write(self, rows: Rows) -> None:
        assert rows.probabilities is not None
        kept = np.flatnonzero(~rows.empty)
        starts, ends = rows.start_bp[kept].tolist(), rows.end_bp[kept].tolist()
        for file, values in zip(self.files.values(), rows.probabilities[kept].T.tolist(), strict=True):
            file.add([f"{rows.record}\t{a}\t{b}\t{v:.4f}" for a, b, v in zip(starts, ends, values, strict=True)])

    def mark(self) -> Any:
        return [file.mark() for file in self.files.values()]

    def rewind(self, mark: Any) -> None:
        for file, position in zip(self.files.values(), mark, strict=True):
            file.rewind(position)


class Stretches:
    """PREFIX.bed: neighbouring rows with one most probable class as one line, scored 1000 x its mean probability."""

    def __init__(self, folder: Path, labels: list[str]) -> None:
        self.labels = labels
        self.files = {".bed": TextFile(folder / "tracks.bed")}
        self._open: tuple[str, int, int, int, float] | None = None  # record, start, end, label, sum of p · bases

    def write(self, rows: Rows) -> None:
        assert rows.probabilities is not None
        best = np.where(rows.empty, -1, rows.probabilities.argmax(1))
        weight = np.where(rows.empty, 0, rows.probabilities.max(1)) * (rows.end_bp - rows.start_bp)
        edges = np.flatnonzero(np.diff(best, prepend=best[0] - 1))
        lines: list[str] = []
        for first, last in zip(edges.tolist(), [*edges[1:].tolist(), len(best)], strict=True):
            start, end, label = int(rows.start_bp[first]), int(rows.end_bp[last - 1]), int(best[first])
            total = float(weight[first:last].sum())
            if self._open is not None:
                record, begin, stop, before, sum_before = self._open
                if (record, stop, before) == (rows.record, start, label):
                    start, total = begin, sum_before + total
                else:
                    lines += self._line()
            self._open = (rows.record, start, end, label, total)
        self.files[".bed"].add(lines)

    def _line(self) -> list[str]:
        if self._open is None or self._open[3] < 0:
            return []
        record, start, end, label, total = self._open
        return [f"{record}\t{start}\t{end}\t{self.labels[label]}\t{round(1000 * total / (end - start))}"]

    def mark(self) -> Any:
        return {"bytes": self.files[".bed"].mark(), "open": self._open}

    def rewind(self, mark: Any) -> None:
        self._open = None if mark["open"] is None else tuple(mark["open"])
        self.files[".bed"].rewind(mark["bytes"])

    def finish(self) -> None:
        """Write the last stretch."""
        self.files[".bed"].add(self._line())
        self._open = None


class EmbeddingFile:
    """All rows' embeddings as one array (rows, d), and beside it a table of where each record's rows are.

    Args:
        path: .npy, or .zarr (a version 3 array that has the table in its attributes, too).
        folder: where the file grows.
        sequences: all records.
        bins: (r,) rows of each record.
        bin_bp: bases a row.
        width: d.
        dtype: ``float16`` or ``float32``.

    Raises:
        UserError: of another kind, there already (a zarr folder), or zarr is not installed.
    """

    def __init__(
        self, path: Path, folder: Path, sequences: Sequences, bins: np.ndarray, bin_bp: int, width: int, dtype: str
    ) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.growing = folder / f"embeddings{path.suffix}"
        shape = (int(bins.sum()), width)
        first = np.cumsum(bins) - bins
        self.table = [("record", "first_row", "rows", "bin_bp")]
        self.table += [(n, int(f), int(c), bin_bp) for n, f, c in zip(sequences.names, first, bins, strict=True)]  # type: ignore[misc]
        if path.suffix == ".npy":
            if self.growing.exists():
                self._array: Any = np.load(self.growing, mmap_mode="r+")
            else:
                self._array = np.lib.format.open_memmap(self.growing, "w+", self.dtype, shape)
        elif path.suffix == ".zarr":
            self._array = self._open_zarr(shape)
        else:
            raise UserError(f"--embeddings {path}: the name must end in .npy or .zarr")

    def _open_zarr(self, shape: tuple[int, int]) -> Any:
        try:
            import zarr
        except ImportError as error:
            raise UserError(
                "--embeddings NAME.zarr needs the zarr package: pip install 'seqssm[zarr]', or name it .npy"
            ) from error
        if self.path.exists():
            raise UserError(f"{self.path} is there already: delete it, or choose another name")
        if self.growing.exists():
            return zarr.open_array(self.growing, mode="r+")
        rows = max(1, min(shape[0], ZARR_CHUNK_BYTES // (shape[1] * self.dtype.itemsize)))
        attributes: dict[str, Any] = {"rows": [dict(zip(self.table[0], line, strict=True)) for line in self.table[1:]]}
        return zarr.create_array(
            self.growing, shape=shape, chunks=(rows, shape[1]), dtype=self.dtype, attributes=attributes
        )

    def write(self, rows: Rows) -> None:
        limit = np.finfo(self.dtype).max
        if np.abs(rows.embeddings).max() > limit:
            raise UserError(f"the embeddings exceed what {self.dtype} holds: use --embeddings-dtype float32")
        self._array[rows.first : rows.first + len(rows.embeddings)] = rows.embeddings.astype(self.dtype)

    def mark(self) -> Any:
        return None  # rows have their places: writing some again changes nothing

    def rewind(self, mark: Any) -> None:
        pass

    def finish(self) -> None:
        """Give the files their names."""
        if self.path.suffix == ".npy":
            self._array.flush()
        del self._array
        os.replace(self.growing, self.path)
        table = self.growing.with_suffix(".tsv")
        table.write_text("".join("\t".join(map(str, line)) + "\n" for line in self.table))
        os.replace(table, self.path.with_name(self.path.name + ".tsv"))
