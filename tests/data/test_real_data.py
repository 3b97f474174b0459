"""The same code on real files, where they lie beside the repository."""

from pathlib import Path

import numpy as np
import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser

from seqssm.data import DNADataModule
from seqssm.data.dna.alphabet import encode
from seqssm.data.dna.indexing import open_sequences

DATA = Path(__file__).parents[3] / "shared" / "data" / "dna"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the repository")


@pytest.mark.parametrize(
    ("task", "counts", "dropped"), [("prom_core_tata", (4904, 613, 613), 16), ("prom_300_tata", (4904, 613, 613), 6)]
)
def test_gue_splits_and_shared_sequences(task: str, counts: tuple[int, int, int], dropped: int) -> None:
    data = DNADataModule(str(DATA / "gue" / task))
    data.setup("fit")
    report = data.report
    assert report is not None
    assert report.left_out["train sequences that also stand in test"] == dropped
    assert tuple(sum(report.counts[split].values()) for split in ("val", "test")) == counts[1:]
    assert report.shared_sequences == {"val": 0, "test": 0}


def test_a_fungal_genome_reads_as_biopython_reads_it() -> None:
    import gzip

    path = DATA / "zymoseptoria" / "Spasserinii_P63.fa.gz"
    sequences = open_sequences(path)
    with gzip.open(path, "rt") as file:
        records = [(title.split()[0], letters) for title, letters in SimpleFastaParser(file)]
    assert sequences.names == [name for name, _ in records]
    for number, (_, letters) in enumerate(records):
        assert np.array_equal(sequences.tokens(number, 0, len(letters)), encode(letters))


def test_splice_table_without_a_split() -> None:
    data = DNADataModule(str(DATA / "uci_splice" / "splice.csv"))
    data.setup("fit")
    assert data.labels == ["ei", "ie", "n"]
    assert data.report is not None
    assert sum(sum(split.values()) for split in data.report.counts.values()) <= 3186
    assert data.report.shared_sequences == {"val": 0, "test": 0}
