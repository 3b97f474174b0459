"""Packed sequences for mixers whose kernels know none: each segment becomes a row of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentGroup:
    """Segments of like length, to be run as one batch.

    Attributes:
        index: (s, m) positions in the flattened (b·l) batch, clamped past the end of a segment.
        real: (s, m) whether the position belongs to the segment; the rest is padding on the right.
        rows: (s,) the row of the batch that each segment lies in.
        first: (s,) whether it is the first of its row, the one that continues a state.
    """

    index: Tensor
    real: Tensor
    rows: Tensor
    first: Tensor

    def take(self, x: Tensor) -> Tensor:
        """x (b, l, ...) -> (s, m, ...), zero at padding."""
        taken = x.flatten(0, 1)[self.index]
        return taken.masked_fill(~self.real.reshape(self.real.shape + (1,) * (taken.dim() - 2)), 0)


def by_segment(function: Callable[[SegmentGroup], Tensor], seq_idx: Tensor) -> Tensor:
    """Run ``function`` on each group of segments, (s, m, ...) each, and put the results back, (b, l, ...).

    Groups hold lengths within a factor of two, so that padding at most doubles the work.
    """
    batch, length = seq_idx.shape
    start = torch.ones_like(seq_idx, dtype=torch.bool)
    start[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = start.flatten().nonzero().squeeze(1)  # (segments,)
    lengths = torch.diff(starts, append=starts.new_tensor([batch * length]))
    doublings = torch.ceil(torch.log2(lengths.double())).long()
    outputs, order = [], []
    for doubling in doublings.unique().tolist():
        members = doublings == doubling
        begin, size = starts[members, None], lengths[members, None]
        offset = torch.arange(int(size.max()), device=seq_idx.device)
        index = begin + torch.minimum(offset, size - 1)
        rows = begin.squeeze(1) // length
        group = SegmentGroup(index, offset < size, rows, begin.squeeze(1) == rows * length)
        outputs.append(function(group)[group.real])
        order.append(index[group.real])
    inverse = torch.cat(order).argsort()
    return torch.cat(outputs)[inverse].unflatten(0, (batch, length))


def last_segment(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """(b,) lengths of the last segment of each row, and (b,) whether it fills the row."""
    length = seq_idx.shape[1]
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    position = torch.arange(1, length, device=seq_idx.device) * changes  # where each segment but the first starts
    begin = position.amax(1) if length > 1 else seq_idx.new_zeros(seq_idx.shape[0], dtype=torch.long)
    return length - begin, begin == 0
