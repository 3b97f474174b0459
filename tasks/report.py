"""The outcome of an evaluation as plain data, as JSON and as Markdown."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqssm.files import atomic_write, make_folder
from seqssm.tasks.evaluation import Resampler, Scores, score
from seqssm.tasks.multilabel import score_multilabel

Report = dict[str, Any]

TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "mcc": "MCC",
    "auroc": "AUROC",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "map": "mAP",
    "mauc": "mAUC",
    "d_prime": "d'",
    "average_precision": "AP",
}
MODEL = "model"


def evaluate(
    probabilities: ArrayLike,
    labels: ArrayLike,
    clusters: Mapping[str, Sequence[str] | NDArray[Any]],
    classes: Sequence[str],
    *,
    baselines: Mapping[str, ArrayLike] | None = None,
    baseline_settings: Mapping[str, Mapping[str, Any]] | None = None,
    data: Mapping[str, Any] | None = None,
    checkpoint: str = "",
    command: str = "",
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    ranked: bool = False,
    thresholds: Mapping[str, ArrayLike] | None = None,
    item: str = "window",
) -> Report:
    """Score a model and its baselines on the same windows.

    Args:
        probabilities: (n, c) of the model.
        labels: (n,) class indices, or (n, c) zeros and ones where a window may have several labels.
        clusters: unit -> (n,) names, the units to resample, coarsest first; see ``Resampler``.
        classes: the c class names, by index.
        baselines: name -> (n, c) probabilities.
        baseline_settings: name -> what was chosen in fitting it, copied into the report.
        data: what the windows are, copied into the report.
        checkpoint, command: copied into the report.
        resamples, confidence, seed: of the bootstrap.
        ranked: whether average precision stands beside the other measures (for several labels it always does).
        thresholds: predictor -> (c,) probabilities from which a class is said to be present; for several labels.
        item: what a window is called.

    Returns:
        JSON-ready data; an undefined number is None. Every measure is ``{"value", "low", "high", "n"}``, n the number
        of windows behind it. ``differences`` holds model minus baseline, paired over the resamples.
    """
    baselines = baselines or {}
    if MODEL in baselines:
        raise ValueError(f"no baseline can be called {MODEL!r}")
    truth = np.asarray(labels, np.int64)
    several = truth.ndim == 2
    resampler = Resampler(
        clusters, None if several else truth, resamples=resamples, confidence=confidence, seed=seed, item=item
    )
    predictions = {MODEL: probabilities, **baselines}
    if several:
        scores = score_multilabel(predictions, truth, thresholds or {}, resampler)
    else:
        scores = score(predictions, truth, resampler, ranked=ranked)
    model = scores[MODEL]
    if len(classes) != len(model.support):
        raise ValueError(f"{len(classes)} class names for {len(model.support)} columns of probabilities")
    confusion = None if model.confusion is None else {"classes": list(classes), "counts": model.confusion.tolist()}
    return {
        "metrics": _metrics(model, resampler),
        "per_class": _per_class(model, classes, resampler),
        "confusion": confusion,
        "baselines": {name: _metrics(scores[name], resampler) for name in baselines},
        "differences": {name: _differences(model, scores[name], resampler) for name in baselines},
        "baseline_settings": {name: dict(settings) for name, settings in (baseline_settings or {}).items()},
        "data": dict(data or {}),
        "item": item,
        "checkpoint": checkpoint,
        "command": command,
        "bootstrap": resampler.describe(),
        "notes": _notes(model, resampler),
        "versions": _versions(),
    }


def _measure(value: float, samples: NDArray[np.float64], n: int, resampler: Resampler) -> dict[str, float | int | None]:
    low, high = resampler.interval(samples)
    return {"value": _number(value), "low": _number(low), "high": _number(high), "n": n}


def _number(value: float) -> float | None:
    return round(float(value), 9) if math.isfinite(value) else None


def _metrics(scores: Scores, resampler: Resampler) -> dict[str, Any]:
    n = resampler.n_windows
    return {key: _measure(value, scores.samples[key], n, resampler) for key, value in scores.values.items()}


def _differences(model: Scores, baseline: Scores, resampler: Resampler) -> dict[str, Any]:
    return {
        key: _measure(
            model.values[key] - baseline.values[key],
            model.samples[key] - baseline.samples[key],
            resampler.n_windows,
            resampler,
        )
        for key in model.values
    }


def _per_class(scores: Scores, classes: Sequence[str], resampler: Resampler) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for i, name in enumerate(classes):
        support = int(scores.support[i])
        measures = {
            key: _measure(values[i], scores.class_samples[key][:, i], support, resampler)
            for key, values in scores.class_values.items()
        }
        table[name] = {"support": support, "predicted": int(scores.predicted[i]), **measures}
    return table


def _notes(scores: Scores, resampler: Resampler) -> list[str]:
    notes = [resampler.note] if resampler.note else []
    accuracy, item = scores.values.get("accuracy"), resampler.item
    if accuracy in (0.0, 1.0):
        # Resampling cannot draw an error that was not seen; the exact binomial bound (Clopper and Pearson) can.
        units = resampler.n_units
        bound = ((1 - resampler.confidence) / 2) ** (1 / units)
        right, limit = ("right", f"at least {bound:.3f}") if accuracy else ("wrong", f"at most {1 - bound:.3f}")
        notes.append(
            f"every {item} is {right}, which leaves the resamples no spread; from {units} resampled units, the exact "
            f"binomial bound of the accuracy is {limit}"
        )
    missing = int((scores.support == 0).sum())
    if missing:
        notes.append(f"{missing} of {len(scores.support)} classes have no {item} here and are left out of the means")
    return notes


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("seqssm", "torch", "numpy", "scikit-learn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def to_markdown(report: Report) -> str:
    """The report for people: model beside baselines, differences, classes, confusion, and what the intervals mean."""
    baselines = report["baselines"]
    predictors = {MODEL: report["metrics"], **baselines}
    sections = [
        "# Evaluation",
        _table(
            ["measure", *predictors],
            [[TITLES[key], *(_cell(table[key]) for table in predictors.values())] for key in report["metrics"]],
        ),
    ]
    if baselines:
        rows = [
            [TITLES[key], *(_cell(table[key], signed=True) for table in report["differences"].values())]
            for key in report["metrics"]
        ]
        sections += ["## Model minus baseline, on the same resamples", _table(["measure", *baselines], rows)]
    table = report["per_class"]
    keys = [key for key in next(iter(table.values())) if key in TITLES]
    rows = [[name, str(row["support"]), *(_cell(row[key]) for key in keys)] for name, row in table.items()]
    sections += ["## By class", _table(["class", f"{report['item']}s", *(TITLES[key] for key in keys)], rows)]
    if report["confusion"] is not None:
        classes, counts = report["confusion"]["classes"], report["confusion"]["counts"]
        rows = [[name, *map(str, row)] for name, row in zip(classes, counts, strict=True)]
        sections += ["## Confusion (row: true, column: predicted)", _table(["", *classes], rows)]
    sections += ["## How", "\n".join(f"- {line}" for line in _facts(report))]
    return "\n\n".join(sections) + "\n"


def _facts(report: Report) -> list[str]:
    bootstrap = report["bootstrap"]
    within = "" if bootstrap["stratified_by"] == "none" else f" within each {bootstrap['stratified_by']}"
    facts = [
        f"[low, high] is the {100 * bootstrap['confidence']:g}% percentile interval of {bootstrap['resamples']} "
        f"bootstrap resamples of {bootstrap['resampled']}s{within} (seed {bootstrap['seed']}); "
        f"{bootstrap['windows']} {report['item']}s in all",
        *report["notes"],
    ]
    facts += [f"{key}: {_plain(value)}" for key in ("checkpoint", "command") if (value := report[key])]
    facts += [f"{key}: {_plain(value)}" for key, value in report["data"].items()]
    facts += [f"{name}: {_plain(settings)}" for name, settings in report["baseline_settings"].items()]
    return [*facts, _plain(report["versions"])]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(measure: Mapping[str, float | None], signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    value, low, high = (
        "n/a" if number is None else f"{number:{form}}" for number in (measure[k] for k in ("value", "low", "high"))
    )
    return value if measure["value"] is None else f"{value} [{low}, {high}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text, numbers to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in cells
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def save(report: Report, folder: Path | str, figures: Mapping[str, bytes] | None = None) -> list[Path]:
    """Write ``metrics.json``, ``evaluation.md`` and ``confusion.png`` into a folder, each whole or not at all.

    Args:
        report: of :func:`evaluate`.
        folder: made if it is not there.
        figures: further files by name.

    Raises:
        UserError: the folder cannot be made or written.
    """
    from seqssm.tasks.plots import confusion_matrix_png

    folder = Path(folder)
    confusion = report["confusion"]
    files = {
        "metrics.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
        "evaluation.md": to_markdown(report).encode(),
    }
    if confusion is not None:
        counts = np.asarray(confusion["counts"])
        files["confusion.png"] = confusion_matrix_png(counts, confusion["classes"], item=report["item"])
    files |= figures or {}
    make_folder(folder)
    for name, content in files.items():
        with atomic_write(folder / name, "wb") as file:
            file.write(content)
    return [folder / name for name in files]
