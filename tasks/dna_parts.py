"""A DNA classifier whose sequences are split over processes: each embeds and pools its part of the length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqssm.errors import UserError
from seqssm.longcontext.parallel import LengthSplit, split_mixers
from seqssm.tasks.dna_layers import Pooling, SequenceEmbedding

if TYPE_CHECKING:
    from seqssm.tasks.dna import DNAClassification


def split_classifier(task: DNAClassification, split: LengthSplit) -> None:
    """Let the backbone of a classifier run over a split length.

    Raises:
        UserError: the model needs all of a sequence in one place.
    """
    task.check_single()
    if task.embedding.norm is not None:
        raise UserError("model.standardize takes statistics of whole sequences: set it to false, or do not split them")
    if task.embedding.places is not None:
        raise UserError("model.positions are for short windows: set them to 0, or do not split the length")
    if task.chunk_length:
        raise UserError(
            "model.chunk_length trains long sequences on one device: set it to 0, or do not split the length"
        )
    split_mixers(task.backbone, split)


def pool_part(task: DNAClassification, tokens: Tensor, lengths: Tensor, split: LengthSplit) -> Tensor:
    """The pooled vectors of whole sequences, from the part of them that this process runs.

    Args:
        task: after :func:`split_classifier`.
        tokens: (b, l) uint8 token ids, whole and the same in all processes.
        lengths: (b,) real tokens of each sequence.
        split: the processes.

    Returns:
        (b, width), the same in all processes.
    """
    patch = task.patch
    positions = -(-tokens.shape[1] // patch)
    start, end = split.bounds(positions)
    x = embed_part(task.embedding, tokens, lengths, start, end)
    if task.backbone_config.reverse_complement:
        x = torch.cat([x, embed_part(task.embedding, tokens, lengths, start, end, other_strand=True)], dim=-1)
    lengths = -(-lengths // patch)
    seq_idx = None
    # Said of the whole batch: all processes must come to the same answer.
    if not task.backbone.causal and not bool((lengths == positions).all()):
        seq_idx = (torch.arange(start, end, device=x.device) >= lengths[:, None]).to(torch.int32)
    y, _ = task.backbone(x, seq_idx=seq_idx)
    return pool_parts(task.pooling, y, lengths, start, split)


def embed_part(
    embedding: SequenceEmbedding, tokens: Tensor, lengths: Tensor, start: int, end: int, other_strand: bool = False
) -> Tensor:
    """Positions ``start`` to ``end`` of what the embedding makes of the whole sequences: (b, end - start, d)."""
    patch = embedding.patch
    margin = -(-max(embedding.reach) // patch)  # positions on either side that the part looks at
    first = max(0, start - margin)
    seen = tokens[:, first * patch : (end + margin) * patch]
    x = embedding(seen, (lengths - first * patch).clamp(0, seen.shape[1]), other_strand)
    return x[:, start - first : end - first]


def pool_parts(pooling: Pooling, y: Tensor, lengths: Tensor, start: int, split: LengthSplit) -> Tensor:
    """:class:`~seqssm.tasks.dna_layers.Pooling` over all parts, of which y (b, part, d) begins at ``start``."""
    if not pooling.strands:
        return _pool_parts(pooling, y, lengths, start, split, from_end=False)
    one, other = y.chunk(2, dim=-1)
    pooled = _pool_parts(pooling, one, lengths, start, split, from_end=False)
    return (pooled + _pool_parts(pooling, other, lengths, start, split, from_end=True)) / 2


def _pool_parts(pooling: Pooling, y: Tensor, lengths: Tensor, start: int, split: LengthSplit, from_end: bool) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    position = torch.arange(start, start + y.shape[1], device=y.device)[None]  # (1, part)
    if pooling.mode == "last":
        last = torch.zeros_like(lengths) if from_end else lengths - 1
        return split.gather(_where(position == last[:, None], y, 0).sum(1, dtype=wide)).sum(0)
    real = position < lengths[:, None]  # (b, part)
    along = lengths[:, None] - 1 - position if from_end else position
    number = (along * pooling.bins).div(lengths[:, None], rounding_mode="floor")
    members = [real & (number == i) for i in range(pooling.bins)]
    count = split.all_reduce(torch.stack([m.sum(1, keepdim=True) for m in members]))  # (bins, b, 1)
    pooled: list[Tensor] = []
    if pooling.mode != "max":
        sums = torch.stack([_where(m, y, 0).sum(1, dtype=wide) for m in members])
        pooled += (split.gather(sums).sum(0) / count.clamp(min=1)).unbind(0)
    if pooling.mode != "mean":
        peaks = torch.stack([_where(m, y, -torch.inf).amax(1).to(wide) for m in members])
        pooled += torch.where(count > 0, split.gather(peaks).amax(0), 0).unbind(0)
    return torch.cat(pooled, dim=-1)


def _where(members: Tensor, y: Tensor, other: float) -> Tensor:
    """y (b, part, d) where its position is a member (b, part), else ``other``; no copy where all are."""
    return y if bool(members.all()) else y.masked_fill(~members[..., None], other)
