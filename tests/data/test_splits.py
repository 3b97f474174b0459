from collections import Counter

import numpy as np
import pytest

from seqssm.data.dna.indexing import Sequences
from seqssm.data.dna.library import Library, Regions
from seqssm.data.dna.splits import SplitPlan, split_regions
from seqssm.errors import UserError


def regions_of(rows: list[dict[str, str]], length: int = 1000) -> tuple[Library, Regions]:
    library = Library()
    library.add(Sequences.from_records((row["record"], b"A" * length) for row in rows), ["f"] * len(rows))
    columns = {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}
    count = len(rows)
    return library, Regions(
        np.arange(count), np.zeros(count, np.int64), np.full(count, length), columns, np.zeros(count, bool)
    )


def assign(rows: list[dict[str, str]], plan: SplitPlan) -> list[str]:
    library, regions = regions_of(rows)
    return split_regions(library, regions, plan, "label")[1].tolist()


def test_split_column_with_its_usual_names() -> None:
    names = ["train", "dev", "validation", "TEST", "drop"]
    rows = [{"record": f"r{i}", "label": "x", "split": name} for i, name in enumerate(names)]
    assert assign(rows, SplitPlan()) == ["train", "val", "val", "test", "drop"]
    rows[0]["split"] = "holdout"
    with pytest.raises(UserError, match="unknown split 'holdout'"):
        assign(rows, SplitPlan())


def test_rules_hold_out_strains_and_chromosomes() -> None:
    rules: list[dict[str, str | int]] = [
        {"split": "test", "strain": "test", "chromosome": "3|6"},
        {"split": "test", "label": "single", "chromosome": "3|6"},
        {"split": "drop", "strain": "test"},
        {"split": "drop", "chromosome": "3|6"},
        {"split": "val", "chromosome": 2},
        {"split": "train"},
    ]
    rows = [
        {"record": f"{label}{strain}{c}", "label": label, "strain": strain, "chromosome": str(c)}
        for label, strain in (("many", "train"), ("many", "test"), ("single", "train"))
        for c in (1, 2, 3, 6, 12, 16)
    ]
    split = dict(zip([row["record"] for row in rows], assign(rows, SplitPlan(rules=rules)), strict=True))
    assert {name for name, s in split.items() if s == "test"} == {
        "manytest3",
        "manytest6",
        "singletrain3",
        "singletrain6",
    }
    assert {name for name, s in split.items() if s == "val"} == {"manytrain2", "singletrain2"}
    assert {name for name, s in split.items() if s == "train"} == {
        f"{strain}{c}" for strain in ("manytrain", "singletrain") for c in (1, 12, 16)
    }


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SplitPlan(rules=[{"split": "test", "record": "r1"}]), "record 'r0' matches none of split_rules"),
        (SplitPlan(rules=[{"split": "exam"}]), "split_rules entry 1: unknown split 'exam'"),
        (SplitPlan(rules=[{"record": ".*"}]), "entry 1 lacks the key 'split'"),
        (SplitPlan(rules=[{"split": "test", "strian": "a"}]), "entry 1 names the column 'strian'"),
        (SplitPlan(rules=[{"split": "test", "record": "("}]), "is not a regular expression"),
        (SplitPlan(rules=[{"split": "train"}], group="label"), "split_rules and split_group are both set"),
        (SplitPlan(group="strain"), "split_group names the column 'strain'"),
        (SplitPlan(group="record", fractions={"train": 0.5, "test": 0.4}), "sum to 1"),
        (SplitPlan(group="record", fractions={"train": 0.5, "exam": 0.5}), "unknown split 'exam'"),
        (SplitPlan(positions={"train": [0, 0.7], "tset": [0.8, 1]}), "unknown split 'tset'"),
        (SplitPlan(positions={"train": [0, 0.7], "test": [0.6, 1]}), "train and test overlap at 0.6"),
        (SplitPlan(positions={"train": [0.7, 0]}), "split_positions.train is"),
    ],
)
def test_bad_plans_are_named(plan: SplitPlan, message: str) -> None:
    with pytest.raises(UserError, match=message):
        assign([{"record": f"r{i}", "label": "x"} for i in range(3)], plan)


def test_random_groups_stay_together_and_classes_keep_their_shares() -> None:
    rows = [
        {"record": f"{label}{strain}.{c}", "label": label, "strain": f"{label}{strain}"}
        for label in "ab"
        for strain in range(20)
        for c in range(3)
    ]
    plan = SplitPlan(group="strain", fractions={"train": 0.7, "val": 0.1, "test": 0.2}, seed=3)
    split = assign(rows, plan)
    for strain in {row["strain"] for row in rows}:
        assert len({s for s, row in zip(split, rows, strict=True) if row["strain"] == strain}) == 1
    counts = Counter((row["label"], s) for s, row in zip(split, rows, strict=True))
    assert counts == {(label, s): 3 * n for label in "ab" for s, n in (("train", 14), ("val", 2), ("test", 4))}
    assert assign(rows, plan) == split
    assert assign(rows, SplitPlan(group="strain", fractions=plan.fractions, seed=4)) != split


def test_a_class_of_three_groups_still_gets_one_in_each_split() -> None:
    rows = [{"record": f"r{i}", "label": "x"} for i in range(3)]
    assert sorted(assign(rows, SplitPlan())) == ["test", "train", "val"]


def test_without_a_split_column_records_are_divided() -> None:
    split = assign([{"record": f"r{i}", "label": "ab"[i % 2]} for i in range(100)], SplitPlan())
    assert Counter(split) == {"train": 80, "val": 10, "test": 10}


def test_validation_is_held_out_of_train_where_the_column_names_none() -> None:
    rows = [{"record": f"r{i}", "label": "ab"[i % 2], "split": "test" if i < 20 else "train"} for i in range(100)]
    split = assign(rows, SplitPlan(val_fraction=0.25))
    assert split[:20] == ["test"] * 20
    assert Counter(split[20:]) == {"train": 60, "val": 20}
    assert Counter(assign(rows, SplitPlan(val_fraction=0))) == {"test": 20, "train": 80}


def test_positions_cut_every_record_and_the_guard_costs_train_first() -> None:
    library, regions = regions_of([{"record": "a", "label": "x"}, {"record": "b", "label": "y"}])
    regions.end_bp = np.array([1000, 2000])
    plan = SplitPlan(positions={"train": [0, 0.7], "val": [0.7, 0.78], "test": [0.8, 1]}, guard_bp=50)
    cut, split = split_regions(library, regions, plan, "label")
    got = sorted(zip(cut.columns["record"], split, cut.start_bp.tolist(), cut.end_bp.tolist(), strict=True))
    assert got == [
        ("a", "test", 800, 1000),
        ("a", "train", 0, 650),  # 50 short of validation
        ("a", "val", 700, 750),  # 780 would come within 50 of the test's 800
        ("b", "test", 1600, 2000),
        ("b", "train", 0, 1350),
        ("b", "val", 1400, 1550),
    ]
    flipped = SplitPlan(positions={"test": [0, 0.2], "train": [0.2, 1]}, guard_bp=50)
    cut, split = split_regions(library, regions, flipped, "label")
    assert sorted(zip(split, cut.start_bp.tolist(), cut.end_bp.tolist(), strict=True))[2:] == [
        ("train", 250, 1000),
        ("train", 450, 2000),
    ]
