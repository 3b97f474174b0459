"""What stands before and after the backbone of a DNA classifier: tokens to vectors, positions to one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.data.dna.alphabet import VOCABULARY_SIZE, N, complement
from seqssm.errors import UserError

PoolingMode = Literal["mean", "max", "mean_max", "last"]


class SequenceEmbedding(nn.Module):
    """Tokens to vectors: what stands at a position, and what is near it.

    Args:
        d_model: width d of the vectors.
        kmer: add a vector for the k-mer that ends at each position, read along the strand; 1 for bases alone.
        motif: add a convolution so many bases wide over the one-hot bases; 0 for none.
        motif_layers: add so many convolutions of what stands near each other, one after another: motifs of motifs.
        patch: average so many neighbouring positions into one; 1 for none.
        positions: add a vector for each of so many places in the sequence, which then is no longer; 0 for none.
        causal: the convolution sees no later base, else it is centred.
        standardize: scale the vectors by their statistics over the real positions of training batches.
    """

    def __init__(
        self,
        d_model: int,
        kmer: int = 1,
        motif: int = 0,
        patch: int = 1,
        positions: int = 0,
        causal: bool = False,
        standardize: bool = False,
        motif_layers: int = 0,
    ) -> None:
        super().__init__()
        self.kmer, self.patch, self.causal = kmer, patch, causal
        self.bases = nn.Embedding(VOCABULARY_SIZE, d_model)
        nn.init.normal_(self.bases.weight, std=0.02)
        if kmer > 1:
            self.kmers = nn.Embedding(4**kmer + 1, d_model, padding_idx=4**kmer)
            nn.init.normal_(self.kmers.weight[:-1], std=0.02)
        # Means over a patch vary little: the usual epsilon would weigh as much as their variance.
        self.norm = nn.BatchNorm1d(d_model, eps=1e-8) if standardize else None
        self.places = nn.Parameter(torch.zeros(positions, d_model)) if positions else None
        self.motifs = nn.Conv1d(4, d_model, motif, bias=False) if motif else None
        self.before = 0 if not motif else motif - 1 if causal else motif // 2  # positions of a motif before its own
        self.combinations = nn.ModuleList(MotifCombination(d_model, causal) for _ in range(motif_layers))

    def forward(self, tokens: Tensor, lengths: Tensor, other_strand: bool = False) -> Tensor:
        """Embed sequences.

        Args:
            tokens: (b, l) uint8 token ids, padded on the right.
            lengths: (b,) real tokens of each sequence.
            other_strand: embed the complement of the tokens, as it is read from right to left.

        Returns:
            (b, ceil(l / patch), d)

        Raises:
            UserError: a sequence is longer than ``positions``.
        """
        if other_strand:
            tokens = complement(tokens)
        x = self._average(self.bases, tokens.long(), lengths)
        if self.kmer > 1:
            x = x + self._average(self.kmers, kmer_ids(tokens, self.kmer, reverse=other_strand), lengths)
        if self.motifs is not None:
            x = x + self._motifs(tokens, other_strand)
        if self.combinations:
            real = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
            for combination in self.combinations:
                x = combination(x, real, other_strand)
        if self.norm is not None:
            real = torch.arange(x.shape[1], device=x.device) < -(-lengths // self.patch)[:, None]
            x = torch.zeros_like(x).masked_scatter(real[..., None], self.norm(x[real]))
        if self.places is not None:
            x = x + self._places(tokens.shape[1], lengths, other_strand)
        return x

    def chunk(self, tokens: Tensor, lengths: Tensor, start: int, stop: int) -> Tensor:
        """What :meth:`forward` gives for tokens ``start`` to ``stop``, from these and the few before them alone.

        Args:
            tokens, lengths: as there, on any device; the part is moved to the module's.
            start: a multiple of ``patch``.
            stop: another, or the end.

        Returns:
            (b, ceil((stop - start) / patch), d). For causal embeddings without ``positions`` and ``standardize``.
        """
        before = min(start, -(-self.reach[0] // self.patch) * self.patch)
        part = tokens[:, start - before : stop].to(self.bases.weight.device)
        x = self(part, (lengths - (start - before)).clamp(0, part.shape[1]))
        return x[:, before // self.patch :]

    def span(
        self, read: Callable[[int, int], Tensor], length: int, start: int, end: int, other_strand: bool = False
    ) -> Tensor:
        """Embed a stretch of a long sequence as :meth:`forward` would within the whole of it.

        Args:
            read: gives the tokens (l,) uint8 of bases start to end.
            length: bases of the sequence.
            start, end: of the stretch, in positions (patches).
            other_strand: as in :meth:`forward`.

        Returns:
            (1, end - start, d)

        Raises:
            UserError: the model was made for aligned windows.
        """
        if self.places is not None:
            raise UserError(
                f"this model was made for windows of up to {len(self.places)} bp that are aligned (model.positions), "
                "not for long sequences; train one with model.positions: 0"
            )
        before, after = self.reach[::-1] if other_strand else self.reach
        first = max(0, start - -(-before // self.patch))
        last_base = min(length, end * self.patch + after)
        device = self.bases.weight.device
        tokens = read(first * self.patch, last_base).to(device)[None]
        x = self(tokens, torch.tensor([tokens.shape[1]], device=device), other_strand)
        return x[:, start - first : end - first]

    @property
    def reach(self) -> tuple[int, int]:
        """Bases before and behind its own, along the strand, that a position's vector depends on."""
        behind = 0 if self.motifs is None else self.motifs.kernel_size[0] - 1 - self.before
        combined = [cast(MotifCombination, combination).reach for combination in self.combinations]
        before = max(self.kmer - 1, self.before) + sum(one for one, _ in combined)
        return before, behind + sum(other for _, other in combined)

    def _places(self, length: int, lengths: Tensor, reverse: bool) -> Tensor:
        """(1 or b, l, d)"""
        assert self.places is not None
        if length > len(self.places):
            raise UserError(
                f"a window of {length} bp is longer than the model's {len(self.places)} positions: "
                "set model.positions to the window's length, or to 0 if windows are not aligned"
            )
        if not reverse:
            return self.places[None, :length]
        along = lengths[:, None] - 1 - torch.arange(length, device=lengths.device)  # negative in the padding
        return self.places[along.clamp(min=0)]

    def _motifs(self, tokens: Tensor, reverse: bool) -> Tensor:
        """(b, l, d)"""
        assert self.motifs is not None
        one_hot = F.one_hot(tokens.long(), VOCABULARY_SIZE)[..., :4].to(self.motifs.weight.dtype)  # anything else: 0
        if reverse:
            one_hot = one_hot.flip(1)
        width = self.motifs.kernel_size[0]
        x = self.motifs(F.pad(one_hot.mT, (self.before, width - 1 - self.before))).mT
        return x.flip(1) if reverse else x

    def _average(self, embedding: nn.Embedding, ids: Tensor, lengths: Tensor) -> Tensor:
        """Embed (b, l) ids and average each patch over its real positions: (b, ceil(l / patch), d)."""
        if self.patch == 1:
            return embedding(ids)
        batch, length = ids.shape
        patches = -(-length // self.patch)
        ids = F.pad(ids, (0, patches * self.patch - length))
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        count = real.view(batch, patches, -1).sum(-1).clamp(min=1)  # (b, patches)
        weights = (real / count.repeat_interleave(self.patch, 1)).to(embedding.weight.dtype)
        # A bag sums its rows without writing (b, l, d) to memory.
        bags = F.embedding_bag(
            ids.view(-1, self.patch),
            embedding.weight,
            mode="sum",
            per_sample_weights=weights.view(-1, self.patch),
            padding_idx=embedding.padding_idx,
        )
        return bags.view(batch, patches, -1)


class MotifCombination(nn.Module):
    """x + conv(gelu(norm(x))): what stands near each other, in which order and at which distance.

    Args:
        d_model: width d.
        causal: see no later position, else as many on either side.
        width: positions that are seen.
    """

    def __init__(self, d_model: int, causal: bool, width: int = 5) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.convolution = nn.Conv1d(d_model, d_model, width)
        self.reach = (width - 1, 0) if causal else (width // 2, width - 1 - width // 2)

    def forward(self, x: Tensor, real: Tensor, reverse: bool = False) -> Tensor:
        """(b, l, d) to the same; real (b, l, 1) says what is no padding, ``reverse`` to read from right to left."""
        seen = F.gelu(self.norm(x)).masked_fill(~real, 0).mT  # (b, d, l)
        seen = self.convolution(F.pad(seen.flip(-1) if reverse else seen, self.reach))
        return x + (seen.flip(-1) if reverse else seen).mT


class Pooling(nn.Module):
    """Positions to one vector, in float32 or wider; padding does not count.

    Args:
        mode: the mean, the maximum, both side by side, or the last real position (for causal models).
        bins: pool each of so many equal parts of the sequence by itself, and put them side by side: keeps where
            something is, for sequences that are aligned. A part without a position gives zeros.
        strands: positions hold two strands, (b, l, 2d); their vectors are averaged. The second is read from its other
            end, so that exchanging the strands of a reverse-complement-equivariant backbone changes nothing.
    """

    def __init__(self, mode: PoolingMode, bins: int = 1, strands: bool = False) -> None:
        super().__init__()
        self.mode, self.bins, self.strands = mode, bins, strands
        self.width = (2 if mode == "mean_max" else 1) * bins  # vectors side by side

    def forward(self, y: Tensor, lengths: Tensor) -> Tensor:
        """(b, l, d), or (b, l, 2d) with strands, of which (b,) ``lengths`` are real, to (b, width * d)."""
        if not self.strands:
            return self._pool(y, lengths, from_end=False)
        first, second = y.chunk(2, dim=-1)
        return (self._pool(first, lengths, from_end=False) + self._pool(second, lengths, from_end=True)) / 2

    def _pool(self, y: Tensor, lengths: Tensor, from_end: bool) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        if self.mode == "last":
            last = torch.zeros_like(lengths) if from_end else lengths - 1
            return y[torch.arange(len(y), device=y.device), last].to(wide)
        if self.bins > 1:
            return self._pool_bins(y, lengths, from_end, wide)
        real = torch.arange(y.shape[1], device=y.device) < lengths[:, None]  # (b, l)
        members = None if bool(real.all()) else real
        pooled = []
        if self.mode != "max":
            pooled.append(self._mean(y, members, wide))
        if self.mode != "mean":
            pooled.append(self._max(y, members).to(wide))
        return torch.cat(pooled, dim=-1)

    def _pool_bins(self, y: Tensor, lengths: Tensor, from_end: bool, wide: torch.dtype) -> Tensor:
        """All bins at once, each as wide as the widest can be: a few kernels, however many bins there are."""
        edges = self._edges(lengths)  # (b, bins + 1)
        widest = -(-y.shape[1] // self.bins)
        along = edges[:, :-1, None] + torch.arange(widest, device=y.device)  # (b, bins, widest)
        inside = (along < edges[:, 1:, None])[..., None]
        position = lengths[:, None, None] - 1 - along if from_end else along
        rows = torch.arange(len(y), device=y.device)[:, None, None]
        parts = y[rows, position.clamp(0, y.shape[1] - 1)]  # (b, bins, widest, d)
        count = edges.diff(dim=1)[..., None]
        pooled = []
        if self.mode != "max":
            pooled.append(parts.masked_fill(~inside, 0).sum(2, dtype=wide) / count.clamp(min=1))
        if self.mode != "mean":
            pooled.append(parts.masked_fill(~inside, -torch.inf).amax(2).masked_fill(count == 0, 0).to(wide))
        return torch.cat(pooled, dim=1).flatten(1)

    def _edges(self, lengths: Tensor) -> Tensor:
        """(b, bins + 1): bin i takes positions edge i to edge i + 1."""
        return -(-torch.arange(self.bins + 1, device=lengths.device) * lengths[:, None] // self.bins)

    # ---- chunk by chunk, for one strand ----------------------------------------------------------------------------

    def start(self, lengths: Tensor, d_model: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """What :meth:`update` starts from: sums (in float64), maxima or the last position of no positions yet.

        Args:
            lengths: (b,) positions that each sequence will have.
            d_model: width d.
            dtype: of the result, at least float32.
        """
        shape, device = (len(lengths), self.bins, d_model), lengths.device
        if self.mode == "last":
            return {"last": torch.zeros(shape[0], d_model, dtype=dtype, device=device)}
        gathered = {}
        if self.mode != "max":
            gathered["sum"] = torch.zeros(shape, dtype=torch.float64, device=device)
        if self.mode != "mean":
            gathered["max"] = torch.full(shape, -torch.inf, dtype=dtype, device=device)
        return gathered

    def update(
        self, gathered: dict[str, Tensor], y: Tensor, lengths: Tensor, start: int, real: bool = False
    ) -> dict[str, Tensor]:
        """Add positions ``start`` to ``start + l``, y (b, l, d), of sequences of (b,) ``lengths``.

        ``real`` says that none of them is padding, and saves the passes over y that hide it. Where two chunks attain a
        maximum exactly, each takes half of its gradient.
        """
        wide = torch.promote_types(y.dtype, torch.float32)
        if self.mode == "last":
            at = lengths - 1 - start
            inside = (at >= 0) & (at < y.shape[1])
            own = y[torch.arange(len(y), device=y.device), at.clamp(0, y.shape[1] - 1)].to(wide)
            return {"last": torch.where(inside[:, None], own, gathered["last"])}
        position = start + torch.arange(y.shape[1], device=y.device)[None]  # (1, l)
        part: list[Tensor | None] = [None]
        if self.bins > 1 or not real:
            inside = position < lengths[:, None]  # (b, l)
            number = (position * self.bins).div(lengths[:, None], rounding_mode="floor")
            part = [inside & (number == i) for i in range(self.bins)]
        new = {}
        if "sum" in gathered:
            sums = [_only(y, members, 0).sum(1, dtype=wide) for members in part]
            new["sum"] = gathered["sum"] + torch.stack(sums, 1)
        if "max" in gathered:
            peaks = [_only(y, members, -torch.inf).amax(1) for members in part]
            new["max"] = torch.maximum(gathered["max"], torch.stack(peaks, 1).to(wide))
        return new

    def finish(self, gathered: dict[str, Tensor], lengths: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, width * d), as :meth:`forward` gives it."""
        if self.mode == "last":
            return gathered["last"]
        count = self._edges(lengths).diff(dim=1)[..., None]
        pooled = []
        if "sum" in gathered:
            pooled.append((gathered["sum"] / count.clamp(min=1)).to(dtype))
        if "max" in gathered:
            pooled.append(gathered["max"].masked_fill(count == 0, 0))
        return torch.cat(pooled, dim=1).flatten(1)

    @staticmethod
    def _mean(y: Tensor, members: Tensor | None, wide: torch.dtype) -> Tensor:
        if members is None:
            return y.mean(1, dtype=wide)
        return y.masked_fill(~members[..., None], 0).sum(1, dtype=wide) / members.sum(1, keepdim=True).clamp(min=1)

    @staticmethod
    def _max(y: Tensor, members: Tensor | None) -> Tensor:
        if members is None:
            return y.amax(1)
        peak = y.masked_fill(~members[..., None], -torch.inf).amax(1)
        return peak.masked_fill(~members.any(1, keepdim=True), 0)


def _only(y: Tensor, members: Tensor | None, other: float) -> Tensor:
    """y (b, l, d) with ``other`` where ``members`` (b, l) are false; None for all."""
    return y if members is None else y.masked_fill(~members[..., None], other)


def kmer_ids(tokens: Tensor, k: int, reverse: bool = False) -> Tensor:
    """Number of the k-mer that ends at each position.

    Args:
        tokens: (b, l) integer token ids.
        k: bases a k-mer.
        reverse: read from right to left, so that a k-mer ends at its leftmost position.

    Returns:
        (b, l) int64: 0 to 4**k - 1, or 4**k where the k-mer leaves the sequence or holds anything but A, C, G and T.
    """
    length = tokens.shape[1]
    ids = torch.zeros(tokens.shape, dtype=torch.long, device=tokens.device)
    whole = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    for i in range(k):
        # Position t sees token t - i, or t + i in reverse; what lies outside is no base.
        shifted = F.pad(tokens[:, i:], (0, i), value=N) if reverse else F.pad(tokens, (i, 0), value=N)[:, :length]
        shifted = shifted[:, :length]
        ids += shifted.long() << (2 * i)
        whole &= shifted < N
    return ids.masked_fill(~whole, 4**k)
