"""Variants of a VCF file, checked against the sequences they refer to (VCF 4.x, samtools/hts-specs)."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seqssm.data.dna.alphabet import ENCODE, INVALID
from seqssm.data.dna.indexing import Sequences
from seqssm.data.dna.reading import open_bytes
from seqssm.errors import UserError

HEADER = "#CHROM"
COLUMNS = 8  # CHROM POS ID REF ALT QUAL FILTER INFO; samples may follow


class Variant(NamedTuple):
    """One line with an allele of letters: `start_bp` is 0-based, `alts` are all its ALT alleles as written, `usable`
    says which of them are letters."""

    record: int
    start_bp: int
    name: str
    ref: str
    alts: tuple[str, ...]
    usable: tuple[int, ...]
    line: int


def vcf_lines(path: Path, on_read: Callable[[int], None] | None = None) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) of a VCF file, plain, gzip or bgzip, without their ends; UserError for other files."""
    with open_bytes(path, on_read) as stream:
        try:
            for number, line in enumerate(io.TextIOWrapper(stream, "utf-8", newline="\n"), start=1):
                yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not a VCF file: it has bytes that are not UTF-8 (is it BCF?)") from error


def read_vcf(path: Path, sequences: Sequences, fasta: Path) -> tuple[list[Variant], Counter[str]]:
    """The variants in the file's order, and how many alleles were left out, by reason.

    Alleles that are not letters (symbolic, breakends, `*`, `.`) are left out; samples are not looked at. All variants
    are held in memory, some 200 bytes each.

    Raises UserError, naming the line, for one that is malformed, lies outside of its record, or whose REF is not what
    the sequence has there.
    """
    numbers = {name: i for i, name in enumerate(sequences.names)}
    variants: list[Variant] = []
    left_out: Counter[str] = Counter()
    in_body = False
    for number, line in vcf_lines(path):
        if line.startswith("#"):
            in_body = in_body or line.startswith(HEADER)
            continue
        if not line:
            continue
        if not in_body:
            raise UserError(f"{path} line {number}: no {HEADER} line before it, so this is not a VCF file")
        variant = _parse(path, number, line, numbers, left_out)
        if variant is not None:
            _check_reference(path, variant, sequences, fasta)
            variants.append(variant)
    if not in_body:
        raise UserError(f"{path} has no {HEADER} line: it is not a VCF file, or not the whole of one")
    return variants, left_out


def _parse(path: Path, number: int, line: str, records: dict[str, int], left_out: Counter[str]) -> Variant | None:
    cells = line.split("\t")
    where = f"{path} line {number}"
    if len(cells) < COLUMNS:
        raise UserError(f"{where} has {len(cells)} columns between tabs where VCF has at least {COLUMNS}")
    chrom, position, name, ref, alt = cells[:5]
    alts = tuple(alt.split(","))
    usable = []
    for i, allele in enumerate(alts):
        reason = _reason_to_skip(allele)
        if reason is None:
            usable.append(i)
        else:
            left_out[reason] += 1
    if not usable:
        return None
    if not position.isascii() or not position.isdigit() or int(position) < 1:
        raise UserError(f"{where}: POS {position!r} is not a position from 1 on")
    for allele in (ref, *(alts[i] for i in usable)):
        if not allele or (ENCODE[np.frombuffer(allele.encode("latin-1", "replace"), np.uint8)] == INVALID).any():
            raise UserError(f"{where}: the allele {allele!r} is neither letters of DNA nor symbolic")
    if chrom not in records:
        hint = chrom.removeprefix("chr") if chrom.startswith("chr") else f"chr{chrom}"
        also = f"; it has {hint!r}: rename one of them" if hint in records else ""
        raise UserError(f"{where}: {chrom!r} is no record of the FASTA file{also}")
    return Variant(records[chrom], int(position) - 1, name, ref, alts, tuple(usable), number)


def _reason_to_skip(allele: str) -> str | None:
    if allele == ".":
        return "without an alternative"
    if allele == "*":
        return "of a deletion elsewhere (*)"
    if allele.startswith("<"):
        return "symbolic (<...>)"
    if "[" in allele or "]" in allele or allele.startswith(".") or allele.endswith("."):
        return "breakends"
    return None


def _check_reference(path: Path, variant: Variant, sequences: Sequences, fasta: Path) -> None:
    end_bp = variant.start_bp + len(variant.ref)
    name, length = sequences.names[variant.record], int(sequences.lengths[variant.record])
    where = f"{path} line {variant.line}: REF {variant.ref[:40]} at {name}:{variant.start_bp + 1}"
    if end_bp > length:
        raise UserError(f"{where} ends outside of the record ({length} bp): use the genome that the VCF refers to")
    letters = sequences.letters(variant.record, variant.start_bp, end_bp)
    if not np.array_equal(ENCODE[letters], ENCODE[np.frombuffer(variant.ref.encode(), np.uint8)]):
        found = letters[:40].tobytes().decode()
        raise UserError(f"{where} is {found} in {fasta}: use the genome that the VCF refers to")
