"""Figures of results, drawn without a display and without pyplot's global state."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from seqssm.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CLASSES_WITH_COUNTS = 25
"""Beyond this many classes the cells are too small for figures, and only the shading is drawn."""


def plain(name: str, longest: int = 1000) -> str:
    """A name as Matplotlib is to draw it: no formula between dollars, no bytes that are no text, shortened."""
    text = name.encode("utf-8", "replace").decode()
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return text.replace("$", r"\$")


def confusion_figure(
    counts: NDArray[np.integer], classes: Sequence[str], title: str = "", item: str = "window"
) -> "Figure":
    """Draw a confusion matrix: counts in the cells, shaded by the share of the row (the true class).

    Args:
        counts: (c, c) windows, true class by predicted class.
        classes: the c names.
        title: above the matrix; empty for accuracy and number of windows.
        item: what a window is called.
    """
    from matplotlib.figure import Figure

    counts = np.asarray(counts)
    n_classes, n_windows = len(classes), int(counts.sum())
    if counts.shape != (n_classes, n_classes):
        raise ValueError(f"a confusion matrix of {n_classes} classes cannot have the shape {counts.shape}")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(1.6 + 0.75 * n_classes, 4.2, 14.0))  # inches
    figure = Figure(figsize=(side + 1.2, side + 0.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title or f"accuracy {np.trace(counts) / max(n_windows, 1):.3f}, {n_windows:,} {item}s", fontsize=11)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.03)
    size = float(np.clip(side * 55 / max(n_classes, 5) / 5, 4.0, 10.0))  # points
    names = [plain(name, 24) for name in classes]
    steep = max(map(len, names)) * n_classes > 36
    axes.set_xticks(
        range(n_classes), names, fontsize=size, rotation=45 if steep else 0, ha="right" if steep else "center"
    )
    axes.set_yticks(range(n_classes), names, fontsize=size)
    if n_classes <= MAX_CLASSES_WITH_COUNTS:
        for (row, column), count in np.ndenumerate(counts):
            share = shares[row, column]
            label = f"{count:,}\n{share:.0%}" if n_classes <= 12 else f"{count:,}"
            axes.text(
                column, row, label, ha="center", va="center", fontsize=size, color="white" if share > 0.55 else "black"
            )
    return figure


def confusion_matrix_png(
    counts: NDArray[np.integer],
    classes: Sequence[str],
    path: Path | str | None = None,
    title: str = "",
    item: str = "window",
) -> bytes:
    """The figure of ``confusion_figure`` as the bytes of a PNG file, also written to ``path`` if there is one."""
    buffer = io.BytesIO()
    confusion_figure(counts, classes, title, item).savefig(buffer, format="png")
    if path is not None:
        with atomic_write(path, "wb") as file:
            file.write(buffer.getvalue())
    return buffer.getvalue()


def confusion_image(counts: NDArray[np.integer], classes: Sequence[str], title: str = "") -> NDArray[np.uint8]:
    """The figure of ``confusion_figure`` as (height, width, 3) pixels, for a logger that takes images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(confusion_figure(counts, classes, title))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def length_curve_png(reports: Mapping[int, Mapping[str, Any]], measure: str = "balanced_accuracy") -> bytes:
    """A measure against the length of the windows, model and baselines with their intervals, as a PNG file.

    Args:
        reports: length in bases -> what :func:`seqssm.tasks.report.evaluate` gave at it.
        measure: one of its metrics.
    """
    from matplotlib.figure import Figure

    lengths = sorted(reports)
    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    colors = ["#d1495b", "#31688e", "#35b779", "#999999", "#b5a642"]
    for number, name in enumerate(["model", *reports[lengths[0]]["baselines"]]):
        table = [reports[n]["metrics"] if name == "model" else reports[n]["baselines"][name] for n in lengths]
        value, low, high = ([float(one[measure][key]) for one in table] for key in ("value", "low", "high"))
        color = colors[number % len(colors)]
        axes.plot(lengths, value, "o-", color=color, lw=2 if name == "model" else 1.2, ms=4, label=name)
        axes.fill_between(lengths, low, high, color=color, alpha=0.15, lw=0)
    chance = 1 / len(reports[lengths[0]]["per_class"])
    axes.axhline(chance, color="#777777", lw=0.8, ls=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}\n{reports[n]['metrics'][measure]['n']}" for n in lengths], fontsize=7)
    axes.set_xlabel("bases a window; test windows")
    axes.set_ylabel(measure.replace("_", " "))
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


MAX_CURVES = 30


def precision_recall_png(
    predictions: Mapping[str, NDArray[np.floating]], targets: NDArray[np.integer], classes: Sequence[str]
) -> bytes:
    """Precision against recall of every predictor, a panel a class, as the bytes of a PNG file.

    Args:
        predictions: predictor -> (n, c) probabilities; the first one is drawn in front.
        targets: (n, c) zeros and ones.
        classes: the c names; those with the most clips are drawn, at most ``MAX_CURVES``.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import average_precision_score, precision_recall_curve

    targets = np.asarray(targets)
    support = targets.sum(axis=0)
    chosen = sorted(np.argsort(-support, kind="stable")[:MAX_CURVES])
    chosen = [c for c in chosen if support[c]]
    columns = min(5, max(1, len(chosen)))
    rows = max(1, -(-len(chosen) // columns))
    figure = Figure(figsize=(2.5 * columns, 2.2 * rows + 0.6), dpi=110, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    colors = ["#d1495b", "#31688e", "#35b779", "#999999", "#b5a642"]
    for panel, c in zip(axes, chosen, strict=False):
        for number, (name, table) in reversed(list(enumerate(predictions.items()))):
            precision, recall, _ = precision_recall_curve(targets[:, c], table[:, c])
            front = number == 0
            color = colors[number % len(colors)]
            panel.step(recall, precision, where="post", color=color, lw=1.8 if front else 0.9, label=name)
            if front:
                average = average_precision_score(targets[:, c], table[:, c])
        panel.set_title(f"{plain(classes[c], 24)} ({support[c]}), AP {average:.2f}", fontsize=8)
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 1.03)
    for panel in axes[len(chosen) :]:
        panel.set_axis_off()
    if chosen:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside upper center", ncols=len(names), fontsize=8)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
