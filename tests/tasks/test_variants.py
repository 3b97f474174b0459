"""Variants: scores from a carried state against full passes over both sequences, and what is said of bad VCF files."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from seqssm import hub
from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.cli import main
from seqssm.data.dna.alphabet import encode, reverse_complement
from seqssm.data.dna.indexing import Sequences
from seqssm.data.dna.variants import read_vcf
from seqssm.errors import UserError
from seqssm.tasks.dna import DNAClassification
from seqssm.tasks.variants import VariantScorer, log_odds_change

HEAD = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tsample\n"
LETTERS = "".join(np.random.default_rng(0).choice(list("ACGTacgt"), 400))
SECOND = "ACGTN" * 20
WINDOW = 60


def make_task(bidirectional: str = "none", **changes) -> DNAClassification:
    torch.manual_seed(0)
    mixers = {"m": MixerSpec(class_path="Mamba", init_args={"d_state": 4})}
    config = BackboneConfig(d_model=8, n_layers=2, mixers=mixers, bidirectional=bidirectional, backend="torch")
    task = DNAClassification(labels=["a", "b", "c"], backbone=config, **changes)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if name.startswith(("embedding.", "head.")):
                torch.nn.init.normal_(parameter)
            if name.endswith("out_proj.weight"):
                parameter.mul_(4)
        if task.composition is not None:
            torch.nn.init.normal_(task.composition.table[:-1])
    return task.eval()


def line(chrom: str, pos: int, ref: str, alt: str, info: str = ".") -> str:
    return f"{chrom}\t{pos}\t.\t{ref}\t{alt}\t.\tPASS\t{info}\tGT\t0/1\n"


def at(position: int, size: int) -> str:
    """REF at a 1-based position."""
    return LETTERS[position - 1 : position - 1 + size].upper()


def other_base(base: str) -> str:
    return "ACGT"[("ACGT".index(base) + 1) % 4]


LINES = [
    line("one", 200, at(200, 1), other_base(at(200, 1))),
    line("one", 1, at(1, 1), other_base(at(1, 1))),
    line("one", 150, at(150, 4), at(150, 1), "DP=7"),  # deletion
    line("one", 150, at(150, 1), f"{at(150, 1)}GATTACA,<DEL>,{other_base(at(150, 1))}"),  # several alleles
    line("one", 400, at(400, 1), f"{at(400, 1)}T"),
    line("two", 50, "N", "A"),
    line("one", 3, at(3, 1), "<INS>"),
    line("one", 4, at(4, 1), f"{at(4, 1)}[two:7[,*"),
    line("one", 5, at(5, 1), "."),
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fasta, vcf = tmp_path / "genome.fa", tmp_path / "in.vcf.gz"
    fasta.write_text(f">one\n{LETTERS}\n>two\n{SECOND}\n")
    vcf.write_bytes(gzip.compress((HEAD + "".join(LINES)).encode()))
    return fasta, vcf


def sequences() -> Sequences:
    return Sequences.from_records([("one", LETTERS.encode()), ("two", SECOND.encode())])


def full_pass(task: DNAClassification, letters: str, low: int, high: int, from_right: bool) -> np.ndarray:
    """The answer pooled over positions of the bases low to high, by one pass over all the sequence up to ``high``.

    ``from_right``: of the other strand, from the right end down to ``low``.
    """
    tokens = torch.from_numpy(encode(letters).copy())[None]
    if from_right:
        tokens, low, high = reverse_complement(tokens), len(letters) - high, len(letters) - low
    tokens = tokens[:, :high]
    y, _ = task.backbone(task.embedding(tokens, torch.tensor([high])))
    y = y[:, low:]
    logits = task.score(task.pooling(y, torch.tensor([y.shape[1]])))
    if task.composition is not None:
        values, whole = task.composition.along(tokens[0])
        logits = logits + values[low:].sum(0) / whole[low:].sum() + task.composition.bias
    return logits.softmax(-1)[0].numpy()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "model",
    [
        {"kmer": 3, "motif": 4, "average_strands": False},
        {"kmer": 3, "pooling": "mean_max"},
        {"pooling": "last"},
        {"composition": 4},
    ],
    ids=["one strand", "both strands", "last", "composition"],
)
def test_scores_are_those_of_two_full_passes(model: dict, batch_size: int, files: tuple[Path, Path]) -> None:
    task = make_task(**model)
    fasta, vcf = files
    variants, _ = read_vcf(vcf, sequences(), fasta)
    variants = [variant for variant in variants if variant.record == 0]
    scorer = VariantScorer(task, sequences(), WINDOW, batch_size, chunk=64)
    half = WINDOW // 2
    assert len(variants) == 5
    with torch.no_grad():
        for variant, found in zip(variants, scorer.score(0, variants), strict=True):
            start, end = variant.start_bp, variant.start_bp + len(variant.ref)
            for row, allele in enumerate((variant.ref, *(variant.alts[i] for i in variant.usable))):
                letters = LETTERS[:start] + allele + LETTERS[end:]
                low, high = max(0, start - half), min(start + len(allele) + half, len(letters))
                expected = full_pass(task, letters, low, high, False)
                if task.average_strands:
                    expected = (expected + full_pass(task, letters, low, high, True)) / 2
                np.testing.assert_allclose(found[row], expected, atol=1e-5)
            if variant.start_bp != 399 and task.pooling.mode != "last":  # 30 bp on, little of it is left
                assert np.abs(found[1:] - found[0]).max() > 1e-5  # variants matter to this model


def test_patches_of_the_alternative_shift_behind_a_deletion(files: tuple[Path, Path]) -> None:
    task = make_task(kmer=3, patch=4, average_strands=False)
    fasta, vcf = files
    variants, _ = read_vcf(vcf, sequences(), fasta)
    variants = [variant for variant in variants if variant.record == 0]
    half = WINDOW // 2
    with torch.no_grad():
        for variant, found in zip(variants, VariantScorer(task, sequences(), WINDOW).score(0, variants), strict=True):
            start, end = variant.start_bp, variant.start_bp + len(variant.ref)
            for row, allele in enumerate((variant.ref, *(variant.alts[i] for i in variant.usable))):
                letters = (LETTERS[:start] + allele + LETTERS[end:])[: start + len(allele) + half]
                tokens = torch.from_numpy(encode(letters).copy())[None]
                y = task.backbone(task.embedding(tokens, torch.tensor([len(letters)])))[0]
                y = y[:, max(0, start // 4 - -(-half // 4)) :]
                expected = task.score(task.pooling(y, torch.tensor([y.shape[1]]))).softmax(-1)[0]
                np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_a_two_way_model_sees_the_window(files: tuple[Path, Path]) -> None:
    task = make_task(bidirectional="tied")
    fasta, vcf = files
    variants, _ = read_vcf(vcf, sequences(), fasta)
    found = VariantScorer(task, sequences(), WINDOW).score(0, variants[:1])[0]
    letters = LETTERS[199 - 30 : 199] + variants[0].alts[0] + LETTERS[200:230]
    with torch.no_grad():
        expected = task.predict_proba(torch.from_numpy(encode(letters).copy())[None], torch.tensor([61]))
    np.testing.assert_allclose(found[1], expected[0], atol=1e-6)


def test_log_odds() -> None:
    change = log_odds_change(np.array([[0.5, 0.5], [0.8, 0.2]]))
    np.testing.assert_allclose(change, [[np.log(4), -np.log(4)]])


def test_command_writes_a_table_and_a_vcf(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    task, (fasta, vcf) = make_task(), files
    folder = hub.save(tmp_path / "model", task.describe() | {"data": {}}, task.state_dict())
    table, out = tmp_path / "scores.tsv", tmp_path / "out.vcf"
    args = ["classify", str(fasta), "--checkpoint", str(folder), "--vcf", str(vcf), "--device", "cpu"]
    assert main(args) == 2
    assert "say with --window-bp" in capsys.readouterr().err
    args += ["--window-bp", str(WINDOW), "-o", str(table), "--vcf-out", str(out)]
    assert main(args) == 0
    err = capsys.readouterr().err
    for said in ("2 alleles symbolic", "1 alleles breakends", "1 alleles of a deletion", "1 alleles without an alter"):
        assert said in err
    rows = [row.split("\t") for row in table.read_text().splitlines()]
    kinds = [f"{kind}_{label}" for kind in ("ref", "alt", "log_odds") for label in "abc"]
    assert rows[0] == ["record", "pos", "id", "ref", "alt", *kinds]
    assert [(r[0], r[1]) for r in rows[1:]] == [
        ("one", "200"), ("one", "1"), ("one", "150"), ("one", "150"), ("one", "150"), ("one", "400"), ("two", "50"),
    ]  # fmt: skip
    annotated = out.read_text().splitlines()
    assert sum(text.startswith("##INFO=<ID=SEQSSM_") for text in annotated) == 3
    body = [text for text in annotated if not text.startswith("#")]
    assert [text.split("\t")[:5] for text in body] == [text.split("\t")[:5] for text in LINES]
    assert body[2].split("\t")[7].startswith("DP=7;SEQSSM_a=")
    first, symbolic, last = body[3].split("\t")[7].split(";")[0].removeprefix("SEQSSM_a=").split(",")
    assert (first, symbolic, last) == (rows[4][11], ".", rows[5][11])
    assert body[6].split("\t")[7] == "."
    assert body[0].split("\t")[8:] == ["GT", "0/1"]


BAD = {
    "another base": (line("one", 10, other_base(at(10, 1)), "A"), r"line 3: REF . at one:10 is . in"),
    "beyond the end": (line("one", 400, at(400, 1) + "AC", "A"), r"line 3: REF ... at one:400 ends outside .*400 bp"),
    "no record": (line("chrone", 1, "A", "C"), r"line 3: 'chrone' is no record of the FASTA file; it has 'one'"),
    "no position": (line("one", 0, "A", "C"), "line 3: POS '0' is not a position"),
    "no letters": (line("one", 1, "A", "C-"), "line 3: the allele 'C-' is neither"),
    "few columns": ("one\t1\tA\n", "line 3 has 3 columns"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_bad_lines_are_named(bad: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.vcf"
    path.write_text(HEAD + bad)
    with pytest.raises(UserError, match=message):
        read_vcf(path, sequences(), Path("genome.fa"))
    path.write_text(bad)
    with pytest.raises(UserError, match=r"line 1: no #CHROM line"):
        read_vcf(path, sequences(), Path("genome.fa"))
