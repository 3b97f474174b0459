"""Does length matter to a tagger, and does it find one sound in an hour? Scenes with a known truth say so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seqssm.data.audio.layouts import Clip
from seqssm.data.audio.scenes import Background, Placement, clip_background, make_scene, needle_parts, noise_background
from seqssm.data.audio.store import decode
from seqssm.errors import UserError
from seqssm.tasks.evaluation import Resampler
from seqssm.tasks.tagging_network import TaggingNetwork
from seqssm.tasks.tagging_stream import TagScores, make_tagger

NOISE_LEVEL = 0.003  # root mean square of the noise between clips
SPARE_S = 1.0  # so little is not filled with noise and another clip
SMOOTH_S = 1.0  # a needle is looked for in means over so long


def listen(task: TaggingNetwork, parts: Iterable[NDArray[np.float32]]) -> Iterable[TagScores]:
    """Scores of a recording at the task's own rate that comes in parts, in constant memory."""
    tagger = make_tagger(task, task.features.sample_rate)
    for samples in parts:
        yield from tagger.accept(samples)
    yield from tagger.flush()


def _samples(task: TaggingNetwork, clip: Clip) -> NDArray[np.float32]:
    return decode(clip, task.features.sample_rate)[0]


# ---- length --------------------------------------------------------------------------------------------------------


def length_curve(
    task: TaggingNetwork,
    clips: Sequence[Clip],
    lengths_s: Sequence[float],
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda amount: None,
) -> list[dict[str, Any]]:
    """Accuracy of a tagger with one label a clip against the length of what it hears.

    Up to a clip's own length, or a second more, its middle is heard. Beyond, the clip is followed by others of its
    class, with noise between them alone, until the end, which may cut the last one.

    Args:
        task: in evaluation mode.
        clips: held out, of one label each.
        lengths_s: seconds.
        seed: of the noise, the gaps and the order of clips.
        advance: called with 1 for each recording heard.

    Returns:
        For each length: ``seconds``, ``clips``, ``accuracy`` with ``low`` and ``high`` (95%, sources resampled).
    """
    if task.multi_label:
        raise UserError("the curve over lengths is one of accuracy: it needs a checkpoint with one label a clip")
    rate = task.features.sample_rate
    labels = np.array([task.labels.index(clip.labels[0]) for clip in clips])
    sources = np.array([clip.group or str(clip.path) for clip in clips])
    rows = []
    for seconds in lengths_s:
        right = np.zeros(len(clips))
        for i, clip in enumerate(clips):
            samples = _samples(task, clip)
            size = round(seconds * rate)
            if size <= len(samples) + SPARE_S * rate:
                begin = max(0, len(samples) - size) // 2
                scene = samples[begin : begin + size]
            else:
                rng = np.random.default_rng([seed, i])
                others = rng.permutation([j for j in np.flatnonzero(labels == labels[i]) if j != i])
                chosen = [samples, *(_samples(task, clips[j]) for j in others[: int(seconds)])]
                background = noise_background(int(rng.integers(2**31)), NOISE_LEVEL)
                placement = Placement(
                    seconds, (0.2, 1.0), snr_db=None, seed=int(rng.integers(2**31)), between=True, cut=True
                )
                scene = make_scene(chosen, background, rate, placement)[0]
            *_, last = listen(task, [scene])
            right[i] = int(last.clip[0].argmax()) == labels[i]
            advance(1)
        resampler = Resampler({"source": sources}, labels, item="clip")
        low, high = resampler.interval(_means(right, resampler))
        rows.append(
            {"seconds": seconds, "clips": len(clips), "accuracy": float(right.mean()), "low": low, "high": high}
        )
    return rows


def _means(values: NDArray[np.float64], resampler: Resampler) -> NDArray[np.float64]:
    """(resamples,) means of (n,) values."""
    total = np.bincount(resampler.unit, values, resampler.n_units)
    count = np.bincount(resampler.unit, minlength=resampler.n_units)
    return np.concatenate([(w @ total) / (w @ count) for w in resampler.weights()])


# ---- a needle in an hour -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needle:
    """Where one event was and where the tagger heard it best.

    Attributes:
        label, clip: what was hidden.
        start_s, end_s: where.
        found_s: the middle of the second with the largest mean probability of the label.
        inside: that probability; ``outside``: the largest one away from the event.
        found: whether the best second is the event's, give or take one second.
        seconds: of the whole.
    """

    label: str
    clip: str
    start_s: float
    end_s: float
    found_s: float
    inside: float
    outside: float
    found: bool
    seconds: float


