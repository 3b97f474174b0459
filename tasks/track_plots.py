"""A picture of what a classifier says along chromosomes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqssm.tasks.plots import plain

MAX_RECORDS = 12
"""So many of the longest records are drawn."""
COLUMNS = 1000
"""Steps along a record; what falls into one is averaged."""


def tracks_png(table: Path, lengths: Mapping[str, int]) -> bytes:
    """Class probabilities along records, stacked to 1, a panel a record, as the bytes of a PNG file.

    Args:
        table: PREFIX.tsv of ``seqssm classify --tracks``; read once, a line at a time.
        lengths: bases of each record, by name, in the order of the file; the longest are drawn. Stretches of nothing
            but N stay white.
    """
    from matplotlib.figure import Figure

    longest = sorted(lengths, key=lambda name: -lengths[name])[:MAX_RECORDS]
    shown = [name for name in lengths if name in longest]
    labels, means = _averages(table, {name: lengths[name] for name in shown})
    figure = Figure(figsize=(9.0, 0.8 + 1.1 * len(shown)), dpi=120, layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(shown), 1, sharey=True))
    from matplotlib import colormaps

    colors = colormaps["tab10" if len(labels) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    unit, name_of_unit = (1e6, "Mb") if max(lengths.values()) >= 1e6 else (1e3, "kb")
    for panel, name in zip(panels, shown, strict=True):
        values = means[name]  # (columns, c)
        edges = np.linspace(0, lengths[name], len(values) + 1) / unit
        stacked = np.concatenate([np.zeros((len(values), 1)), values.cumsum(axis=1)], axis=1)
        for number, label in enumerate(labels):
            panel.stairs(
                stacked[:, number + 1],
                edges,
                baseline=stacked[:, number],
                fill=True,
                color=colors[number % len(colors)],
                label=plain(label),
                lw=0,
            )
        panel.set_xlim(0, max(lengths[other] for other in shown) / unit)
        panel.set_ylim(0, 1)
        panel.set_yticks([0, 0.5, 1])
        panel.tick_params(labelsize=7)
        panel.set_title(plain(name), fontsize=8, loc="left", pad=2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"position, {name_of_unit}", fontsize=8)
    figure.supylabel("probability", fontsize=8)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=min(len(names), 6), fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _averages(table: Path, lengths: Mapping[str, int]) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    """The class names, and (columns, c) mean probabilities of each record; NaN where there is nothing but N."""
    with open(table, encoding="utf-8") as file:
        labels = file.readline().rstrip("\n").split("\t")[4:]
        columns = {name: max(1, min(COLUMNS, length // 100)) for name, length in lengths.items()}
        sums = {name: np.zeros((count, len(labels))) for name, count in columns.items()}
        rows = {name: np.zeros((count, 1)) for name, count in columns.items()}
        for line in file:
            name, start, end, label, *values = line.rstrip("\n").split("\t")
            if name not in sums or label == "NA":
                continue
            # A row wider than a column fills all that it touches.
            first = int(start) * columns[name] // lengths[name]
            last = max(first + 1, -(-int(end) * columns[name] // lengths[name]))
            step = slice(first, last if int(end) - int(start) > lengths[name] / columns[name] else first + 1)
            sums[name][step] += np.array(values, np.float64)
            rows[name][step] += 1
    means = {name: np.where(rows[name] > 0, sums[name] / np.maximum(rows[name], 1), np.nan) for name in sums}
    return labels, means
