"""From a probability every few milliseconds to events with a beginning and an end, as the sound goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from seqssm.errors import UserError

LONGEST_S = 600
"""Of smoothing, gaps and shortest events: what they need of the past is kept in memory."""


@dataclass(frozen=True)
class Event:
    """One sound: its label, when it was heard, and the largest and mean probability in that time."""

    label: str
    start_s: float
    end_s: float
    peak: float
    mean: float


@dataclass(frozen=True)
class Change:
    """An event that has begun (``event`` is None) or ended.

    ``time_s`` is when the sound began or ended; ``heard_s`` is how far the detector had heard when it could tell.
    """

    kind: Literal["begin", "end"]
    label: str
    time_s: float
    heard_s: float
    event: Event | None = None


class EventDetector:
    """Hysteresis, gap merge and minimum duration, a class at a time, over a stream of any length.

    A run is an unbroken stretch of probabilities at or above ``off`` with one at or above ``on`` in it. Runs of a class
    with a gap of at most ``max_gap_s`` are one event; events shorter than ``min_duration_s`` are dropped. The result
    does not depend on how the stream is cut.

    Args:
        labels: the classes.
        token_s: seconds a token.
        on: (c,) the thresholds that an event must reach.
        off: (c,) the lower ones that it must stay at.
        min_duration_s: shortest event.
        max_gap_s: longest gap within one.
        smooth_s: probabilities are averaged over so much around each token before they are looked at, half of it to
            come, so that answers come that much later and events do not flicker.

    Attributes:
        position: tokens looked at.

    Raises:
        UserError: a setting makes no sense.
    """

    def __init__(
        self,
        labels: Sequence[str],
        token_s: float,
        on: Sequence[float] | NDArray[np.floating],
        off: Sequence[float] | NDArray[np.floating],
        min_duration_s: float = 0.2,
        max_gap_s: float = 0.3,
        smooth_s: float = 0.0,
    ) -> None:
        self.labels, self.token_s = list(labels), token_s
        self.on, self.off = np.asarray(on, np.float64), np.asarray(off, np.float64)
        if (self.off > self.on).any() or (self.on <= 0).any():
            raise UserError("an event's lower threshold must not lie above its upper one, which must be above 0")
        if min(min_duration_s, max_gap_s, smooth_s) < 0 or max(min_duration_s, max_gap_s, smooth_s) > LONGEST_S:
            raise UserError(
                f"the minimum duration, the gap and the smoothing of events must lie between 0 and {LONGEST_S:,} s"
            )
        self.min_tokens = round(min_duration_s / token_s)
        self.max_gap = round(max_gap_s / token_s)
        classes = len(self.labels)
        self.reach = round(smooth_s / token_s / 2)  # tokens to either side of one that is smoothed
        self._recent = np.zeros((0, classes))  # the last tokens, those before `position` that its mean needs included
        self.position = 0
        self._total = np.inf  # tokens of the whole, once that is known
        self._run = np.full(classes, -1, np.int64)  # where the present run began; -1: none
        self._run_sum = np.zeros(classes)
        self._run_peak = np.zeros(classes)
        self._hot = np.zeros(classes, bool)  # whether it has reached the upper threshold
        self._start = np.full(classes, -1, np.int64)  # of the open event; -1: none
        self._end = np.zeros(classes, np.int64)  # behind its last token so far
        self._sum = np.zeros(classes)
        self._count = np.zeros(classes, np.int64)
        self._peak = np.zeros(classes)
        self._told = np.zeros(classes, bool)  # whether its beginning has been told

    def accept(self, probabilities: NDArray[np.floating]) -> list[Change]:
        """Hear the next tokens, (t, c) probabilities; what began and ended, in the order in which it could be told."""
        return self._look(self._smoothed(np.asarray(probabilities, np.float64), at_end=False))

    def _smoothed(self, table: NDArray[np.float64], at_end: bool) -> NDArray[np.float64]:
        """Means (n, c) around the tokens that have become ready; at the beginning and the end, of what there is."""
        if not self.reach:
            return table
        past = min(self.reach, self.position)
        known = np.concatenate([self._recent, table])  # from token `position - past` on
        ready = max(0, len(known) - past - (0 if at_end else self.reach))
        padded = np.pad(known, ((self.reach - past, self.reach), (0, 0)))
        exists = np.pad(np.ones(len(known)), (self.reach - past, self.reach))
        total, count = np.zeros((ready, known.shape[1])), np.zeros(ready)
        for shift in range(2 * self.reach + 1):  # one after another: the rounding is the same however they come
            total += padded[shift : shift + ready]
            count += exists[shift : shift + ready]
        first = past + ready - min(self.reach, self.position + ready)
        self._recent = known[first:]
        return total / np.maximum(count, 1)[:, None]

    def _look(self, table: NDArray[np.float64]) -> list[Change]:
        changes: list[Change] = []
        above = table >= self.off
        quiet: NDArray[np.bool_] = np.logical_not(above.any(axis=1))
        for t in range(len(table)):
            if quiet[t] and not self._busy:
                self.position += 1
                continue
            self._step(table[t], above[t], changes)
        return changes

    @property
    def _busy(self) -> bool:
        return bool((self._start >= 0).any() or (self._run >= 0).any())

    def _step(self, p: NDArray[np.float64], above: NDArray[np.bool_], changes: list[Change]) -> None:
        begins = above & (self._run < 0)
        self._run[begins] = self.position
        self._run[~above] = -1
        self._hot[~above | begins] = False
        self._run_sum = np.where(above, np.where(begins, p, self._run_sum + p), 0.0)
        self._run_peak = np.where(above, np.where(begins, p, np.maximum(self._run_peak, p)), 0.0)
        # An event is over when nothing that goes on could still join it.
        waited = np.where(self._run >= 0, self._run, self.position + 1) - self._end
        over = (self._start >= 0) & ~self._hot & (waited > self.max_gap)
        for c in np.flatnonzero(over):
            self._finish(int(c), changes, self._heard(self.position + 1))
        heating = above & ~self._hot & (p >= self.on)
        for c in np.flatnonzero(heating):
            if self._start[c] < 0:
                self._start[c], self._sum[c], self._count[c], self._peak[c] = self._run[c], 0.0, 0, 0.0
                self._told[c] = False
            # What the run has gathered before it got hot.
            self._sum[c] += self._run_sum[c] - p[c]
            self._count[c] += self.position - self._run[c]
            self._peak[c] = max(self._peak[c], self._run_peak[c])
        self._hot |= heating
        hot = self._hot
        self._sum[hot] += p[hot]
        self._count[hot] += 1
        self._peak[hot] = np.maximum(self._peak[hot], p[hot])
        self._end[hot] = self.position + 1
        self.position += 1
        for c in np.flatnonzero(hot & ~self._told):
            if self._end[c] - self._start[c] >= self.min_tokens:
                self._told[c] = True
                start_s = round(float(self._start[c] * self.token_s), 6)
                heard_s = round(self._heard(self.position) * self.token_s, 6)
                changes.append(Change("begin", self.labels[c], start_s, heard_s))

    def _heard(self, position: int) -> int:
        """Tokens that must have come before the one at ``position`` can be looked at."""
        return int(min(position + self.reach, self._total))

    def flush(self) -> list[Change]:
        """End of the stream: what was still going on ends."""
        rest = self._smoothed(np.zeros((0, len(self.labels))), at_end=True)
        self._total = self.position + len(rest)
        changes = self._look(rest)
        for c in np.flatnonzero(self._start >= 0):
            self._finish(int(c), changes, self.position)
        self._run[:] = -1
        self._hot[:] = False
        self._recent, self._total = self._recent[:0], np.inf
        return changes

    def _finish(self, c: int, changes: list[Change], heard: int) -> None:
        if self._told[c]:
            start_s, end_s = (round(float(x * self.token_s), 6) for x in (self._start[c], self._end[c]))
            mean = float(self._sum[c] / self._count[c])
            event = Event(self.labels[c], start_s, end_s, round(float(self._peak[c]), 6), round(mean, 6))
            changes.append(Change("end", event.label, end_s, round(heard * self.token_s, 6), event))
        self._start[c] = -1


def ended(changes: Iterable[Change]) -> list[Event]:
    """The events among some changes."""
    return [change.event for change in changes if change.event is not None]


FORMATS = ("txt", "csv", "jsonl")


class EventWriter:
    """Writes events to open text files as they end: Audacity labels, CSV or JSON lines.

    Args:
        file: where.
        form: ``txt`` (Audacity: start, end and label between tabs), ``csv`` or ``jsonl``.
        source: the recording's name, for CSV and JSON lines.
    """

    def __init__(self, file: IO[str], form: str, source: str) -> None:
        self.file, self.form, self.source = file, form, source
        self._csv = csv.writer(file, lineterminator="\n")
        if form == "csv":
            self._csv.writerow(["file", "start_s", "end_s", "label", "peak", "mean"])

    def write(self, event: Event) -> None:
        if self.form == "txt":
            self.file.write(f"{event.start_s:.6f}\t{event.end_s:.6f}\t{event.label}\n")
        elif self.form == "csv":
            numbers = [f"{event.start_s:.3f}", f"{event.end_s:.3f}", event.label, f"{event.peak:.4f}"]
            self._csv.writerow([self.source, *numbers, f"{event.mean:.4f}"])
        else:
            self.file.write(json.dumps({"file": self.source, **asdict(event)}, ensure_ascii=False) + "\n")
