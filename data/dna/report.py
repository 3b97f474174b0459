"""What a split holds and what leaks between its parts: counts a class, shared sequences, overlaps, shared 31-mers."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from seqssm.data.dna.alphabet import COMPLEMENT, N
from seqssm.data.dna.sampling import Windows
from seqssm.data.dna.sources import SPLITS, Library

KMER_BP = 31
PREFIX_BP = 12
SAMPLED_SHARE = 1 / 64  # of all k-mers, chosen by a hash of their first bases
SCANNED_BP = 1 << 28  # a split longer than this is scanned at evenly spaced places
BLOCK_BP = 1 << 16
HASH_FACTOR = np.uint32(0x9E3779B1)  # the golden ratio: Knuth's multiplicative hashing


def sequence_key(library: Library, record: int, start_bp: int, end_bp: int) -> bytes:
    """A digest that two stretches share when they are equal or each other's reverse complement."""
    tokens = library.tokens(record, start_bp, end_bp)
    forward = hashlib.blake2b(tokens, digest_size=16).digest()
    backward = hashlib.blake2b(np.ascontiguousarray(COMPLEMENT[tokens[::-1]]), digest_size=16).digest()
    return min(forward, backward)


def shared_sequences(library: Library, regions: dict[str, Windows]) -> dict[tuple[str, str], np.ndarray]:
    """For each ordered pair of splits (a, b): mask of a's regions whose sequence, on either strand, is one of b's.

    Only regions with a partner of equal length elsewhere are read, so that chromosomes cost nothing.
    """
    lengths = {name: set(windows.length.tolist()) for name, windows in regions.items()}
    keys: dict[str, list[bytes | None]] = {}
    for name, windows in regions.items():
        elsewhere = set().union(*(other for split, other in lengths.items() if split != name))
        keys[name] = [
            sequence_key(library, record, start, start + length) if length in elsewhere else None
            for record, start, length in zip(
                windows.record_id.tolist(), windows.start_bp.tolist(), windows.length.tolist(), strict=True
            )
        ]
    known = {name: set(values) - {None} for name, values in keys.items()}
    return {(a, b): np.array([key in known[b] for key in keys[a]], bool) for a in regions for b in regions if a != b}


def overlapping(windows: Windows, regions: Windows) -> int:
    """How many of the windows share a position with any of the regions."""
    order = np.lexsort((regions.start_bp, regions.record_id))
    regions = regions[order]
    span = int(max(windows.end_bp.max(initial=0), regions.end_bp.max(initial=0))) + 1
    starts = regions.record_id * span + regions.start_bp
    reach = np.maximum.accumulate(regions.record_id * span + regions.end_bp) if len(regions) else regions.end_bp
    last = np.searchsorted(starts, windows.record_id * span + windows.end_bp) - 1  # last region that begins before
    begins = windows.record_id * span + windows.start_bp
    return int(np.count_nonzero((last >= 0) & (reach[np.maximum(last, 0)] > begins))) if len(regions) else 0


