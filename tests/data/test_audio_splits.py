from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from seqssm.data.audio.layouts import Clip
from seqssm.data.audio.splits import AudioSplitPlan, check_classes, split_clips, stratify
from seqssm.errors import UserError


def clips(count: int = 200, classes: int = 4, per_source: int = 2, **changes: str) -> list[Clip]:
    return [
        Clip(Path(f"{i}.wav"), (f"c{i // per_source % classes}",), group=f"s{i // per_source}", **changes)
        for i in range(count)
    ]


def test_sources_stay_together_and_every_class_is_divided_alike() -> None:
    made = clips()
    split, said = split_clips(made, AudioSplitPlan(), several=False)
    assert said.startswith("sources at random")
    for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        counts = Counter(clip.labels[0] for clip, one in zip(made, split, strict=True) if one == name)
        assert set(counts) == {"c0", "c1", "c2", "c3"}
        assert all(abs(count - 50 * share) <= 2 for count in counts.values())
    of_group: dict[str, set] = {}
    for clip, one in zip(made, split, strict=True):
        of_group.setdefault(clip.group, set()).add(one)
    assert all(len(names) == 1 for names in of_group.values())
    assert (split_clips(made, AudioSplitPlan(), False)[0] == split).all()
    assert (split_clips(made, AudioSplitPlan(seed=1), False)[0] != split).any()
    by_file = split_clips(made, AudioSplitPlan(method="file"), False)[0]
    assert any(by_file[i] != by_file[i + 1] for i in range(0, 200, 2))


def test_a_source_with_two_labels_goes_to_train() -> None:
    made = [*clips(), Clip(Path("x.wav"), ("c0",), group="both"), Clip(Path("y.wav"), ("c1",), group="both")]
    for seed in range(20):
        split, _ = split_clips(made, AudioSplitPlan(seed=seed), several=False)
        assert list(split[-2:]) == ["train", "train"]


def test_folds() -> None:
    made = [Clip(Path(f"{i}.wav"), (f"c{i % 2}",), group=str(i), fold=str(1 + i % 5)) for i in range(50)]
    split, said = split_clips(made, AudioSplitPlan(), several=False)
    assert said == "folds: test 5, validation 4, train the rest"
    assert {(clip.fold, one) for clip, one in zip(made, split, strict=True)} == {
        ("1", "train"), ("2", "train"), ("3", "train"), ("4", "val"), ("5", "test"),
    }  # fmt: skip
    split, _ = split_clips(made, AudioSplitPlan(test_folds=["1"], val_folds=[], val_fraction=0), False)
    assert Counter(split) == {"test": 10, "train": 40}
    split, said = split_clips(made, AudioSplitPlan(test_folds=["1"], val_folds=[]), False)
    assert Counter(split) == {"test": 10, "train": 34, "val": 6}
    assert "15% of train held out by source" in said
    with pytest.raises(UserError, match="test_folds names fold 7; the data has folds 1, 2, 3, 4, 5"):
        split_clips(made, AudioSplitPlan(test_folds=["7"]), False)
    with pytest.raises(UserError, match="fold 1 is in both"):
        split_clips(made, AudioSplitPlan(test_folds=["1"], val_folds=["1"]), False)
    with pytest.raises(UserError, match=r"0\.wav has no fold \(200 of 200 clips\)"):
        split_clips(clips(), AudioSplitPlan(method="fold"), False)


def test_the_data_sets_own_split() -> None:
    made = clips(split="train") + clips(20, split="test")
    split, said = split_clips(made, AudioSplitPlan(val_fraction=0.2), several=False)
    assert Counter(split) == {"train": 160, "val": 40, "test": 20}
    assert said.startswith("the data set's own split")
    with pytest.raises(UserError, match=r"0\.wav has no split \(10 such\)"):
        split_clips([*made, *clips(10)], AudioSplitPlan(), False)
    with pytest.raises(UserError, match="split_by is 'luck'"):
        split_clips(made, AudioSplitPlan(method="luck"), False)


def test_several_labels_are_stratified_by_class_with_whole_sources() -> None:
    rng = np.random.default_rng(0)
    chance = np.array([0.5, 0.3, 0.1, 0.05])
    made = []
    for i in range(600):
        labels = tuple(f"c{j}" for j in np.flatnonzero(rng.random(4) < chance))
        made.append(Clip(Path(f"{i}.wav"), labels, group=f"s{i // 3}"))
    split = stratify(made, [clip.group for clip in made], {"train": 0.7, "val": 0.15, "test": 0.15}, seed=0)
    total = Counter(label for clip in made for label in clip.labels)
    for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        chosen = [clip for clip, one in zip(made, split, strict=True) if one == name]
        assert len(chosen) == pytest.approx(600 * share, abs=15)
        counts = Counter(label for clip in chosen for label in clip.labels)
        for label, count in total.items():
            assert counts[label] == pytest.approx(count * share, abs=4)
    assert all(len(set(split[i : i + 3])) == 1 for i in range(0, 600, 3))


def test_every_class_that_lacks_clips_is_named() -> None:
    made = clips(8)
    split = np.array(["train"] * 6 + ["test"] * 2, object)
    with pytest.raises(UserError, match=r"'c3' has 0 in train, 'c0' has 0 in test, 'c1' has 0 in test, 'c2' has 0"):
        check_classes(made, split, ["c0", "c1", "c2", "c3"], 1)
    check_classes(made, split, ["c0", "c1", "c2", "c3"], 0)
