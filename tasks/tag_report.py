"""One page about one recording: waveform, spectrogram, classes over time, events, and the sound itself."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from seqssm.data.features import FeatureConfig
from seqssm.tasks.events import Event
from seqssm.tasks.plots import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 1200
"""Of the figure; a recording of any length is gathered into so many."""
MAX_CLASSES = 12
MAX_EVENTS = 2000
EMBED_BYTES = 20 * 2**20
"""Larger recordings are linked, not put into the page."""
LEFT, RIGHT = 0.13, 0.985
"""Where the time axis begins and ends, as shares of the figure's width; the page's playhead relies on it."""


class Overview:
    """Gathers what the figure shows, in constant memory.

    Args:
        duration_s: of the recording.
        features: whose frames are shown.
        classes: number of classes.
    """

    def __init__(self, duration_s: float, features: FeatureConfig, classes: int) -> None:
        self.duration_s = max(duration_s, 1e-3)
        self.band_hz = (features.low_hz, features.high_hz or features.sample_rate / 2)
        self.low = np.zeros(COLUMNS, np.float32)
        self.high = np.zeros(COLUMNS, np.float32)
        self.spectrogram = np.zeros((COLUMNS, features.n_mels), np.float64)
        self.count = np.zeros(COLUMNS, np.int64)
        self.probabilities = np.zeros((COLUMNS, classes), np.float32)
        self.events: list[Event] = []
        self.n_events = 0
        self._samples_s = self._frames_s = self._tokens_s = 0.0

    def _columns(self, begin_s: float, count: int, step_s: float) -> NDArray[np.int64]:
        """Column of each of ``count`` items that begin ``step_s`` apart."""
        at = (begin_s + np.arange(count) * step_s) / self.duration_s * COLUMNS
        return np.minimum(at.astype(np.int64), COLUMNS - 1)

    def add_samples(self, samples: NDArray[np.floating], rate: int) -> None:
        """The next samples (channels, n)."""
        columns = self._columns(self._samples_s, samples.shape[1], 1 / rate)
        np.minimum.at(self.low, columns, samples.min(0))
        np.maximum.at(self.high, columns, samples.max(0))
        self._samples_s += samples.shape[1] / rate

    def add_frames(self, frames: NDArray[np.floating], hop_s: float) -> None:
        """The next frames (t, mel)."""
        columns = self._columns(self._frames_s, len(frames), hop_s)
        np.add.at(self.spectrogram, columns, frames)
        np.add.at(self.count, columns, 1)
        self._frames_s += len(frames) * hop_s

    def add_scores(self, probabilities: NDArray[np.floating], token_s: float) -> None:
        """The next tokens' probabilities (t, c)."""
        columns = self._columns(self._tokens_s, len(probabilities), token_s)
        # A token longer than a column fills all that it spans.
        spans = max(1, int(np.ceil(token_s / self.duration_s * COLUMNS)))
        for shift in range(spans):
            np.maximum.at(self.probabilities, np.minimum(columns + shift, COLUMNS - 1), probabilities)
        self._tokens_s += len(probabilities) * token_s

    def add_events(self, events: Sequence[Event]) -> None:
        """Events that have ended; the first ``MAX_EVENTS`` of them are listed."""
        self.n_events += len(events)
        self.events += events[: max(0, MAX_EVENTS - len(self.events))]


def overview_figure(overview: Overview, labels: Sequence[str], title: str) -> Figure:
    """Waveform, spectrogram and the classes that were heard best, on one time axis."""
    from matplotlib.figure import Figure

    first: dict[str, float] = {}
    for event in sorted(overview.events, key=lambda event: event.start_s):
        first.setdefault(event.label, event.start_s)
    peaks = overview.probabilities.max(0)
    order = sorted(range(len(labels)), key=lambda c: (labels[c] not in first, -peaks[c]))[:MAX_CLASSES]
    order.sort(key=lambda c: (first.get(labels[c], np.inf), -peaks[c]))  # from the upper left to the lower right
    rows = len(order)
    figure = Figure(figsize=(12, 4.2 + 0.28 * rows), dpi=110)
    total = 4.2 + 0.28 * rows
    heights = [1.0 / total, 1.9 / total, 0.28 * rows / total]
    seconds = overview.duration_s
    top = 1 - 0.35 / total
    axes: list[Any] = []
    for height in heights:
        axes.append(figure.add_axes((LEFT, top - height, RIGHT - LEFT, height)))
        top -= height + 0.12 / total
    wave, spectrum, timeline = axes
    times = (np.arange(COLUMNS) + 0.5) * seconds / COLUMNS
    wave.fill_between(times, overview.low, overview.high, color="#31688e", linewidth=0)
    limit = max(0.05, float(np.abs([overview.low, overview.high]).max()))
    wave.set_ylim(-limit, limit)
    wave.set_yticks([])
    wave.set_ylabel("waveform", rotation=0, ha="right", va="center")
    wave.set_title(plain(title), fontsize=11, loc="left")
    filled = overview.count > 0
    mean = overview.spectrogram[filled] / overview.count[filled, None]
    if len(mean):
        low, high = np.percentile(mean, [2, 99.8])
        nearest = np.maximum.accumulate(np.where(filled, np.cumsum(filled) - 1, 0))
        picture = mean[nearest].T
        extent = (0.0, seconds, 0.0, 1.0)
        spectrum.imshow(
            picture, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=max(high, low + 1e-6), cmap="magma"
        )
    low_mel, high_mel = (_mel(hz) for hz in overview.band_hz)
    marks = [hz for hz in (250, 1000, 4000, 12_000) if overview.band_hz[0] < hz < overview.band_hz[1]]
    places = [(_mel(hz) - low_mel) / (high_mel - low_mel) for hz in marks]
    spectrum.set_yticks(places, [f"{hz / 1000:g} kHz" for hz in marks], fontsize=8)
    timeline.imshow(
        overview.probabilities[:, order].T,
        origin="upper",
        aspect="auto",
        extent=(0.0, seconds, rows - 0.5, -0.5),
        vmin=0,
        vmax=1,
        cmap="Greys",
        interpolation="nearest",
    )
    row_of = {labels[c]: row for row, c in enumerate(order)}
    for event in overview.events:
        if event.label in row_of:
            row = row_of[event.label]
            timeline.plot([event.start_s, event.end_s], [row + 0.33] * 2, color="#d1495b", linewidth=3)
    names = [plain(labels[c], 22) for c in order]
    timeline.set_yticks(range(rows), names, fontsize=8)
    timeline.set_xlabel("seconds (grey: probability, red: events)")
    for each in axes:
        each.set_xlim(0, seconds)
    for each in axes[:2]:
        each.set_xticks([])
    return figure