def find_needle(
    task: TaggingNetwork,
    needle: Clip,
    background: Sequence[Clip],
    *,
    seconds: float = 3600.0,
    at_s: float | None = None,
    snr_db: float = 10.0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda amount: None,
) -> dict[str, Any]:
    """Hide one clip in a long background of others and look for it, in constant memory.

    Args:
        task: in evaluation mode.
        needle: the clip to hide.
        background: clips of other classes, joined to one recording in random order.
        seconds: of the whole.
        at_s: where to hide it; anywhere by default.
        snr_db: its level above the background's.
        seed: of the background and the place.
        advance: called with the seconds heard.

    Returns:
        The fields of :class:`Needle`.
    """
    rate = task.features.sample_rate
    samples = _samples(task, needle)
    rng = np.random.default_rng([seed, 11])
    duration = len(samples) / rate
    at_s = float(rng.uniform(0.05 * seconds, 0.95 * seconds - duration)) if at_s is None else at_s
    behind: Background = clip_background([_samples(task, clip) for clip in background], rate, seed)
    label = task.labels.index(needle.labels[0])
    width = max(1, round(SMOOTH_S / task.token_s))
    kept = np.zeros(0)
    inside = outside = -1.0
    found_s, position = 0.0, 0  # position: token of kept[0]
    parts = needle_parts(samples, behind, rate, seconds, at_s, snr_db)
    for scores in listen(task, parts):
        p = task.probabilities(scores.frames[0].double())[:, label].cpu().numpy()
        kept = np.concatenate([kept, p])
        advance(round(len(p) * task.token_s))
        if len(kept) < width:
            continue
        means = np.convolve(kept, np.ones(width) / width, "valid")
        middles = (position + np.arange(len(means)) + width / 2) * task.token_s
        within = (middles >= at_s - 1) & (middles <= at_s + duration + 1)
        if means.max() > max(inside, outside):
            found_s = float(middles[means.argmax()])
        inside = max(inside, float(means[within].max(initial=-1)))
        outside = max(outside, float(means[~within].max(initial=-1)))
        position += len(means)
        kept = kept[len(means) :]
    found = inside > outside
    return asdict(
        Needle(needle.labels[0], needle.name, at_s, at_s + duration, found_s, inside, outside, found, seconds)
    )


def run_lengths(task: TaggingNetwork, clips: Sequence[Clip], lengths_s: Sequence[float], seed: int) -> str:
    """:func:`length_curve` with a progress bar, as a Markdown table."""
    from seqssm.data.progress import progress_bar

    with torch.inference_mode(), progress_bar("clips of other lengths", len(clips) * len(lengths_s)) as advance:
        rows = length_curve(task, clips, lengths_s, seed=seed, advance=advance)
    lines = ["| seconds | clips | accuracy |", "| ------: | ----: | -------: |"]
    lines += [
        f"| {row['seconds']:g} | {row['clips']} | {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |"
        for row in rows
    ]
    return "\n".join(lines)


def run_needle(
    task: TaggingNetwork,
    clips: Sequence[Clip],
    label: str,
    background: Sequence[str],
    seconds: float,
    count: int,
    seed: int,
) -> str:
    """:func:`find_needle` for some clips of a class, with a progress bar, as a Markdown table."""
    from seqssm.data.progress import progress_bar

    needles = [clip for clip in clips if clip.labels == (label,)][:count]
    behind = [clip for clip in clips if set(clip.labels) & set(background or set(task.labels) - {label})]
    behind = [clip for clip in behind if label not in clip.labels]
    if not needles or not behind:
        raise UserError(f"the split has {len(needles)} clips of {label!r} and {len(behind)} for the background")
    lines = [
        "| needle | at s | to s | heard best at s | inside | outside | found |",
        "| --- | --: | --: | --: | --: | --: | --- |",
    ]
    with torch.inference_mode(), progress_bar("an hour with one event", round(seconds * len(needles))) as advance:
        for number, clip in enumerate(needles):
            row = find_needle(task, clip, behind, seconds=seconds, seed=seed + number, advance=advance)
            lines.append(
                f"| {row['label']} | {row['start_s']:.1f} | {row['end_s']:.1f} | {row['found_s']:.1f} "
                f"| {row['inside']:.3f} | {row['outside']:.3f} | {'yes' if row['found'] else 'no'} |"
            )
    return "\n".join(lines)
