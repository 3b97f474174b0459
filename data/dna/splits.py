"""Regions to train, validation and test: by column, rule, group or position."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from seqssm.data.dna.library import Library, Regions
from seqssm.data.splitting import SPLITS, check_fractions, divide_groups, split_name
from seqssm.errors import UserError


@dataclass(frozen=True)
class SplitPlan:
    """How regions are divided; at most one of `rules`, `positions` and `group`, else the split column, else records.

    rules: ordered `{split: NAME, COLUMN: REGEX, ...}`; the first whose expressions all match whole values decides.
    positions: `{split: [from, to]}` in fractions of each record; `guard_bp` is kept clear between two splits.
    group: the column whose values stay together, divided at random by `fractions`, class by class.
    val_fraction: held out of train, by record, where a column or rules leave no validation split.
    """

    column: str = "split"
    rules: list[dict[str, str | int]] | None = None
    positions: dict[str, list[float]] | None = None
    group: str | None = None
    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    guard_bp: int = 0
    val_fraction: float = 0.1
    seed: int = 0


def split_regions(library: Library, regions: Regions, plan: SplitPlan, label_column: str) -> tuple[Regions, np.ndarray]:
    """The regions, cut where the plan cuts by position, and each one's split (r,) of `train`, `val`, `test`, `drop`."""
    given = [n for n in ("rules", "positions", "group") if getattr(plan, n) is not None]
    if len(given) > 1:
        raise UserError(f"split_{given[0]} and split_{given[1]} are both set: keep one")
    if plan.positions is not None:
        return _by_position(regions, plan)
    records = np.array(library.unique_names(), dtype=object)[regions.record]
    labels = regions.columns.get(label_column, np.full(len(regions), "", object))
    if plan.rules is not None:
        split = _by_rule(regions, plan.rules)
    elif plan.group is None and plan.column in regions.columns:
        split = _by_column(regions, plan.column)
    else:
        groups = regions.column(plan.group, "split_group") if plan.group not in (None, "record") else records
        return regions, divide_groups(groups, labels, check_fractions(plan.fractions), plan.seed)
    if plan.val_fraction and not (split == "val").any():
        train = split == "train"
        shares = {"train": 1 - plan.val_fraction, "val": plan.val_fraction}
        split[train] = divide_groups(records[train], labels[train], shares, plan.seed)
    return regions, split


def _by_column(regions: Regions, column: str) -> np.ndarray:
    names = {value: split_name(value, f"column {column!r}") for value in set(regions.columns[column])}
    return np.array([names[value] for value in regions.columns[column]], dtype=object)


def _by_rule(regions: Regions, rules: list[dict[str, str | int]]) -> np.ndarray:
    split = np.full(len(regions), "", dtype=object)
    for number, rule in enumerate(rules, start=1):
        where = f"split_rules entry {number}"
        if "split" not in rule:
            raise UserError(f"{where} lacks the key 'split'")
        name = split_name(str(rule["split"]), where)
        matches = split == ""
        for column, pattern in rule.items():
            if column != "split":
                matches = matches & _matches(regions.column(column, where), str(pattern), where)
        split[matches] = name
    if (split == "").any():
        record = regions.columns["record"][np.argmax(split == "")]
        raise UserError(f"record {record!r} matches none of split_rules: end them with {{split: train}} or drop")
    return split


def _matches(values: np.ndarray, pattern: str, where: str) -> np.ndarray:
    try:
        match: Callable = re.compile(pattern).fullmatch
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from error
    matching = {value for value in set(values) if match(value)}
    return np.array([value in matching for value in values], bool)


def _by_position(regions: Regions, plan: SplitPlan) -> tuple[Regions, np.ndarray]:
    """Cut every region at the same fractions; where two splits come closer than the guard, train gives way, then val,
    so that the test windows of a given record are the same for any guard."""
    assert plan.positions is not None
    spans: list[tuple[float, float, str]] = []
    for name, span in plan.positions.items():
        if len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
            raise UserError(f"split_positions.{name} is {span}: give [from, to] with 0 <= from < to <= 1")
        spans.append((float(span[0]), float(span[1]), split_name(name, "split_positions")))
    spans.sort()
    for before, after in itertools.pairwise(spans):
        if after[0] < before[1]:
            raise UserError(f"split_positions: {before[2]} and {after[2]} overlap at {after[0]}")
    length = regions.end_bp - regions.start_bp
    starts = [regions.start_bp + (length * span[0]).astype(np.int64) for span in spans]
    ends = [regions.start_bp + (length * span[1]).astype(np.int64) for span in spans]
    for i in range(len(spans) - 1):
        missing = np.maximum(plan.guard_bp - (starts[i + 1] - ends[i]), 0)
        if SPLITS.index(spans[i][2]) <= SPLITS.index(spans[i + 1][2]):
            ends[i] = ends[i] - missing
        else:
            starts[i + 1] = starts[i + 1] + missing
    keep = [np.flatnonzero(ends[i] > starts[i]) for i in range(len(spans))]
    which = np.concatenate(keep)
    cut = regions[which]
    cut.start_bp = np.concatenate([starts[i][keep[i]] for i in range(len(spans))])
    cut.end_bp = np.concatenate([ends[i][keep[i]] for i in range(len(spans))])
    split = np.concatenate([np.full(len(keep[i]), spans[i][2], object) for i in range(len(spans))])
    return cut, split
