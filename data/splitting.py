"""Names of splits, and groups to splits at random but class by class."""

import zlib

import numpy as np

from seqssm.errors import UserError

DROP = "drop"
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    **{name: name for name in (*SPLITS, "drop")},
    **dict.fromkeys(("dev", "valid", "validate", "validation"), "val"),
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("testing",), "test"),
}


def split_name(name: str, where: str) -> str:
    """`train`, `val`, `test` or `drop` for a name or its usual synonyms; raises UserError for any other."""
    if name.lower() not in SPLIT_NAMES:
        raise UserError(f"{where}: unknown split {name!r}: use train, val, test or drop")
    return SPLIT_NAMES[name.lower()]


def check_fractions(fractions: dict[str, float]) -> dict[str, float]:
    """Shares by split name; raises UserError unless they are positive and sum to 1."""
    shares = {split_name(name, "split_fractions"): share for name, share in fractions.items()}
    if any(share < 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"split_fractions {fractions} must be positive and sum to 1")
    return shares


def divide_groups(groups: np.ndarray, labels: np.ndarray, shares: dict[str, float], seed: int) -> np.ndarray:
    """Divide groups at random, each class (or mixture of classes) by itself; every share gets at least one group of
    each class where there are enough of them."""
    label_sets: dict[str, set[str]] = {}
    for group, label in zip(groups, labels, strict=True):
        label_sets.setdefault(group, set()).add(label)
    strata: dict[tuple[str, ...], list[str]] = {}
    for group in sorted(label_sets):
        strata.setdefault(tuple(sorted(label_sets[group])), []).append(group)
    split_of: dict[str, str] = {}
    names = [name for name in (*SPLITS, DROP) if shares.get(name)]
    for stratum, members in strata.items():
        rng = np.random.default_rng([seed, zlib.crc32("\0".join(stratum).encode())])
        order = [members[i] for i in rng.permutation(len(members))]
        counts = apportion(len(members), [shares[name] for name in names])
        for name, count in zip(names, counts, strict=True):
            split_of.update(dict.fromkeys(order[:count], name))
            order = order[count:]
    return np.array([split_of[group] for group in groups], dtype=object)


def apportion(total: int, shares: list[float]) -> list[int]:
    """Whole numbers near total * shares that sum to total, none zero where that is possible (train comes first)."""
    counts = [int(total * share) for share in shares]
    for _ in range(total - sum(counts)):
        counts[int(np.argmax([total * s - c for s, c in zip(shares, counts, strict=True)]))] += 1
    for i in range(len(counts)):
        if counts[i] == 0 and max(counts) > 1:
            counts[int(np.argmax(counts))] -= 1
            counts[i] = 1
    return counts
