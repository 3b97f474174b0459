"""Utterances to train, validation and test: by the data set's own split, or by speaker, text or file at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from seqssm.data.speech.manifests import Utterance
from seqssm.data.splitting import check_fractions, divide_groups
from seqssm.errors import UserError

METHODS = ("auto", "column", "speaker", "text", "file")
LEAST_SPEAKERS = 10  # from which on `auto` divides by speaker


@dataclass(frozen=True)
class SpeechSplitPlan:
    """How utterances are divided; `SpeechDataModule` says what each field does."""

    method: str = "auto"
    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    val_fraction: float = 0.1
    seed: int = 0


def split_utterances(utterances: Sequence[Utterance], plan: SpeechSplitPlan) -> tuple[np.ndarray, str]:
    """The split of each utterance, of `train`, `val`, `test` and `drop`, and how it was made, in words.

    Raises:
        UserError: an utterance lacks the split or the speaker that this needs.
    """
    if plan.method not in METHODS:
        raise UserError(f"split_by is {plan.method!r}: choose one of {', '.join(METHODS)}")
    method = plan.method
    if method == "auto":
        method = "column" if any(one.split for one in utterances) else _best_unit(utterances)
    if method != "column":
        return _divide(utterances, method, check_fractions(plan.fractions), plan.seed), f"{method}s at random"
    bare = [one for one in utterances if not one.split]
    if bare:
        raise UserError(f"{bare[0].where} has no split ({len(bare)} such): fill in the column, or set split_by")
    split, said = np.array([one.split for one in utterances], object), "the data set's own split"
    train = split == "train"
    if plan.val_fraction and train.any() and not (split == "val").any():
        some = [one for one, is_train in zip(utterances, train, strict=True) if is_train]
        unit = _best_unit(some)
        shares = {"train": 1 - plan.val_fraction, "val": plan.val_fraction}
        split[train] = _divide(some, unit, shares, plan.seed)
        said += f", {plan.val_fraction:.0%} of train's {unit}s held out for validation"
    return split, said


def _best_unit(utterances: Sequence[Utterance]) -> str:
    speakers = {one.speaker for one in utterances}
    return "speaker" if "" not in speakers and len(speakers) >= LEAST_SPEAKERS else "text"


def _divide(utterances: Sequence[Utterance], unit: str, shares: dict[str, float], seed: int) -> np.ndarray:
    if unit == "speaker" and (bare := [one for one in utterances if not one.speaker]):
        raise UserError(f"{bare[0].where} has no speaker ({len(bare)} such): fill in the column, or set split_by")
    of = {"speaker": lambda one: one.speaker, "text": lambda one: one.text, "file": lambda one: str(one.path)}[unit]
    units = np.array([of(one) for one in utterances], object)
    return divide_groups(units, np.full(len(units), "", object), shares, seed)
