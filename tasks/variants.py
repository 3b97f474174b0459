"""What a variant does to a classifier's answer, with all of the record before it as context."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqssm.data.dna.alphabet import ENCODE, PAD, N, reverse_complement
from seqssm.data.dna.indexing import Sequences
from seqssm.data.dna.sampling import Sample, collate
from seqssm.data.dna.variants import Variant
from seqssm.mixers import State
from seqssm.tasks.dna_network import DNANetwork

MOST_K = 7
"""Bases before its last that a k-mer of the composition has, at most."""


class Site(NamedTuple):
    """A variant on one strand: bases start to end of it, and what may stand there, the reference first: (l,) uint8."""

    start: int
    end: int
    alleles: list[Tensor]


class Strand:
    """A record read along one of its strands."""

    def __init__(self, sequences: Sequences, record: int, other: bool) -> None:
        self._sequences, self._record, self._other = sequences, record, other
        self.length = int(sequences.lengths[record])

    def read(self, start: int, end: int) -> Tensor:
        """Tokens (end - start,) uint8."""
        if not self._other:
            return torch.from_numpy(self._sequences.tokens(self._record, start, end))
        tokens = self._sequences.tokens(self._record, self.length - end, self.length - start)
        return reverse_complement(torch.from_numpy(tokens)[None])[0]

    def site(self, variant: Variant) -> Site:
        texts = (variant.ref, *(variant.alts[i] for i in variant.usable))
        alleles = [torch.from_numpy(ENCODE[np.frombuffer(text.encode(), np.uint8)]) for text in texts]
        start, end = variant.start_bp, variant.start_bp + len(variant.ref)
        if not self._other:
            return Site(start, end, alleles)
        turned = [reverse_complement(allele[None])[0] for allele in alleles]
        return Site(self.length - end, self.length - start, turned)


class _Row(NamedTuple):
    """One allele to be read on from a state: its tokens, with the bases before that the embedding looks back on."""

    key: tuple[int, int]  # site and allele
    tokens: Tensor
    state: State
    left: Tensor  # (m, d) outputs before it that are pooled, too
    composition: Tensor  # (c,) logits of the k-mers that end in what is pooled


class VariantScorer:
    """Class probabilities of a record with and without each variant.

    The answer is the model's, pooled over the window of ``window_bp`` around the variant; half of it lies before the
    variant, half behind the end of the reference allele. A causal model has read all of the record before it: once for
    all variants, its state at each being where every allele goes on from. A model that reads both ways sees the window
    alone.

    Args:
        task: in evaluation mode; with ``average_strands`` the other strand is read, too, from the record's other end.
        sequences: the records.
        window_bp: pooled bases.
        batch_size: alleles at once.
        chunk: positions of the backbone at once.
        autocast: run the backbone in bfloat16.

    Raises:
        UserError: the model needs aligned windows.
    """

    def __init__(
        self,
        task: DNANetwork,
        sequences: Sequences,
        window_bp: int,
        batch_size: int = 8,
        chunk: int = 1 << 16,
        autocast: bool = False,
    ) -> None:
        task.check_unaligned()
        self.task, self.sequences = task, sequences
        self.half_bp = max(1, window_bp // 2)
        self.batch_size, self.chunk, self.autocast = batch_size, chunk, autocast

    @torch.inference_mode()
    def score(
        self, record: int, variants: list[Variant], advance: Callable[[int], None] = lambda sites: None
    ) -> list[np.ndarray]:
        """Probabilities (1 + usable alleles, c) float64 for each variant of one record, the reference's first.

        ``advance`` is told of the variants done, on each strand.
        """
        causal = self.task.backbone.causal
        both = causal and self.task.average_strands
        total = [np.zeros((1 + len(v.usable), len(self.task.labels))) for v in variants]
        for other in (False, True) if both else (False,):
            strand = Strand(self.sequences, record, other)
            sites = [strand.site(variant) for variant in variants]
            with torch.autocast(self.task.device.type, torch.bfloat16, self.autocast):
                run = self._continued if causal else self._windows
                for (site, allele), probabilities in run(strand, sites, advance).items():
                    total[site][allele] += probabilities.double().cpu().numpy() / (2 if both else 1)
        return total

    def _windows(
        self, strand: Strand, sites: list[Site], advance: Callable[[int], None]
    ) -> dict[tuple[int, int], Tensor]:
        rows = [((i, j), site, allele) for i, site in enumerate(sites) for j, allele in enumerate(site.alleles)]
        results: dict[tuple[int, int], Tensor] = {}
        for at in range(0, len(rows), self.batch_size):
            group = rows[at : at + self.batch_size]
            samples = []
            for _, site, allele in group:
                before = strand.read(max(0, site.start - self.half_bp), site.start)
                behind = strand.read(site.end, min(strand.length, site.end + self.half_bp))
                samples.append(Sample(torch.cat([before, allele, behind]).numpy(), -1, False))
            batch = collate(samples)
            device = self.task.device
            probabilities = self.task.predict_proba(batch.tokens.to(device), batch.lengths.to(device))
            results |= {key: row for (key, _, _), row in zip(group, probabilities, strict=True)}
            advance(sum(key[1] == 0 for key, _, _ in group))
        return results

    def _continued(
        self, strand: Strand, sites: list[Site], advance: Callable[[int], None]
    ) -> dict[tuple[int, int], Tensor]:
        task, patch = self.task, self.task.embedding.patch
        half = -(-self.half_bp // patch)  # positions
        dtype = torch.bfloat16 if self.autocast else None
        state = task.backbone.init_state(1, task.device, dtype)
        position, recent = 0, deque[Tensor]()
        results: dict[tuple[int, int], Tensor] = {}
        waiting: list[_Row] = []
        for number in sorted(range(len(sites)), key=lambda i: sites[i].start):
            site = sites[number]
            first = site.start // patch  # the position that holds the variant's first base
            while position < first:
                end = min(position + self.chunk, first)
                y, state = task.backbone(task.embedding.span(strand.read, strand.length, position, end), state)
                recent.append(y[0])
                while sum(map(len, recent)) - len(recent[0]) >= half:
                    recent.popleft()
                position = end
            nothing = torch.zeros(0, task.backbone.d_out, device=task.device)
            left = torch.cat(list(recent))[-half:] if recent else nothing
            waiting += self._rows(strand, site, number, first, state, left)
            while len(waiting) >= self.batch_size:
                results |= self._read_on(waiting[: self.batch_size])
                del waiting[: self.batch_size]
            advance(1)
        if waiting:
            results |= self._read_on(waiting)
        return results

    def _rows(self, strand: Strand, site: Site, number: int, first: int, state: State, left: Tensor) -> list[_Row]:
        begin = first * self.task.embedding.patch
        look_back = self._look_back * self.task.embedding.patch
        # N before the record's start: to the embedding the same as nothing.
        missing = torch.full((max(0, look_back - begin),), N, dtype=torch.uint8)
        before = torch.cat([missing, strand.read(max(0, begin - look_back), site.start)])
        behind = strand.read(site.end, min(strand.length, site.end + self.half_bp))
        near = strand.read(max(0, begin - len(left) * self.task.embedding.patch - MOST_K), site.start)
        pooled = site.start - begin + len(left) * self.task.embedding.patch
        return [
            _Row(
                (number, i),
                torch.cat([before, allele, behind]),
                state,
                left,
                self._composition(torch.cat([near, allele, behind]), len(near) - pooled),
            )
            for i, allele in enumerate(site.alleles)
        ]

    def _composition(self, tokens: Tensor, start: int) -> Tensor:
        """(c,) logits of the k-mers of (l,) tokens that end at ``start`` or behind; zeros without them."""
        composition = self.task.composition
        if composition is None:
            return torch.zeros(len(self.task.labels), device=self.task.device)
        values, whole = composition.along(tokens)
        mean = values[start:].sum(0, dtype=torch.float64) / whole[start:].sum().clamp(min=1)
        return mean.float() + composition.bias

    @property
    def _look_back(self) -> int:
        """Positions before its own that a vector of the embedding depends on."""
        embedding = self.task.embedding
        return -(-embedding.reach[0] // embedding.patch)

    def _read_on(self, rows: list[_Row]) -> dict[tuple[int, int], Tensor]:
        task = self.task
        tokens = torch.nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True, padding_value=PAD)
        lengths = torch.tensor([len(row.tokens) for row in rows], device=task.device)
        x = task.embedding(tokens.to(task.device), lengths)[:, self._look_back :]
        state = {key: torch.cat([row.state[key] for row in rows]) for key in rows[0].state}
        y, _ = task.backbone(x, state)
        positions = (-(-lengths // task.embedding.patch) - self._look_back).tolist()
        # What is pooled lies side by side: the outputs before the variant, then the allele's own.
        whole = [torch.cat([row.left.to(y.dtype), part[:n]]) for row, part, n in zip(rows, y, positions, strict=True)]
        counts = torch.tensor([len(part) for part in whole], device=task.device)
        pooled = task.pooling(torch.nn.utils.rnn.pad_sequence(whole, batch_first=True), counts)
        logits = task.score(pooled) + torch.stack([row.composition for row in rows])
        probabilities = logits.double().softmax(-1)
        return {row.key: p for row, p in zip(rows, probabilities, strict=True)}


def log_odds_change(probabilities: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of each alternative less that of the reference: (1 + a, c) to (a, c), in nats."""
    p = probabilities.clip(1e-12, 1 - 1e-12)
    odds = np.log(p) - np.log1p(-p)
    return odds[1:] - odds[0]