def _blocks(library: Library, regions: Windows) -> Iterator[np.ndarray]:
    """Tokens of the regions in blocks that overlap by a k-mer less one; evenly spaced blocks of very long splits."""
    total = int(regions.length.sum())
    every = max(1, -(-total // SCANNED_BP))
    number = 0
    joined: list[np.ndarray] = []
    size = 0
    gap = np.full(1, N, np.uint8)  # keeps k-mers from spanning two regions
    for record, start, end in zip(
        regions.record_id.tolist(), regions.start_bp.tolist(), regions.end_bp.tolist(), strict=True
    ):
        for at in range(start, end, BLOCK_BP):
            number += 1
            if number % every:
                continue
            tokens = library.tokens(record, at, min(at + BLOCK_BP + KMER_BP - 1, end))
            joined += [tokens, gap]
            size += len(tokens)
            if size >= BLOCK_BP:
                yield np.concatenate(joined)
                joined, size = [], 0
    if joined:
        yield np.concatenate(joined)


def _sampled_kmers(tokens: np.ndarray) -> np.ndarray:
    """Codes (uint64) of the k-mers without N whose prefix hashes into the sample."""
    if len(tokens) < KMER_BP:
        return np.zeros(0, np.uint64)
    code = (tokens & 3).astype(np.uint32)
    for shift in (1, 2, 4):  # prefixes of 2, 4 and 8 bases
        code = (code[:-shift] << np.uint32(2 * shift)) | code[shift:]
    fours = (tokens & 3).astype(np.uint32)
    for shift in (1, 2):
        fours = (fours[:-shift] << np.uint32(2 * shift)) | fours[shift:]
    count = len(tokens) - KMER_BP + 1
    prefix = (code[:count] << np.uint32(8)) | fours[8 : 8 + count]
    start = np.flatnonzero(prefix * HASH_FACTOR < np.uint32(SAMPLED_SHARE * 2**32))
    kmers = tokens[start[:, None] + np.arange(KMER_BP)]  # (s,k)
    kmers = kmers[(kmers < N).all(1)].astype(np.uint64)
    packed = np.zeros(len(kmers), np.uint64)
    for position in range(KMER_BP):
        packed = (packed << np.uint64(2)) | kmers[:, position]
    return packed


def shared_kmers(library: Library, train: Windows, held_out: dict[str, Windows]) -> dict[str, float]:
    """For each held-out split: the share of its distinct 31-mers that stand in train on either strand.

    An estimate from one k-mer in 64, the same ones everywhere (chosen by hash, as in FracMinHash, Irber et al. 2022).
    """
    wanted = {
        name: np.unique(np.concatenate([np.zeros(0, np.uint64), *map(_sampled_kmers, _blocks(library, windows))]))
        for name, windows in held_out.items()
    }
    union = np.unique(np.concatenate([np.zeros(0, np.uint64), *wanted.values()]))
    found = np.zeros(len(union), bool)
    if len(union):
        for tokens in _blocks(library, train):
            for strand in (tokens, COMPLEMENT[tokens[::-1]]):
                kmers = _sampled_kmers(strand)
                at = np.minimum(np.searchsorted(union, kmers), len(union) - 1)
                found[at[union[at] == kmers]] = True
    return {
        name: float(found[np.searchsorted(union, kmers)].mean()) if len(kmers) else float("nan")
        for name, kmers in wanted.items()
    }


@dataclass
class Report:
    """Counts and leakage, plain data.

    counts: windows by class and split. records: records by split. left_out: windows or regions not used, by reason.
    shared_sequences: held-out regions that equal a train region (after dropping). overlaps: held-out windows that
    share a position with a train region. shared_kmers: share of held-out 31-mers found in train, or None.
    """

    labels: list[str]
    counts: dict[str, dict[str, int]]
    records: dict[str, int]
    bases: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)
    shared_sequences: dict[str, int] = field(default_factory=dict)
    overlaps: dict[str, int] = field(default_factory=dict)
    shared_kmers: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def print(self) -> None:
        """Print two compact tables to standard output."""
        from rich.console import Console
        from rich.table import Table

        splits = [split for split in SPLITS if split in self.counts]
        table = Table(title="windows by class and split", title_justify="left")
        table.add_column("class")
        for split in splits:
            table.add_column(split, justify="right")
        for label in self.labels:
            table.add_row(label, *(f"{self.counts[split][label]:,}" for split in splits))
        table.add_section()
        table.add_row("all", *(f"{sum(self.counts[split].values()):,}" for split in splits))
        table.add_row("records", *(f"{self.records[split]:,}" for split in splits))
        table.add_row("bases", *(f"{self.bases[split]:,}" for split in splits))
        console = Console()
        console.print(table)
        held_out = [split for split in splits if split in self.overlaps]
        if held_out:
            leaks = Table(title="leakage into train", title_justify="left")
            leaks.add_column("")
            for split in held_out:
                leaks.add_column(split, justify="right")
            leaks.add_row("identical sequences", *(f"{self.shared_sequences[split]:,}" for split in held_out))
            leaks.add_row("overlapping windows", *(f"{self.overlaps[split]:,}" for split in held_out))
            if self.shared_kmers:
                shares = (f"{self.shared_kmers[split]:.2%}" for split in held_out)
                leaks.add_row(f"shared {KMER_BP}-mers (sampled)", *shares)
            console.print(leaks)
        for reason, count in self.left_out.items():
            if count:
                console.print(f"left out: {count:,} {reason}")
