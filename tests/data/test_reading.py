import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from Bio.bgzf import BgzfWriter
from Bio.SeqIO.FastaIO import SimpleFastaParser

from seqssm.data.dna import reading
from seqssm.data.dna.reading import read_bed, read_table, sequence_pieces
from seqssm.errors import UserError

Writer = Callable[..., Path]


def records_of(path: Path) -> dict[str, str]:
    records: dict[str, str] = {}
    name = ""
    for piece in sequence_pieces(path):
        name = piece.name if piece.name is not None else name
        records[name] = records.get(name, "") + piece.letters.decode()
    return records


AWKWARD = (
    "\n \n>one first record\nACGT\nNNrykm\n\n>two\r\nacgt\r\nAC GT\r\n>three\tx > y\n"
    + "G" * 50
    + "\n>four\nA\n\n\n>five\nT"
)


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 16, 4096])
def test_fasta_reads_as_biopython_does_for_any_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes if block_bytes > 3 else 7)  # the first must reach a '>'
    path = tmp_path / "awkward.fa"
    path.write_bytes(AWKWARD.encode())
    if block_bytes <= 3:  # after the first block, feed tiny ones
        sizes = iter([7, *[block_bytes] * 1000])
        monkeypatch.setattr(reading, "BLOCK_BYTES", _Sizes(sizes))
    with open(path) as file:
        expected = {title.split()[0]: letters.replace("\r", "") for title, letters in SimpleFastaParser(file)}
    assert records_of(path) == expected
    assert expected["two"] == "acgtACGT"


class _Sizes:
    """A block size that changes from read to read."""

    def __init__(self, sizes) -> None:  # type: ignore[no-untyped-def]
        self.sizes = sizes

    def __index__(self) -> int:
        return next(self.sizes)


@pytest.mark.parametrize("kind", ["gz", "bgzip", "two gz members"])
def test_compressed_fasta_equals_plain(tmp_path: Path, random_dna: Callable[..., str], kind: str) -> None:
    text = f">a\n{random_dna(200_000)}\n>b\n{random_dna(1000, 1)}\n"
    path = tmp_path / "genome.fa.gz"
    if kind == "gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    elif kind == "bgzip":
        with BgzfWriter(path) as writer:
            writer.write(text)
    else:
        path.write_bytes(gzip.compress(text[:777].encode(), mtime=0) + gzip.compress(text[777:].encode()))
    assert records_of(path) == {"a": random_dna(200_000), "b": random_dna(1000, 1)}


def two_bit(path: Path, name: str, letters: str) -> Path:
    """UCSC's format: header, index of offsets, then size, N blocks, mask blocks and packed bases of each record."""
    at = letters.index("N")
    header = struct.pack("<IIII", 0x1A412743, 0, 1, 0) + struct.pack("<B", len(name)) + name.encode()
    bits = "".join(format("TCAG".find(letter) if letter != "N" else 0, "02b") for letter in letters).ljust(24, "0")
    packed = int(bits, 2).to_bytes(3, "big")
    record = struct.pack("<IIIIII", len(letters), 1, at, letters.count("N"), 0, 0) + packed
    path.write_bytes(header + struct.pack("<I", len(header) + 4) + record)
    return path


