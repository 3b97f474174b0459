"""Clips to train, validation and test: by the data set's own split, by fold, by what they were cut from, or by file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from seqssm.data.audio.layouts import Clip
from seqssm.data.splitting import DROP, SPLITS, check_fractions, divide_groups
from seqssm.errors import UserError

METHODS = ("auto", "column", "fold", "group", "file")


@dataclass(frozen=True)
class AudioSplitPlan:
    """How clips are divided; `AudioTaggingDataModule` says what each field does."""

    method: str = "auto"
    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.7, "val": 0.15, "test": 0.15})
    test_folds: list[str] | None = None
    val_folds: list[str] | None = None
    val_fraction: float = 0.15
    seed: int = 0


def split_clips(clips: Sequence[Clip], plan: AudioSplitPlan, several: bool) -> tuple[np.ndarray, str]:
    """The split of each clip, of `train`, `val`, `test` and `drop`, and how it was made, in words.

    Args:
        clips: all of them.
        plan: how.
        several: clips have any number of labels. Groups are then balanced over the classes; otherwise each class is
            divided by itself, and a group with clips of several classes goes to train.

    Raises:
        UserError: the clips lack the split or the folds asked for.
    """
    method = _method(clips, plan)
    if method == "column":
        missing = [clip for clip in clips if not clip.split]
        if missing:
            raise UserError(
                f"{missing[0].name} has no split ({len(missing)} such): fill in the column, or set split_by"
            )
        split, said = np.array([clip.split for clip in clips], object), "the data set's own split"
    elif method == "fold":
        split, said = _by_fold(clips, plan)
    else:
        units = [clip.group if method == "group" else str(clip.path) for clip in clips]
        split = _divide(clips, units, check_fractions(plan.fractions), plan.seed, several)
        said = "sources at random, class by class" if method == "group" else "files at random, class by class"
        if len(set(units)) == len(units):
            said = (
                "clips at random, class by class: each is a source of its own (else set group_column or group_pattern)"
            )
    train = split == "train"
    if method in ("column", "fold") and plan.val_fraction and train.any() and not (split == "val").any():
        shares = {"train": 1 - plan.val_fraction, "val": plan.val_fraction}
        some = [clip for clip, one in zip(clips, train, strict=True) if one]
        split[train] = _divide(some, [clip.group or str(clip.path) for clip in some], shares, plan.seed, several)
        said += f", {plan.val_fraction:.0%} of train held out by source for validation"
    return split, said


def _method(clips: Sequence[Clip], plan: AudioSplitPlan) -> str:
    if plan.method not in METHODS:
        raise UserError(f"split_by is {plan.method!r}: choose one of {', '.join(METHODS)}")
    if plan.method != "auto":
        return plan.method
    if plan.test_folds is not None or plan.val_folds is not None:
        return "fold"
    if any(clip.split for clip in clips):
        return "column"
    return "fold" if all(clip.fold for clip in clips) else "group"


def _by_fold(clips: Sequence[Clip], plan: AudioSplitPlan) -> tuple[np.ndarray, str]:
    bare = [clip for clip in clips if not clip.fold]
    if bare:
        raise UserError(
            f"{bare[0].name} has no fold ({len(bare)} of {len(clips)} clips): add a column `fold`, or set split_by"
        )
    folds = sorted({clip.fold for clip in clips}, key=lambda fold: (len(fold), fold))
    test = folds[-1:] if plan.test_folds is None else [str(fold) for fold in plan.test_folds]
    left = [fold for fold in folds if fold not in test]
    val = (left[-1:] if len(left) > 1 else []) if plan.val_folds is None else [str(fold) for fold in plan.val_folds]
    for name, chosen in (("test_folds", test), ("val_folds", val)):
        unknown = sorted(set(chosen) - set(folds))
        if unknown:
            raise UserError(f"{name} names fold {', '.join(unknown)}; the data has folds {', '.join(folds)}")
    both = sorted(set(test) & set(val))
    if both:
        raise UserError(f"fold {', '.join(both)} is in both test_folds and val_folds: keep it in one")
    where = {**dict.fromkeys(folds, "train"), **dict.fromkeys(val, "val"), **dict.fromkeys(test, "test")}
    split = np.array([where[clip.fold] for clip in clips], object)
    return split, f"folds: test {', '.join(test) or 'none'}, validation {', '.join(val) or 'none'}, train the rest"


def _divide(
    clips: Sequence[Clip], units: Sequence[str], shares: dict[str, float], seed: int, several: bool
) -> np.ndarray:
    if several:
        return stratify(clips, units, shares, seed)
    labels_of: dict[str, set[str]] = {}
    for clip, unit in zip(clips, units, strict=True):
        labels_of.setdefault(unit, set()).update(clip.labels)
    single = [i for i, unit in enumerate(units) if len(labels_of[unit]) == 1]
    split = np.full(len(clips), "train", object)
    groups = np.array([units[i] for i in single], object)
    labels = np.array([clips[i].labels[0] for i in single], object)
    split[single] = divide_groups(groups, labels, shares, seed)
    return split


def stratify(clips: Sequence[Clip], units: Sequence[str], shares: dict[str, float], seed: int) -> np.ndarray:
    """Divide groups of clips with several labels each so that every class is divided alike: iterative stratification
    (Sechidis et al., ECML 2011), the rarest class first, over whole groups."""
    counts: dict[str, Counter[str]] = {}  # clips of each class in each unit; "" counts all clips
    for clip, unit in zip(clips, units, strict=True):
        counts.setdefault(unit, Counter()).update([*clip.labels, ""])
    names = sorted(counts)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    having: dict[str, list[str]] = {}
    left = Counter[str]()
    for unit in order:
        left.update(counts[unit])
        for label in counts[unit]:
            having.setdefault(label, []).append(unit)
    splits = [name for name in (*SPLITS, DROP) if shares.get(name)]
    wanted = {split: {label: shares[split] * left[label] for label in left} for split in splits}
    split_of: dict[str, str] = {}
    while left[""]:
        rarest = min((label for label in left if label and left[label]), key=lambda one: (left[one], one), default="")
        for unit in having[rarest]:
            if unit in split_of:
                continue
            split = max(splits, key=lambda name: (wanted[name][rarest], wanted[name][""]))
            split_of[unit] = split
            left.subtract(counts[unit])
            for label, count in counts[unit].items():
                wanted[split][label] -= count
    return np.array([split_of[unit] for unit in units], object)


def check_classes(clips: Sequence[Clip], split: np.ndarray, labels: Sequence[str], least: int) -> None:
    """Raises UserError naming every class with fewer than `least` clips in a split that has any clips."""
    lacking = []
    for name in SPLITS:
        counts = Counter(label for clip, at in zip(clips, split, strict=True) if at == name for label in clip.labels)
        if (split == name).any():
            lacking += [f"{label!r} has {counts[label]} in {name}" for label in labels if counts[label] < least]
    if lacking:
        raise UserError(
            f"too few clips of a class in a split ({least} needed): {', '.join(lacking)}; add clips, change the split, "
            "leave classes out with classes, or lower min_class_clips"
        )