def _mel(hz: float) -> float:
    """Kaldi's mel scale."""
    return 1127.0 * float(np.log1p(hz / 700.0))


def overview_png(overview: Overview, labels: Sequence[str], title: str) -> bytes:
    """The figure as the bytes of a PNG file."""
    from PIL import Image  # which Matplotlib writes its pictures with

    drawn, small = io.BytesIO(), io.BytesIO()
    overview_figure(overview, labels, title).savefig(drawn, format="png")
    # 256 colours are enough for it, and half the size.
    palette = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    palette.save(small, format="png", optimize=True)
    return small.getvalue()


MEDIA = {".wav": "wav", ".flac": "flac", ".mp3": "mpeg", ".ogg": "ogg", ".oga": "ogg", ".opus": "ogg"}


def playable(path: Path, folder: Path) -> str:
    """What an audio element can play: the recording itself when it is small, else the way to it from ``folder``."""
    kind = MEDIA.get(path.suffix.lower())
    if kind and path.stat().st_size <= EMBED_BYTES:
        return f"data:audio/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return quote(os.path.relpath(path, folder))


def report_html(
    png: bytes,
    audio: str,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    tags: Sequence[tuple[str, float, float]],
    overview: Overview,
) -> str:
    """A static page that needs nothing beside it: clicking the figure or an event plays from there.

    Args:
        png: the figure.
        audio: as :func:`playable` gave it.
        title: the recording's name.
        facts: pairs of a name and a value, above the figure.
        tags: label, probability and threshold, best first.
        overview: gives the events and the duration.
    """
    escape = html.escape
    fact_rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    tag_rows = "".join(
        f'<tr class="{"on" if p >= threshold else ""}"><td>{escape(label)}</td><td>{p:.3f}</td>'
        f"<td>{threshold:.3f}</td></tr>"
        for label, p, threshold in tags
    )
    event_rows = "".join(
        f'<tr data-s="{e.start_s:.3f}"><td>{e.start_s:.2f}</td><td>{e.end_s:.2f}</td><td>{escape(e.label)}</td>'
        f"<td>{e.peak:.2f}</td></tr>"
        for e in sorted(overview.events, key=lambda e: e.start_s)
    )
    more = overview.n_events - len(overview.events)
    note = f"<p>and {more:,} more, in the files of --events</p>" if more > 0 else ""
    picture = base64.b64encode(png).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1240px; margin: 1.5em auto; padding: 0 1em; color: #222; }}
h1 {{ font-size: 1.3em; }} h2 {{ font-size: 1.05em; }} audio {{ width: 100%; margin: .6em 0; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; }} dd {{ margin: 0; }} dt {{ color: #666; }}
#figure {{ position: relative; cursor: crosshair; }} #figure img {{ width: 100%; display: block; }}
#head {{ position: absolute; top: 0; bottom: 0; width: 1px; background: #d1495b; pointer-events: none; }}
.tables {{ display: flex; gap: 3em; flex-wrap: wrap; }} td, th {{ padding: .1em .9em .1em 0; text-align: left; }}
tr.on td {{ font-weight: 600; }} tr[data-s] {{ cursor: pointer; }} tr[data-s]:hover {{ background: #eee; }}
</style></head><body>
<h1>{escape(title)}</h1>
<dl>{fact_rows}</dl>
<audio controls preload="metadata" src="{escape(audio, quote=True)}"></audio>
<div id="figure"><img alt="waveform, spectrogram and classes over time" src="data:image/png;base64,{picture}">
<div id="head"></div></div>
<div class="tables">
<section><h2>Tags</h2><table><tr><th>label</th><th>probability</th><th>threshold</th></tr>{tag_rows}</table></section>
<section><h2>Events</h2><table><tr><th>start s</th><th>end s</th><th>label</th><th>peak</th></tr>{event_rows}</table>
{note}</section>
</div>
<script>
const audio = document.querySelector("audio"), figure = document.getElementById("figure");
const head = document.getElementById("head"), left = {LEFT}, right = {RIGHT}, seconds = {overview.duration_s:.3f};
function draw() {{
  head.style.left = 100 * (left + (right - left) * Math.min(1, audio.currentTime / seconds)) + "%";
  requestAnimationFrame(draw);
}}
draw();
function seek(time) {{ audio.currentTime = Math.max(0, Math.min(seconds, time)); audio.play(); }}
figure.addEventListener("click", e => {{
  const box = figure.getBoundingClientRect();
  seek(((e.clientX - box.left) / box.width - left) / (right - left) * seconds);
}});
for (const row of document.querySelectorAll("tr[data-s]"))
  row.addEventListener("click", () => seek(Number(row.dataset.s)));
</script></body></html>
"""