def test_genbank_and_2bit_come_through_biopython(tmp_path: Path) -> None:
    from Bio import SeqIO
    from Bio.Seq import Seq
    from Bio.SeqRecord import SeqRecord

    record = SeqRecord(Seq("ACGTNNACGT"), "chr1", annotations={"molecule_type": "DNA"})
    SeqIO.write([record], tmp_path / "genome.gb", "genbank")
    assert records_of(tmp_path / "genome.gb") == {"chr1": "ACGTNNACGT"}
    assert records_of(two_bit(tmp_path / "genome.2bit", "chr3", "TCAGNNTTGA")) == {"chr3": "TCAGNNTTGA"}
    bare = SeqRecord(Seq(None, length=10), "chr2", annotations={"molecule_type": "DNA"})  # type: ignore[arg-type]
    SeqIO.write([bare], tmp_path / "bare.gb", "genbank")
    with pytest.raises(UserError, match="no sequence"):
        records_of(tmp_path / "bare.gb")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b"ACGT\n", "is not FASTA: it starts with 'A'"),
        (b"\x89PNG\r\n", "is not FASTA"),
        (b">a\nACGT\n>a\nACGT\n", "record name 'a' stands twice"),
        (b">a\nAC\nGTE\n", "record 'a' has 'E' at position 5"),
        (b">a\nACGT\n>b\nAC-T\n", "record 'b' has '-' at position 3"),
        (b">a\n>b\nACGT\n", "record 'a' has no sequence"),
        (b">a\nACGT\n>b\n", "record 'b' has no sequence"),
        (b">a\nACGT\n>b", "record 'b' has no sequence"),
        (b">\nACGT\n", "has no name"),
        (gzip.compress(b">a\n" + b"ACGT" * 1000, mtime=0)[:-20], "truncated gzip"),
        (b"\x1f\x8b" + b"x" * 100, "corrupt gzip"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.fa"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        records_of(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bgzip_cut_between_blocks_is_noticed(tmp_path: Path, random_dna: Callable[..., str]) -> None:
    whole = tmp_path / "whole.fa.gz"
    with BgzfWriter(whole) as writer:
        writer.write(f">a\n{random_dna(300_000)}\n")
    raw = whole.read_bytes()
    second = raw.index(b"\x1f\x8b\x08\x04", 1)
    cut = tmp_path / "cut.fa.gz"
    cut.write_bytes(raw[:second])
    with gzip.open(cut) as file:
        assert len(file.read()) > 1000  # gzip alone sees nothing wrong
    with pytest.raises(UserError, match="truncated bgzip"):
        records_of(cut)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        records_of(tmp_path / "none.fa")
    with pytest.raises(UserError, match="is a folder"):
        records_of(tmp_path)


def test_tables_are_read_with_commas_tabs_quotes_and_long_cells(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('\ufeffsequence,"label, of it"\r\n' + "A" * 300_000 + ',"x,y"\r\n\r\nC, z \r\n', encoding="utf-8")
    table = read_table(path)
    assert table.columns == ["sequence", "label, of it"]
    assert [row[1] for row in table.rows] == ["x,y", "z"]
    assert len(table.rows[0][0]) == 300_000
    assert table.lines == [2, 4]
    (tmp_path / "table.tsv.gz").write_bytes(gzip.compress(b"a\tb\n1,5\t2\n", mtime=0))
    assert read_table(tmp_path / "table.tsv.gz").rows == [["1,5", "2"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n3\n", "line 3 has 1 cells where the header has 2"),
        (b"a,b\n", "no rows"),
        (b"\n1,2\n", "no header line"),
        (b"a,a\n1,2\n", "names a column twice"),
        (b"a,b\n\xff\xfe,2\n", "not UTF-8"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "bad.csv")


def test_bed_columns_come_from_names_or_header(tmp_path: Path) -> None:
    path = tmp_path / "a.bed"
    path.write_text("track name=x\n# comment\nchr1\t0\t10\tenhancer\t7\nchr2\t5\t6\tnone\t0\n")
    first, second = read_bed(path, ["label"])
    assert (first.record, first.start_bp, first.end_bp, first.columns) == ("chr1", 0, 10, {"label": "enhancer"})
    assert second.line == 4
    path.write_text("#chrom\tstart\tend\tkind\tsplit\nchr1\t0\t10\tx\ttrain\n")
    assert read_bed(path, None)[0].columns == {"kind": "x", "split": "train"}
    path.write_text("chr1\t0\t10\tx\t0\t-\nchr1\t0\t10\ty\t0\t7\n")
    assert [one.columns for one in read_bed(path, None)] == [{"column 4": "x", "strand": "-"}, {"column 4": "y"}]
    with pytest.raises(UserError, match="line 2: the strand '7' is none of"):
        read_bed(path, ["label", "score", "strand"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("chr1\tx\t10\ta", "line 1 is not BED"),
        ("chr1\t5", "line 1 is not BED"),
        ("chr1\t10\t10\ta", "are not an interval"),
        ("chr1\t-1\t10\ta", "are not an interval"),
        ("chr1\t0\t10", "set bed_columns"),
        ("# nothing", "no intervals"),
    ],
)
def test_bad_bed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.bed"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_bed(path, ["label"])


def test_what_is_no_plain_file_is_named(tmp_path: Path) -> None:
    import bz2
    import lzma
    import os
    import socket
    import threading
    import zipfile

    text = b">a\nACGT\n"
    (tmp_path / "x.fa.bz2").write_bytes(bz2.compress(text))
    (tmp_path / "x.fa.xz").write_bytes(lzma.compress(text))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.fa", text)
    (tmp_path / "mac.fa").write_bytes(b">a first\rACGT\rACGT\r")
    (tmp_path / "circle.fa").symlink_to("circle.fa")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.fa"))
        for name, message in {
            "x.fa.bz2": "is compressed by bzip2: decompress it",
            "x.fa.xz": "is compressed by xz",
            "x.zip": "is compressed by zip",
            "mac.fa": "has the line ends of old Macs",
            "circle.fa": "cannot be read: Too many levels of symbolic links",
            "socket.fa": "cannot be read: No such device or address",
        }.items():
            with pytest.raises(UserError, match=f"{name} {message}"):
                records_of(tmp_path / name)
    # A pipe has no beginning to go back to.
    for name, content in {"plain": text, "gzip": gzip.compress(text) + gzip.compress(text.replace(b"a", b"b"))}.items():
        os.mkfifo(tmp_path / name)
        threading.Thread(target=(tmp_path / name).write_bytes, args=(content,), daemon=True).start()
        assert records_of(tmp_path / name) == dict.fromkeys("a" if name == "plain" else "ab", "ACGT")
