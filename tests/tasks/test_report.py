import json

import numpy as np
import pytest

from seqssm.errors import UserError
from seqssm.tasks.evaluation import METRICS
from seqssm.tasks.report import evaluate, save, to_markdown

CLASSES = ["ape", "bat|cat"]


def example(shift=0.4, n=120, **settings):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    good = rng.random(n) * 0.7 + np.where(labels, 0.3, 0)
    table = np.stack([1 - good, good], 1)
    weak = np.clip(good - shift * (rng.random(n) - 0.2) * (2 * labels - 1), 0, 1)
    baselines = {"majority": np.tile([0.5, 0.5], (n, 1)), "weak": np.stack([1 - weak, weak], 1)}
    settings = {"baselines": baselines, "baseline_settings": {"weak": {"k": [3], "C": 0.1}}} | settings
    return evaluate(
        table,
        labels,
        {"record": np.arange(n) // 2},
        CLASSES,
        data={"path": "x.fa", "windows": {"test": n}},
        checkpoint="best.ckpt",
        command="seqssm evaluate --checkpoint best.ckpt",
        resamples=300,
        **settings,
    )


def test_schema():
    report = json.loads(json.dumps(example(), allow_nan=False))
    assert list(report)[:2] == ["metrics", "per_class"]
    assert {"baselines", "data", "checkpoint", "command", "bootstrap", "versions", "differences"} <= set(report)
    for table in (report["metrics"], *report["baselines"].values(), *report["differences"].values()):
        assert tuple(table) == METRICS
        for measure in table.values():
            assert set(measure) == {"value", "low", "high", "n"}
            assert measure["low"] <= measure["value"] <= measure["high"]
            assert measure["n"] == 120
    assert report["per_class"]["ape"]["support"] == 60
    assert report["per_class"]["ape"]["recall"]["n"] == 60
    assert np.sum(report["confusion"]["counts"]) == 120
    assert (
        report["bootstrap"] | {"method": "cluster", "clusters": 60, "resamples": 300, "seed": 0} == report["bootstrap"]
    )
    assert set(report["versions"]) >= {"python", "torch", "numpy", "seqssm", "scikit-learn"}


def test_differences_are_paired():
    report = example(shift=0.01)
    model, weak, difference = (
        report["metrics"]["auroc"],
        report["baselines"]["weak"]["auroc"],
        report["differences"]["weak"]["auroc"],
    )
    assert difference["value"] == pytest.approx(model["value"] - weak["value"], abs=1e-8)
    # Two predictors that are nearly alike differ by far less than each of them varies.
    assert difference["high"] - difference["low"] < 0.3 * (model["high"] - model["low"])
    assert example(baselines={"same": example_table()})["differences"]["same"]["mcc"] == {
        "value": 0.0,
        "low": 0.0,
        "high": 0.0,
        "n": 120,
    }


def example_table():
    rng = np.random.default_rng(0)
    good = rng.random(120) * 0.7 + np.where(np.arange(120) % 2, 0.3, 0)
    return np.stack([1 - good, good], 1)


def test_markdown_shows_model_beside_baselines():
    report = example()
    text = to_markdown(report)
    lines = text.splitlines()
    assert [cell.strip() for cell in lines[2].split("|")] == ["", "measure", "model", "majority", "weak", ""]
    accuracy = next(line for line in lines if line.startswith("| accuracy"))
    measure = report["metrics"]["accuracy"]
    assert f"{measure['value']:.3f} [{measure['low']:.3f}, {measure['high']:.3f}]" in accuracy
    assert "0.500 [0.500, 0.500]" in accuracy
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    assert len({len(line) for line in lines[2:9]}) == 1  # the columns line up
    assert "bat\\|cat" in text
    assert "+0." in text
    assert "- checkpoint: best.ckpt" in text
    assert "- weak: k 3, C 0.1" in text
    assert "300 bootstrap resamples of records within" not in text  # the records hold both classes
    assert "300 bootstrap resamples of records (seed 0)" in text


def test_what_is_undefined_is_null_and_not_a_number():
    labels = np.zeros(40, int)
    table = np.tile([0.6, 0.3, 0.1], (40, 1))
    report = evaluate(table, labels, {"record": np.arange(40)}, ["a", "b", "c"], resamples=50)
    assert report["metrics"]["auroc"]["value"] is None
    assert report["metrics"]["accuracy"]["value"] == 1
    assert report["per_class"]["b"]["recall"] == {"value": None, "low": None, "high": None, "n": 0}
    assert any("exact binomial bound of the accuracy is at least 0.912" in note for note in report["notes"])
    assert any("2 of 3 classes have no window here" in note for note in report["notes"])
    assert "n/a" in to_markdown(report)
    json.dumps(report, allow_nan=False)


def test_files_are_written_whole(tmp_path):
    report = example()
    files = save(report, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["metrics.json", "evaluation.md", "confusion.png"]
    assert sorted(tmp_path.rglob("*.*")) == sorted(files)
    assert json.loads(files[0].read_text()) == report
    assert files[1].read_text() == to_markdown(report)
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        save(example(), tmp_path / "file" / "folder")


def test_mistakes_of_the_caller_are_refused():
    with pytest.raises(ValueError, match="no baseline can be called"):
        example(baselines={"model": example_table()})
    with pytest.raises(ValueError, match="3 class names"):
        evaluate(example_table(), np.arange(120) % 2, {"record": np.arange(120)}, ["a", "b", "c"])
