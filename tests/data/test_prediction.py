import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from seqssm.data.dna import reading
from seqssm.data.dna.alphabet import decode
from seqssm.data.dna.prediction import FastaWindows, window_batches
from seqssm.errors import UserError

Writer = Callable[..., Path]


def expected_spans(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    if length < window:
        return [(0, length)]
    spans = [(s, s + window) for s in range(0, length - window + 1, stride)]
    if spans[-1][1] < length and spans[-1][0] + stride < length:
        spans.append((length - window, length))
    return spans


@pytest.mark.parametrize("block_bytes", [13, 1 << 20])
@pytest.mark.parametrize(("window", "stride"), [(50, 50), (50, 20), (50, 70), (1, 1), (64, 64)])
def test_windows_cover_every_record(
    write_fasta: Writer, random_dna: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    window: int, stride: int, block_bytes: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    records = {f"r{n}": random_dna(n, n) for n in (1, 49, 50, 51, 64, 100, 128, 333)}
    windows = list(FastaWindows(write_fasta("g.fa", records), window, stride))
    spans = [(w.record, w.start_bp, w.end_bp) for w in windows]
    assert spans == [(n, *s) for n, letters in records.items() for s in expected_spans(len(letters), window, stride)]
    assert all(decode(w.tokens) == records[w.record][w.start_bp : w.end_bp] for w in windows)
    if stride <= window:
        for name, letters in records.items():
            covered = {p for r, a, b in spans if r == name for p in range(a, b)}
            assert covered == set(range(len(letters)))


def test_whole_records_and_gz(tmp_path: Path, random_dna: Callable[..., str]) -> None:
    records = {"a": random_dna(70_000, 1), "b": "acgtRN"}
    path = tmp_path / "g.fa.gz"
    path.write_bytes(gzip.compress("".join(f">{n}\n{s}\n" for n, s in records.items()).encode()))
    read: list[int] = []
    windows = list(FastaWindows(path, on_read=read.append))
    assert [(w.record, w.start_bp, w.end_bp) for w in windows] == [("a", 0, 70_000), ("b", 0, 6)]
    assert decode(windows[1].tokens) == "ACGTNN"
    assert windows[1].n_fraction == pytest.approx(1 / 3)
    assert sum(read) == path.stat().st_size


def test_memory_stays_near_a_block_and_a_window(
    tmp_path: Path, random_dna: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    monkeypatch.setattr(reading, "BLOCK_BYTES", 1 << 16)
    path = tmp_path / "one_line.fa"
    chunk = random_dna(100_000).encode()
    with open(path, "wb") as file:
        file.write(b">chr\n")
        for _ in range(100):
            file.write(chunk)
    tracemalloc.start()
    count = sum(1 for _ in FastaWindows(path, 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 2_000_000  # of a record of 10 MB


def test_batches_pad_and_keep_order(write_fasta: Writer, random_dna: Callable[..., str]) -> None:
    path = write_fasta("g.fa", {"a": random_dna(25, 1), "b": random_dna(7, 2), "c": random_dna(10, 3)})
    groups = list(window_batches(FastaWindows(path, 10), 2))
    assert [[(w.record, w.start_bp) for w in group] for group, _ in groups] == [
        [("a", 0), ("a", 10)], [("a", 15), ("b", 0)], [("c", 0)],
    ]  # fmt: skip
    for group, batch in groups:
        assert batch.lengths.tolist() == [len(w.tokens) for w in group]
        for window, row, length in zip(group, batch.tokens, batch.lengths, strict=True):
            assert np.array_equal(row[:length].numpy(), window.tokens)


def test_workers_share_the_windows(write_fasta: Writer, random_dna: Callable[..., str]) -> None:
    path = write_fasta("g.fa", {"a": random_dna(105, 1), "b": random_dna(57, 2)})
    alone = [(w.record, w.start_bp) for w in FastaWindows(path, 10)]
    loader = DataLoader(FastaWindows(path, 10), batch_size=None, num_workers=2, collate_fn=lambda w: w)
    assert sorted((w.record, w.start_bp) for w in loader) == sorted(alone)


def test_a_bare_sequence_in_txt_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "seq.txt").write_text("ACGT\nAC\n")
    assert [(w.record, decode(w.tokens)) for w in FastaWindows(tmp_path / "seq.txt", 4)] == [
        ("seq.txt", "ACGT"), ("seq.txt", "GTAC"),
    ]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"hello", "is not FASTA"),
                                                  (b">a\nACGT\n>a\nA\n", "stands twice")])  # fmt: skip
def test_bad_files_raise_as_they_are_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.fa").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(FastaWindows(tmp_path / "bad.fa", 2))


def test_windows_of_no_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="window_bp is 0"):
        FastaWindows(tmp_path / "x.fa", 0)
    with pytest.raises(UserError, match="stride_bp is -1"):
        FastaWindows(tmp_path / "x.fa", 10, -1)
