"""Markov chains over bases: what a language model of DNA has to beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numba
import numpy as np
from numpy.typing import NDArray

from seqssm.data.dna.alphabet import COMPLEMENT

MAX_ORDER = 10
PRIORS = (1.0, 8.0, 64.0)
BASES = 4

Sequences = Iterable[NDArray[np.uint8]]
"""Token arrays (l,): 0 to 3 are bases, all above are none."""


class MarkovChain:
    """A base given the ``order`` bases before it, each order smoothed by the one below.

    p_k(x | c) = (n(c, x) + a · p_{k-1}(x | c')) / (n(c) + a), where c' is c without its first base: a Dirichlet prior
    of weight a (MacKay and Peto, 1995, "A hierarchical Dirichlet language model"). Where fewer bases are known, at a
    window's start and behind an N, the order is as high as they allow.

    Args:
        max_order: longest context that is counted, up to 12; :meth:`choose` may settle for less.
        both_strands: count both strands, for a model that was trained on both.
    """

    def __init__(self, max_order: int = MAX_ORDER, both_strands: bool = False) -> None:
        if not 0 <= max_order <= 12:
            raise ValueError(f"max_order is {max_order}, not 0 to 12")
        self.max_order, self.both_strands = max_order, both_strands
        self.order, self.prior = max_order, PRIORS[1]
        self._counts = np.zeros(BASES ** (max_order + 1), np.int64)
        self._table = np.zeros(0)

    def fit(self, sequences: Sequences, advance: Callable[[int], None] = lambda windows: None) -> MarkovChain:
        """Count training windows; ``advance`` is told of each."""
        for tokens in sequences:
            _count(np.ascontiguousarray(tokens), self.max_order, self._counts)
            if self.both_strands:
                _count(np.ascontiguousarray(COMPLEMENT[tokens][::-1]), self.max_order, self._counts)
            advance(1)
        self._table = self._log_probabilities()
        return self

    def choose(self, sequences: Sequences) -> MarkovChain:
        """Take the order and the prior that predict validation windows best."""
        windows = list(sequences)
        best = np.inf
        for prior in PRIORS:
            self.prior, self.order = prior, self.max_order
            table = self._log_probabilities()
            for order in range(self.max_order + 1):
                total = sum(float(np.nansum(_nll(tokens, order, table))) for tokens in windows)
                if total < best:
                    best, chosen, kept = total, (order, prior), table
        (self.order, self.prior), self._table = chosen, kept
        return self

    def nll(self, tokens: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(l,) negative log-likelihood of each base in nats; NaN where there is none."""
        return _nll(np.ascontiguousarray(tokens), self.order, self._table)

    def _log_probabilities(self) -> NDArray[np.float64]:
        """Tables of orders 0 to max_order, one after the other: 4^(k+1) numbers of order k."""
        counts = [self._counts.reshape(-1, BASES)]
        for _ in range(self.max_order):
            counts.append(counts[-1].reshape(BASES, -1, BASES).sum(0))  # the first base of the context left out
        below = np.full((1, BASES), 1 / BASES)
        tables = []
        for order, table in enumerate(reversed(counts)):
            expected = below if order == 0 else np.tile(below, (BASES, 1))
            below = (table + self.prior * expected) / (table.sum(1, keepdims=True) + self.prior)
            tables.append(np.log(below).ravel())
        return np.concatenate(tables)


@numba.njit(nogil=True)
def _count(tokens: NDArray[np.uint8], order: int, counts: NDArray[np.int64]) -> None:
    mask, code, run = len(counts) - 1, 0, 0
    for token in tokens:
        if token < 4:
            code = (code * 4 + token) & mask
            run += 1
            if run > order:
                counts[code] += 1
        else:
            run = 0


@numba.njit(nogil=True)
def _nll(tokens: NDArray[np.uint8], order: int, table: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.full(len(tokens), np.nan)
    mask, code, run = 4 ** (order + 1) - 1, 0, 0
    for t in range(len(tokens)):
        if tokens[t] < 4:
            code = (code * 4 + tokens[t]) & mask
            known = min(run, order)
            size = 4 ** (known + 1)
            # Orders below take 4 + 16 + ... + 4^known numbers.
            result[t] = -table[(size - 4) // 3 + (code & (size - 1))]
            run += 1
        else:
            run = 0
    return result
