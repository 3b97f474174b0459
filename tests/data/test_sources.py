import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from seqssm.data.dna.alphabet import decode
from seqssm.data.dna.sources import Layout, list_sources
from seqssm.errors import UserError

Writer = Callable[..., Path]


def rows_of(layout: Layout, *columns: str) -> list[tuple[str, ...]]:
    """Every region's letters and columns, sorted."""
    library, regions = list_sources(layout).load(None)
    rows = []
    for i in range(len(regions)):
        place = (int(regions.record[i]), int(regions.start_bp[i]), int(regions.end_bp[i]))
        rows.append((decode(library.tokens(*place)), *(regions.columns[name][i] for name in columns)))
    return sorted(rows)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_table_of_sequences(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "label,sequence,strain\nx,acgr,s1\ny,TTTT,s2\n")
    assert list_sources(Layout(path)).label_values() == {"x", "y"}
    assert rows_of(Layout(path), "label", "strain") == [("ACGN", "x", "s1"), ("TTTT", "y", "s2")]


def test_table_of_paths_relative_to_the_table_with_extra_columns(tmp_path: Path) -> None:
    write(tmp_path / "d" / "genomes" / "a.fa.gz", ">chr1\nAC\n>chr2\nGG\n")
    write(tmp_path / "d" / "genomes" / "b.fa", ">chr1\nTT\n")
    path = write(tmp_path / "d" / "samples.tsv", "path\tspecies\tstrain\ngenomes/a.fa.gz\tx\t1\ngenomes/b.fa\ty\t2\n")
    layout = Layout(path, label_column="species")
    assert list_sources(layout).label_values() == {"x", "y"}
    assert rows_of(layout, "species", "strain", "record", "file") == [
        ("AC", "x", "1", "chr1", "genomes/a.fa.gz"),
        ("GG", "x", "1", "chr2", "genomes/a.fa.gz"),
        ("TT", "y", "2", "chr1", "genomes/b.fa"),
    ]
    library, _ = list_sources(layout).load(None)
    assert library.unique_names() == ["genomes/a.fa.gz:chr1", "genomes/a.fa.gz:chr2", "genomes/b.fa:chr1"]


def test_fasta_with_labels_by_record(tmp_path: Path, write_fasta: Writer) -> None:
    fasta = write_fasta("all.fa", {"r1": "ACGT", "r2": "GGGG"})
    labels = write(tmp_path / "labels.tsv", "name\tlabel\nr2\ty\nr1\tx\n")
    layout = Layout(fasta, labels_table=labels, record_column="name")
    assert list_sources(layout).label_values() == {"x", "y"}
    assert rows_of(layout, "label") == [("ACGT", "x"), ("GGGG", "y")]


def test_labels_and_groups_out_of_record_names(write_fasta: Writer) -> None:
    fasta = write_fasta("tasks.fa", {"chr1:5-9|1": "ACGT", "chr2:1-5|0": "GGGG"})
    layout = Layout(fasta, record_pattern=r"(?P<chromosome>chr\d+):.*\|(?P<label>\d+)$")
    assert list_sources(layout).label_values() is None
    assert rows_of(layout, "label", "chromosome") == [("ACGT", "1", "chr1"), ("GGGG", "0", "chr2")]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "fa"])
def test_folder_of_split_files(tmp_path: Path, suffix: str) -> None:
    for split, letters in (("train", "AAAA"), ("dev", "CCCC"), ("test", "GGGG")):
        text = f">r|7\n{letters}\n" if suffix == "fa" else f"sequence,label\n{letters},7\n"
        write(tmp_path / "task" / f"{split}.{suffix}", text)
    pattern = r"\|(?P<label>\d)" if suffix == "fa" else None
    rows = rows_of(Layout(tmp_path / "task", record_pattern=pattern), "label", "split")
    assert rows == [("AAAA", "7", "train"), ("CCCC", "7", "val"), ("GGGG", "7", "test")]


def test_genomic_benchmarks_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label, letters in (("positive", "ACGT"), ("negative", "TTTT")):
            write(tmp_path / "gb" / split / label / "0.txt", letters + "\n")
    layout = Layout(tmp_path / "gb")
    assert list_sources(layout).label_values() == {"positive", "negative"}
    assert rows_of(layout, "label", "split") == sorted(
        (letters, label, split)
        for split in ("train", "test")
        for label, letters in (("positive", "ACGT"), ("negative", "TTTT"))
    )
    library, _ = list_sources(layout).load(None)
    assert len(set(library.unique_names())) == 4


