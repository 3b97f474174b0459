"""What a split holds and what leaks between its parts: counts a class, shared sequences, overlaps, shared 31-mers."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from seqssm.data.dna.alphabet import COMPLEMENT, N
from seqssm.data.dna.library import Library
from seqssm.data.dna.sampling import Windows
from seqssm.data.splitting import SPLITS

KMER_BP = 31
PREFIX_BP = 8
SAMPLED_SHARE = 1 / 64  # of all k-mers, by their first bases
SCANNED_BP = 1 << 28  # a split longer than this is scanned at evenly spaced places
BLOCK_BP = 1 << 16


def sequence_keys(library: Library, regions: Windows, wanted: np.ndarray) -> np.ndarray:
    """64-bit keys (r,) that two regions share when they are equal or each other's reverse complement (and otherwise
    with probability 2^-62, multilinear hashing); 0 where `wanted` (r,) bool says that nobody will ask."""
    keys = np.zeros(len(regions), np.uint64)
    for length in np.unique(regions.length[wanted]).tolist():
        rows = np.flatnonzero(wanted & (regions.length == length))
        at_once = max(1, BLOCK_BP * 16 // length)
        for first in range(0, len(rows), at_once):
            some = rows[first : first + at_once]
            forward, backward = np.zeros(len(some), np.uint64), np.zeros(len(some), np.uint64)
            for at in range(0, length, BLOCK_BP * 16):
                size = min(BLOCK_BP * 16, length - at)
                tokens = library.token_rows(regions.record_id[some], regions.start_bp[some] + at, size)  # (s,size)
                position = np.arange(at, at + size, dtype=np.uint64)
                forward += tokens.astype(np.uint64) @ _multiplier(position)
                backward += COMPLEMENT[tokens].astype(np.uint64) @ _multiplier(np.uint64(length - 1) - position)
            keys[some] = np.minimum(forward, backward)
    return keys


def _multiplier(position: np.ndarray) -> np.ndarray:
    """A random odd number for each position: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = (position + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def shared_sequences(library: Library, regions: dict[str, Windows]) -> dict[tuple[str, str], np.ndarray]:
    """For each ordered pair of splits (a, b): mask of a's regions whose sequence, on either strand, is one of b's.

    Only regions with a partner of equal length elsewhere are read, so that chromosomes cost nothing.
    """
    wanted, keys = {}, {}
    for name, windows in regions.items():
        elsewhere = [other.length for split, other in regions.items() if split != name]
        n_count = library.n_count(windows.record_id, windows.start_bp, windows.end_bp)
        partner = np.isin(windows.length, np.concatenate(elsewhere)) if elsewhere else np.zeros(len(windows), bool)
        wanted[name] = partner & (n_count < windows.length)  # N alone is no sequence to share
        keys[name] = sequence_keys(library, windows, wanted[name])
    return {(a, b): wanted[a] & np.isin(keys[a], keys[b][wanted[b]]) for a in regions for b in regions if a != b}


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


def _sample_of_prefixes() -> tuple[np.ndarray, np.ndarray]:
    """Which 8-mers (65536,) begin a sampled k-mer, and which end one on the other strand."""
    chosen = np.random.default_rng(0).random(4**PREFIX_BP) < SAMPLED_SHARE
    code = np.arange(4**PREFIX_BP)
    turned = np.zeros_like(code)
    for position in range(PREFIX_BP):
        turned = (turned << 2) | (3 - ((code >> (2 * position)) & 3))
    return chosen, chosen[turned]


_BEGINS, _ENDS_TURNED = _sample_of_prefixes()


def sampled_kmers(tokens: np.ndarray, both_strands: bool) -> np.ndarray:
    """Codes (uint64) of the k-mers without N whose prefix is in the sample, on the given strand or on both."""
    if len(tokens) < KMER_BP:
        return np.zeros(0, np.uint64)
    code = (tokens & 3).astype(np.uint16)
    for bases in (1, 2, 4):  # codes of 2, 4, then 8 bases
        code = (code[:-bases] << np.uint16(2 * bases)) | code[bases:]
    count = len(tokens) - KMER_BP + 1
    offset = np.arange(KMER_BP)
    kmers = tokens[np.flatnonzero(_BEGINS[code[:count]])[:, None] + offset]  # (s,k)
    if both_strands:
        begins = np.flatnonzero(_ENDS_TURNED[code[KMER_BP - PREFIX_BP :]])
        kmers = np.concatenate([kmers, COMPLEMENT[tokens[begins[:, None] + offset[::-1]]]])
    kmers = kmers[(kmers < N).all(1)].astype(np.uint64)
    packed = np.zeros(len(kmers), np.uint64)
    for position in range(KMER_BP):
        packed = (packed << np.uint64(2)) | kmers[:, position]
    return packed


def shared_kmers(library: Library, train: Windows, held_out: dict[str, Windows]) -> dict[str, float]:
    """For each held-out split: the share of its distinct 31-mers that stand in train on either strand.

    An estimate from the k-mers that begin with one of 1/64 of all 8-mers, the same everywhere. A split of more than
    256 Mb is scanned at evenly spaced places, which makes the estimate a lower bound.
    """
    wanted = {
        name: np.unique(np.concatenate([sampled_kmers(tokens, False) for tokens in _blocks(library, windows)]))
        for name, windows in held_out.items()
    }
    if not wanted:
        return {}
    union = np.unique(np.concatenate(list(wanted.values())))
    found = np.zeros(len(union), bool)
    if len(union):
        for tokens in _blocks(library, train):
            kmers = sampled_kmers(tokens, True)
            at = np.minimum(np.searchsorted(union, kmers), len(union) - 1)
            found[at[union[at] == kmers]] = True
    return {
        name: float(found[np.searchsorted(union, kmers)].mean()) if len(kmers) else float("nan")
        for name, kmers in wanted.items()
    }


@dataclass
class Report:
    """Counts and leakage, plain data.

    counts: grid windows by class and split. records, bases: by split. windows_per_epoch: drawn in training.
    left_out: windows or regions not used, by reason.
    shared_sequences: held-out regions that equal a train region (after dropping). overlaps: held-out windows that
    share a position with a train region. shared_kmers: share of held-out 31-mers found in train, or None.
    """

    labels: list[str]
    counts: dict[str, dict[str, int]]
    records: dict[str, int]
    bases: dict[str, int]
    windows_per_epoch: int
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
        console.print(f"an epoch draws {self.windows_per_epoch:,} train windows")
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
