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

from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.evaluation import CLASS_METRICS, METRICS, Resampler, Scores, score

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
) -> Report:
    """Score a model and its baselines on the same windows.

    Args:
        probabilities: (n, c) of the model.
        labels: (n,) class indices.
        clusters: unit -> (n,) names, the units to resample, coarsest first; see ``Resampler``.
        classes: the c class names, by index.
        baselines: name -> (n, c) probabilities.
        baseline_settings: name -> what was chosen in fitting it, copied into the report.
        data: what the windows are, copied into the report.
        checkpoint, command: copied into the report.
        resamples, confidence, seed: of the bootstrap.

    Returns:
        JSON-ready data; an undefined number is None. Every measure is ``{"value", "low", "high", "n"}``, n the number
        of windows behind it. ``differences`` holds model minus baseline, paired over the resamples.
    """
    baselines = baselines or {}
    if MODEL in baselines:
        raise ValueError(f"no baseline can be called {MODEL!r}")
    truth = np.asarray(labels, np.int64)
    resampler = Resampler(clusters, truth, resamples=resamples, confidence=confidence, seed=seed)
    scores = score({MODEL: probabilities, **baselines}, truth, resampler)
    model = scores[MODEL]
    if len(classes) != len(model.confusion):
        raise ValueError(f"{len(classes)} class names for {len(model.confusion)} columns of probabilities")
    return {
        "metrics": _metrics(model, resampler),
        "per_class": _per_class(model, classes, resampler),
        "confusion": {"classes": list(classes), "counts": model.confusion.tolist()},
        "baselines": {name: _metrics(scores[name], resampler) for name in baselines},
        "differences": {name: _differences(model, scores[name], resampler) for name in baselines},
        "baseline_settings": {name: dict(settings) for name, settings in (baseline_settings or {}).items()},
        "data": dict(data or {}),
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
    return {key: _measure(scores.values[key], scores.samples[key], n, resampler) for key in METRICS}


def _differences(model: Scores, baseline: Scores, resampler: Resampler) -> dict[str, Any]:
    return {
        key: _measure(
            model.values[key] - baseline.values[key],
            model.samples[key] - baseline.samples[key],
            resampler.n_windows,
            resampler,
        )
        for key in METRICS
    }


def _per_class(scores: Scores, classes: Sequence[str], resampler: Resampler) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for i, name in enumerate(classes):
        support = int(scores.confusion[i].sum())
        measures = {
            key: _measure(scores.class_values[key][i], scores.class_samples[key][:, i], support, resampler)
            for key in CLASS_METRICS
        }
        table[name] = {"support": support, "predicted": int(scores.confusion[:, i].sum()), **measures}
    return table


def _notes(scores: Scores, resampler: Resampler) -> list[str]:
    notes = [resampler.note] if resampler.note else []
    if scores.values["accuracy"] in (0.0, 1.0):
        # Resampling cannot draw an error that was not seen; the exact binomial bound (Clopper and Pearson) can.
        units = resampler.n_units
        bound = ((1 - resampler.confidence) / 2) ** (1 / units)
        right, limit = (
            ("right", f"at least {bound:.3f}") if scores.values["accuracy"] else ("wrong", f"at most {1 - bound:.3f}")
        )
        notes.append(
            f"every window is {right}, which leaves the resamples no spread; from {units} resampled units, the exact "
            f"binomial bound of the accuracy is {limit}"
        )
    missing = int((scores.confusion.sum(axis=1) == 0).sum())
    if missing:
        notes.append(f"{missing} of {len(scores.confusion)} classes have no window here and are left out of the means")
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
            [[TITLES[key], *(_cell(table[key]) for table in predictors.values())] for key in METRICS],
        ),
    ]
    if baselines:
        rows = [
            [TITLES[key], *(_cell(table[key], signed=True) for table in report["differences"].values())]
            for key in METRICS
        ]
        sections += ["## Model minus baseline, on the same resamples", _table(["measure", *baselines], rows)]
    rows = [
        [name, str(row["support"]), *(_cell(row[key]) for key in CLASS_METRICS)]
        for name, row in report["per_class"].items()
    ]
    sections += ["## By class", _table(["class", "windows", *(TITLES[key] for key in CLASS_METRICS)], rows)]
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
        f"{bootstrap['windows']} windows in all",
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


def save(report: Report, folder: Path | str) -> list[Path]:
    """Write ``metrics.json``, ``evaluation.md`` and ``confusion.png`` into a folder, each whole or not at all.

    Raises:
        UserError: the folder cannot be made or written.
    """
    from seqssm.tasks.plots import confusion_matrix_png

    folder = Path(folder)
    confusion = report["confusion"]
    files = {
        "metrics.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
        "evaluation.md": to_markdown(report).encode(),
        "confusion.png": confusion_matrix_png(np.asarray(confusion["counts"]), confusion["classes"]),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror or error}; choose another output folder") from error
    for name, content in files.items():
        with atomic_write(folder / name, "wb") as file:
            file.write(content)
    return [folder / name for name in files]
