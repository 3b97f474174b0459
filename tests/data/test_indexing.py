import multiprocessing
import os
import pickle
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from seqssm.data.dna import indexing, reading
from seqssm.data.dna.alphabet import N, encode
from seqssm.data.dna.indexing import Sequences, open_sequences
from seqssm.errors import UserError

Writer = Callable[..., Path]


@pytest.fixture
def genome(write_fasta: Writer, random_dna: Callable[..., str]) -> tuple[Path, dict[str, str]]:
    records = {
        "chr1": "NNN" + random_dna(5000, 1) + "N" * 40 + random_dna(100, 2).lower() + "N",
        "chr2": random_dna(3000, 3, "ACGTNRY"),
        "chr3": "N" * 17,
        "chr4": random_dna(1000, 4),
    }
    return write_fasta("genome.fa", records), records


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_index_gives_the_tokens_and_n_counts_of_the_file(
    genome: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    path, records = genome
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    sequences = open_sequences(path)
    assert sequences.names == list(records)
    assert sequences.lengths.tolist() == [len(letters) for letters in records.values()]
    rng = np.random.default_rng(0)
    for number, letters in enumerate(records.values()):
        tokens = encode(letters)
        assert np.array_equal(sequences.tokens(number, 0, len(letters)), tokens)
        start = rng.integers(0, len(letters), 50)
        end = rng.integers(start, len(letters)) + 1
        counts = sequences.n_count(np.full(50, number), start, end)
        assert counts.tolist() == [int((tokens[a:b] == N).sum()) for a, b in zip(start, end, strict=True)]


def test_case_stays_on_disk_and_goes_in_tokens(genome: tuple[Path, dict[str, str]]) -> None:
    path, records = genome
    sequences = open_sequences(path)
    assert sequences.letters(0, 5040, 5060).tobytes().decode() == records["chr1"][5040:5060]
    assert records["chr1"][5050].islower()


def test_rows_of_equal_length_equal_single_reads(genome: tuple[Path, dict[str, str]]) -> None:
    sequences = open_sequences(genome[0])
    rows = sequences.token_rows(np.array([0, 3, 1]), np.array([10, 0, 77]), 100)
    expected = [sequences.tokens(r, s, s + 100) for r, s in ((0, 10), (3, 0), (1, 77))]
    assert np.array_equal(rows, expected)


def test_index_is_found_again_by_content_not_by_name(
    genome: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = genome
    open_sequences(path, tmp_path / "index")
    copy = tmp_path / "copy.fa"
    copy.write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_build", lambda *args: pytest.fail("built again"))
        open_sequences(copy, tmp_path / "index")
    copy.write_text(copy.read_text().replace("chr4", "chr9"))
    assert open_sequences(copy, tmp_path / "index").names[-1] == "chr9"
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_an_incomplete_index_is_built_again(genome: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    before = open_sequences(genome[0], tmp_path / "index").tokens(0, 0, 100)
    (index,) = (tmp_path / "index").iterdir()
    for size in (0, 10, index.stat().st_size - 1):
        os.truncate(index, size)
        assert np.array_equal(open_sequences(genome[0], tmp_path / "index").tokens(0, 0, 100), before)


def test_a_pickled_index_carries_no_bases(genome: tuple[Path, dict[str, str]]) -> None:
    sequences = open_sequences(genome[0])
    tokens = sequences.tokens(1, 5, 500)
    blob = pickle.dumps(sequences)
    assert genome[1]["chr4"][:50].encode() not in blob
    assert np.array_equal(pickle.loads(blob).tokens(1, 5, 500), tokens)


def test_records_in_memory_equal_an_index(genome: tuple[Path, dict[str, str]]) -> None:
    path, records = genome
    held = Sequences.from_records((name, letters.encode()) for name, letters in records.items())
    indexed = open_sequences(path)
    everything = (np.arange(4), np.zeros(4, np.int64), indexed.lengths)
    assert np.array_equal(held.n_count(*everything), indexed.n_count(*everything))
    assert np.array_equal(pickle.loads(pickle.dumps(held)).tokens(1, 0, 3000), indexed.tokens(1, 0, 3000))


def _build_at_once(path: Path, folder: Path, barrier, results) -> None:  # type: ignore[no-untyped-def]
    reading.BLOCK_BYTES = 256
    pieces = indexing.sequence_pieces

    def slow_pieces(*args):  # type: ignore[no-untyped-def]
        barrier.wait()  # both find no index before either writes one
        for piece in pieces(*args):
            time.sleep(0.001)
            yield piece

    indexing.sequence_pieces = slow_pieces
    sequences = open_sequences(path, folder)
    results.put(sequences.tokens(0, 0, 5000).tobytes())


def test_building_holds_a_block_not_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(reading, "BLOCK_BYTES", 1 << 16)
    path = tmp_path / "one_line.fa"
    with open(path, "wb") as file:
        file.write(b">chr\n")
        for _ in range(200):
            file.write(b"ACGTTGCAAC" * 10_000)
    tracemalloc.start()
    open_sequences(path, tmp_path / "index")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000  # of a record of 20 MB; the checksum takes 4 MB blocks, two at a time


def test_two_processes_building_one_index_both_get_it_whole(
    genome: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    folder = tmp_path / "index"
    workers = [context.Process(target=_build_at_once, args=(genome[0], folder, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    expected = encode(genome[1]["chr1"])[:5000].tobytes()
    assert got == [expected, expected]
    assert [file.suffix for file in folder.iterdir()] == [".index"]


def test_a_bad_file_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = tmp_path / "bad.fa"
    bad.write_text(">a\n" + "ACGT" * 1000 + "\n>b\nACGE\n")
    with pytest.raises(UserError, match="record 'b' has 'E' at position 4"):
        open_sequences(bad, tmp_path / "index")
    assert list((tmp_path / "index").iterdir()) == []


def test_no_space_is_one_clear_line_and_leaves_nothing(tmp_path: Path, write_fasta: Writer) -> None:
    path = write_fasta("big.fa", {"a": "ACGT" * 20_000})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a write beyond it fails as on a full disk
        with pytest.raises(UserError, match="no space is left; set index_dir"):
            open_sequences(path, tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "index").iterdir()) == []


def test_an_index_folder_that_cannot_be_is_one_clear_line(genome: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "index", Path("/proc/seqssm")):
        with pytest.raises(UserError, match=r"cannot write the sequence index in .*; set index_dir"):
            open_sequences(genome[0], folder)


def test_leftovers_of_killed_builds_are_removed(genome: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    old, young = folder / ".old.tmp", folder / ".young.tmp"
    old.write_text("")
    young.write_text("")
    os.utime(old, (0, 0))
    open_sequences(genome[0], folder)
    assert not old.exists()
    assert young.exists()
