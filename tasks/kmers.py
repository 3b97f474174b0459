"""Counting k-mers of token arrays, both strands as one."""

from collections.abc import Sequence
from functools import cache

import numba
import numpy as np
from numpy.typing import NDArray

N_BASES = 4  # tokens 0..3 are A, C, G, T; what lies above is no base, and no k-mer holds it


def canonical_kmers(sequences: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], k: int) -> NDArray[np.float32]:
    """Share of every k-mer in each sequence, a k-mer and its reverse complement counted as one.

    Args:
        sequences: token arrays (l,), of any and different lengths, memory maps included; or one array (n, l).
            Tokens above 3 (N, padding) break the k-mers that would hold them.
        k: 1 to 8.

    Returns:
        (n, K) with K = 4^k / 2 for odd k and (4^k + 2^k) / 2 for even k, in lexicographic order of the smaller of
        the two. Rows sum to 1; a sequence without a k-mer gives zeros.
    """
    fold = fold_kmers(k)
    shares = np.zeros((len(sequences), int(fold.max()) + 1), np.float32)
    for row in range(len(sequences)):
        counts = np.bincount(fold, weights=_count(np.asarray(sequences[row]), k))
        shares[row] = counts / max(counts.sum(), 1)
    return shares


@cache
def fold_kmers(k: int) -> NDArray[np.int64]:
    """(4^k,) index, among the canonical k-mers, of every k-mer."""
    if not 1 <= k <= 8:
        raise ValueError(f"k is {k}, not 1 to 8")
    codes = np.arange(N_BASES**k)
    reverse, rest = np.zeros_like(codes), codes.copy()
    for _ in range(k):
        reverse = reverse * N_BASES + (N_BASES - 1 - rest % N_BASES)  # the complement of base x is 3 - x
        rest //= N_BASES
    return np.unique(np.minimum(codes, reverse), return_inverse=True)[1]


@numba.njit(nogil=True)
def _count(tokens: NDArray[np.uint8], k: int) -> NDArray[np.int64]:
    counts = np.zeros(4**k, np.int64)
    mask = 4**k - 1
    code = 0
    run = 0  # bases since the last token that is none
    for token in tokens:
        if token < 4:
            code = (code * 4 + token) & mask
            run += 1
            if run >= k:
                counts[code] += 1
        else:
            run = 0
    return counts