def test_class_folders_of_fasta_and_text(tmp_path: Path) -> None:
    write(tmp_path / "c" / "ape" / "1.fa", ">x\nACGT\n>y\nCCCC\n")
    write(tmp_path / "c" / "ape" / "2.txt", "GG\nGG")
    write(tmp_path / "c" / "yeast" / "3.fasta.gz", ">x\nTTTT\n")
    write(tmp_path / "c" / "yeast" / "4.txt", ">inside\nAAAA\n")
    write(tmp_path / "c" / "yeast" / "notes.md", "not a sequence")
    expected = [("AAAA", "yeast"), ("ACGT", "ape"), ("CCCC", "ape"), ("GGGG", "ape"), ("TTTT", "yeast")]
    assert rows_of(Layout(tmp_path / "c"), "label") == expected


def test_bed_intervals_with_labels_or_splits(tmp_path: Path, write_fasta: Writer) -> None:
    fasta = write_fasta("genome.fa", {"chr1": "AACCGGTT", "chr2": "TTTTTTTT"})
    bed = write(tmp_path / "a.bed", "chr1\t2\t4\tcpg\nchr2\t0\t3\tpoly\n")
    assert rows_of(Layout(bed, fasta=fasta), "label") == [("CC", "cpg"), ("TTT", "poly")]
    enformer = write(tmp_path / "b.bed", "chr1\t0\t2\ttrain\nchr2\t5\t8\tvalid\n")
    labels = write(tmp_path / "labels.csv", "record,label\nchr1,x\nchr2,y\n")
    layout = Layout(enformer, fasta=fasta, labels_table=labels)
    assert list_sources(layout).label_values() == {"x", "y"}
    assert rows_of(layout, "label", "split") == [("AA", "x", "train"), ("TTT", "y", "valid")]
    named = Layout(bed, fasta=fasta, bed_columns=("kind",), label_column="kind")
    assert list_sources(named).label_values() == {"cpg", "poly"}


def test_bad_sources_are_named(tmp_path: Path, write_fasta: Writer) -> None:
    fasta = write_fasta("genome.fa", {"chr1": "ACGTACGT"})

    def fails(message: str, **layout) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(UserError, match=message):
            list_sources(Layout(**layout)).load(None)

    def table(name: str, text: str) -> Path:
        return write(tmp_path / name, text)

    fails("does not exist", path=tmp_path / "nothing")
    fails("neither a column 'sequence' nor 'path'", path=table("a.csv", "seq,label\nACGT,1\n"))
    fails(r"a.csv line 3 has 'E' at position 2", path=table("a.csv", "sequence,label\nACGT,1\nAEGT,1\n"))
    fails("a.csv line 2 has an empty sequence", path=table("a.csv", "sequence,label\n,1\n"))
    fails("names the file 'genome.fa' twice", path=table("a.csv", "path,label\ngenome.fa,1\ngenome.fa,2\n"))
    fails("missing.fa does not exist", path=table("a.csv", "path,label\nmissing.fa,1\n"))
    fails("is not FASTA", path=table("a.fa", "ACGT\n"))
    fails("is a BED file: set fasta", path=table("a.bed", "chr1\t0\t4\tx\n"))
    fails("line 1: 'chr7' is no record", path=table("a.bed", "chr7\t0\t4\tx\n"), fasta=fasta)
    fails("ends at 9, outside of 'chr1' .8 bp.", path=table("a.bed", "chr1\t0\t9\tx\n"), fasta=fasta)
    fails(
        "names the record 'chr2', which the sequences do not have",
        path=fasta,
        labels_table=table("l.csv", "record,label\nchr1,x\nchr2,y\n"),
    )
    fails("names the record 'chr1' twice", path=fasta, labels_table=table("l.csv", "record,label\nchr1,x\nchr1,y\n"))
    fails(
        "no column 'record' .it has name, label.: set record_column",
        path=fasta,
        labels_table=table("l.csv", "name,label\nchr1,x\n"),
    )
    fails("does not match the record 'chr1'", path=fasta, record_pattern=r"(?P<label>\d+)bp")
    fails("no named group", path=fasta, record_pattern="chr")
    fails("not a regular expression", path=fasta, record_pattern="(?P<label>")
    (tmp_path / "empty").mkdir()
    fails("neither train/dev/test files nor class folders", path=tmp_path / "empty")


def test_a_missing_label_column_is_named_before_sequences_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "sequence,target\nACGT,1\n")
    with pytest.raises(UserError, match=r"no column 'label' .it has sequence, target.: set label_column"):
        list_sources(Layout(path)).label_values()


def test_a_row_without_a_path_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "path,label\na.fa,x\n,y\n")
    with pytest.raises(UserError, match=r"data\.csv line 3: the column 'path' is empty"):
        list_sources(Layout(path))
