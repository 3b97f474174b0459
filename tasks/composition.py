"""What k-mers alone say of a sequence: a linear model that a classifier adds its own answer to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seqssm.tasks.dna_layers import kmer_ids

PIECE_BP = 1 << 22
"""Bases whose k-mers are numbered at once: what that takes in memory does not grow with the sequence."""


class Composition(nn.Module):
    """Class logits as the mean of a vector for each k-mer of a sequence, whichever strand it is read from.

    Linear in the shares of the k-mers, and so a k-mer logistic regression, once :meth:`take` has one. Its numbers are
    no parameters: training leaves them as they are.

    Args:
        k: bases a k-mer, 1 to 8.
        classes: number c of logits.
    """

    table: Tensor  # (4^k + 1, c), the last row for what is no k-mer
    bias: Tensor  # (c,)
    fitted: Tensor  # () bool

    def __init__(self, k: int, classes: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("table", torch.zeros(4**k + 1, classes))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("fitted", torch.tensor(False))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(b, c) logits of tokens (b, l) uint8, of which (b,) ``lengths`` are real; 0 without a whole k-mer."""
        batch, rows = len(tokens), len(self.table)
        counts = torch.zeros(batch, rows, dtype=torch.long, device=self.table.device)
        number = torch.arange(batch, device=self.table.device)[:, None] * rows
        for start in range(0, tokens.shape[1], PIECE_BP):
            first = max(0, start - self.k + 1)
            part = tokens[:, first : start + PIECE_BP].to(self.table.device)
            ids = kmer_ids(part, self.k)[:, start - first :]
            real = torch.arange(start, start + ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]
            ids = ids.masked_fill(~real, rows - 1) + number
            counts += torch.bincount(ids.flatten(), minlength=batch * rows).view(batch, rows)
        counts = counts[:, :-1].double()
        # In double: a long sequence has many k-mers, and their vectors nearly cancel.
        mean = counts @ self.table[:-1].double() / counts.sum(1, keepdim=True).clamp(min=1)
        return mean.to(self.table.dtype) + self.bias

    def along(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The vector of the k-mer that ends at each position, and whether there is one: (l,) uint8 to (l, c), (l,)."""
        ids = kmer_ids(tokens[None].to(self.table.device), self.k)[0]
        return self.table[ids], ids < len(self.table) - 1

    @torch.no_grad()
    def take(self, mean: np.ndarray, scale: np.ndarray, regression: Any) -> None:
        """Become a logistic regression on standardised shares of canonical k-mers.

        Args:
            mean, scale: (K,) of the shares, as :func:`seqssm.tasks.kmers.canonical_kmers` orders them.
            regression: scikit-learn's, fitted on (shares - mean) / scale, with all classes.
        """
        from seqssm.tasks.kmers import fold_kmers

        weights, intercept = regression.coef_, regression.intercept_
        if len(weights) == 1:  # of two classes, scikit-learn keeps the second's
            weights, intercept = np.concatenate([-weights, weights]) / 2, np.concatenate([-intercept, intercept]) / 2
        table = (weights / scale).T  # (K, c)
        self.table[:-1] = torch.from_numpy(table[fold_kmers(self.k)]).to(self.table)
        self.bias.copy_(torch.from_numpy(intercept - mean @ table))
        self.fitted.fill_(True)
