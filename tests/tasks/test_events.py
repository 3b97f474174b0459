"""Events from probabilities: hysteresis, gap merge, minimum duration, the same for any packets."""

import io
import json

import numpy as np
import pytest

from seqssm.errors import UserError
from seqssm.tasks.events import Change, Event, EventDetector, EventWriter, ended


def detect(p: np.ndarray, sizes: list[int] | None = None, **settings) -> list[Change]:
    """Changes of (t, c) or (t,) probabilities at ten tokens a second, upper threshold 0.8, lower 0.4."""
    table = p[:, None] if p.ndim == 1 else p
    labels = [f"c{i}" for i in range(table.shape[1])]
    options = {"min_duration_s": 0.2, "max_gap_s": 0.3, **settings}
    detector = EventDetector(labels, 0.1, [0.8] * len(labels), [0.4] * len(labels), **options)
    changes, at, i = [], 0, 0
    while at < len(table):
        size = len(table) if sizes is None else sizes[i % len(sizes)]
        changes += detector.accept(table[at : at + size])
        at, i = at + size, i + 1
    return changes + detector.flush()


def spans(changes: list[Change]) -> list[tuple[float, float]]:
    return [(event.start_s, event.end_s) for event in ended(changes)]


def test_hysteresis_takes_in_what_leads_up_and_down() -> None:
    p = np.array([0, 0.5, 0.9, 0.5, 0.5, 0.3, 0, 0, 0, 0, 0.5, 0.7, 0.5, 0.0])
    changes = detect(p)
    assert spans(changes) == [(0.1, 0.5)]  # the second run never reaches 0.8
    (event,) = ended(changes)
    assert event.peak == pytest.approx(0.9)
    assert event.mean == pytest.approx((0.5 + 0.9 + 0.5 + 0.5) / 4)
    begin, end = changes
    assert (begin.kind, begin.time_s, begin.heard_s) == ("begin", 0.1, 0.3)
    assert (end.kind, end.time_s) == ("end", 0.5)
    assert end.heard_s == pytest.approx(0.9)  # once the gap was longer than 0.3 s


def test_gaps_merge_up_to_the_limit() -> None:
    def two_runs(gap: int) -> np.ndarray:
        return np.concatenate([np.full(3, 0.9), np.zeros(gap), np.full(3, 0.9), np.zeros(5)])

    assert spans(detect(two_runs(3))) == [(0.0, 0.9)]
    assert spans(detect(two_runs(4))) == [(0.0, 0.3), (0.7, 1.0)]
    # A run that begins within the gap and gets loud only later belongs to the event, too.
    late = np.array([0.9, 0.9, 0, 0, 0.5, 0.5, 0.5, 0.9, 0, 0, 0, 0, 0])
    assert spans(detect(late)) == [(0.0, 0.8)]


def test_smoothed_events_are_those_of_the_means_for_any_packets() -> None:
    rng = np.random.default_rng(3)
    p = np.clip(np.repeat(rng.random((60, 2)), 5, axis=0) + 0.3 * rng.standard_normal((300, 2)), 0, 1)
    means = np.stack([p[max(0, t - 2) : t + 3].mean(0) for t in range(len(p))])
    expected = detect(means)
    whole = detect(p, smooth_s=0.4)
    assert len(expected) > 8
    assert spans(whole) == spans(expected) != spans(detect(p))
    for one, other in zip(whole, expected, strict=True):
        assert (one.kind, one.label, one.time_s) == (other.kind, other.label, other.time_s)
        assert one.heard_s == pytest.approx(min(other.heard_s + 0.2, 30.0), abs=1e-6)
        assert one.event is None or one.event.peak == pytest.approx(other.event.peak, abs=1e-6)
    for sizes in ([1], [2, 7, 1], [299]):
        assert detect(p, sizes, smooth_s=0.4) == whole
    assert spans(detect(np.full(2, 0.9), smooth_s=0.4)) == [(0.0, 0.2)]  # shorter than a mean reaches


def test_short_events_are_dropped_after_merging() -> None:
    p = np.array([0.9, 0, 0, 0, 0, 0.9, 0, 0.9, 0, 0, 0, 0])
    assert spans(detect(p)) == [(0.5, 0.8)]
    assert spans(detect(p, max_gap_s=0.0)) == []
    assert spans(detect(p, max_gap_s=0.0, min_duration_s=0.0)) == [(0.0, 0.1), (0.5, 0.6), (0.7, 0.8)]


def test_what_goes_on_ends_with_the_stream() -> None:
    changes = detect(np.full(7, 0.9))
    assert [(c.kind, c.time_s) for c in changes] == [("begin", 0.0), ("end", 0.7)]


def brute_force(p: np.ndarray, min_tokens: int, max_gap: int) -> list[tuple[int, int]]:
    runs, start = [], None
    for t, value in enumerate([*p, 0.0]):
        if value >= 0.4 and start is None:
            start = t
        elif value < 0.4 and start is not None:
            if max(p[start:t]) >= 0.8:
                runs.append((start, t))
            start = None
    merged: list[tuple[int, int]] = []
    for run in runs:
        if merged and run[0] - merged[-1][1] <= max_gap:
            merged[-1] = (merged[-1][0], run[1])
        else:
            merged.append(run)
    return [run for run in merged if run[1] - run[0] >= min_tokens]


def test_random_streams_agree_with_brute_force_for_any_packets() -> None:
    rng = np.random.default_rng(0)
    noise = rng.random((600, 6))
    p = np.clip(np.stack([np.convolve(x, np.ones(3) / 3, "same") for x in noise.T], 1) * 2 - 0.5, 0, 1)
    changes = detect(p)
    for c in range(6):
        found = [(round(e.start_s * 10), round(e.end_s * 10)) for e in ended(changes) if e.label == f"c{c}"]
        assert found == brute_force(p[:, c], 2, 3)
        assert found
    for sizes in ([1], [3, 17, 1], [100]):
        assert detect(p, sizes) == changes
    open_events: set[str] = set()
    for change in changes:  # each begins once, then ends once
        assert (change.label in open_events) == (change.kind == "end")
        open_events ^= {change.label}
    assert not open_events


def test_thresholds_that_make_no_sense() -> None:
    with pytest.raises(UserError, match="lower threshold"):
        EventDetector(["a"], 0.1, [0.3], [0.5])
    with pytest.raises(UserError, match="between 0 and 600 s"):
        EventDetector(["a"], 0.1, [0.3], [0.2], min_duration_s=-1)


def test_files() -> None:
    event = Event("dog, barking", 1.25, 2.5, 0.9, 0.75)
    written = {}
    for form in ("txt", "csv", "jsonl"):
        file = io.StringIO()
        EventWriter(file, form, "a.wav").write(event)
        written[form] = file.getvalue()
    assert written["txt"] == "1.250000\t2.500000\tdog, barking\n"
    assert written["csv"] == 'file,start_s,end_s,label,peak,mean\na.wav,1.250,2.500,"dog, barking",0.9000,0.7500\n'
    assert json.loads(written["jsonl"]) == {
        "file": "a.wav",
        "label": "dog, barking",
        "start_s": 1.25,
        "end_s": 2.5,
        "peak": 0.9,
        "mean": 0.75,
    }
