"""Long recordings made of clips at known times, with noise or background between them: to see whether length matters
to a model, and whether it finds one event in an hour."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seqssm.data.audio.augment import coloured_noise, rms
from seqssm.errors import UserError
from seqssm.files import atomic_write

FADE_S = 0.02  # clips and stretches of background begin and end in this time, so that seams do not click
LEVEL = 0.05  # root mean square of the background where it is made


class Event(NamedTuple):
    """A clip in a scene: where it sounds, and its position among the clips."""

    start_s: float
    end_s: float
    clip: int


@dataclass(frozen=True)
class Placement:
    """How clips lie in a scene.

    seconds: length of the scene; None for the clips and gaps after one another, all of them.
    gap_s: least and greatest time before, between and after clips. snr_db: the level of a clip above the background's,
    each measured as root mean square; None keeps the clips' own levels. between: the background sounds between the
    clips alone, not behind them. cut: the scene ends within a clip, where it would otherwise hold whole ones only.
    """

    seconds: float | None = None
    gap_s: tuple[float, float] = (0.5, 2.0)
    snr_db: float | None = 10.0
    seed: int = 0
    between: bool = False
    cut: bool = False


Background = Callable[[int], np.ndarray]


def noise_background(seed: int, level: float = LEVEL, slope: float | None = None) -> Background:
    """Endless noise with a power that falls as 1/f^slope, 0 for white to 2 for brown; by default a random slope. It has
    no seams and repeats after 2^20 samples."""
    period = coloured_noise(1 << 20, np.random.default_rng([seed, 8]), slope)
    period *= np.float32(level / rms(period))
    at = 0

    def more(count: int) -> np.ndarray:
        nonlocal at
        at += count
        return period[np.arange(at - count, at) % len(period)]

    return more


def clip_background(clips: Sequence[np.ndarray], sample_rate: int, seed: int, level: float = LEVEL) -> Background:
    """Endless real background: clips (n,) in random order, each brought to one level and faded into the next.

    Raises UserError when all of them are silent.
    """
    audible = [clip for clip in clips if rms(clip) > 0]
    if not audible:
        raise UserError("the background recordings are silent: choose others")
    fade = round(FADE_S * sample_rate)
    rng = np.random.default_rng([seed, 9])
    waiting = np.zeros(0, np.float32)
    tail = np.zeros(fade, np.float32)

    def more(count: int) -> np.ndarray:
        nonlocal waiting, tail
        parts = [waiting]
        size = len(waiting)
        while size < count:
            clip = audible[int(rng.integers(len(audible)))]
            piece = faded(clip * np.float32(level / rms(clip)), fade)
            if len(piece) <= 2 * fade:
                piece = np.pad(piece, (0, 2 * fade + 1 - len(piece)))
            piece[:fade] += tail
            tail = piece[-fade:].copy() if fade else tail
            parts.append(piece[: len(piece) - fade])
            size += len(parts[-1])
        joined = np.concatenate(parts)
        waiting = joined[count:].copy()
        return joined[:count]

    return more


def faded(samples: np.ndarray, fade: int) -> np.ndarray:
    """A copy of samples (n,) that rises from and falls to zero over `fade` samples: the square roots of a line, so that
    two unrelated sounds fade into each other at one level."""
    out = samples.astype(np.float32, copy=True)
    fade = min(fade, len(out) // 2)
    if fade:
        ramp = np.sqrt((np.arange(fade, dtype=np.float32) + 0.5) / fade)
        out[:fade] *= ramp
        out[len(out) - fade :] *= ramp[::-1]
    return out


def scene_parts(
    clips: Sequence[np.ndarray], background: Background, sample_rate: int, placement: Placement
) -> Iterator[tuple[np.ndarray, Event | None]]:
    """A scene piece by piece, in constant memory: samples (n,), and the event that the piece is, or None.

    Clips come in their order, over and over where `seconds` asks for more; the last may be cut.
    """
    if not clips:
        raise UserError("a scene needs a clip")
    rng = np.random.default_rng([placement.seed, 10])
    total = None if placement.seconds is None else round(placement.seconds * sample_rate)
    fade = round(FADE_S * sample_rate)
    at = 0
    order = itertools.cycle(range(len(clips))) if total is not None else iter(range(len(clips)))
    for number in order:
        gap = round(rng.uniform(*placement.gap_s) * sample_rate)
        clip = clips[number]
        if total is not None and at + gap + len(clip) > total:
            clip = clip[: max(0, total - at - gap)] if placement.cut else clip[:0]
            if not len(clip):
                break
        for size in _minutes(gap, sample_rate):
            yield background(size), None
        at += gap
        event = Event(at / sample_rate, (at + len(clip)) / sample_rate, number)
        yield _placed(clip, background(len(clip)), fade, placement.snr_db, placement.between), event
        at += len(clip)
    rest = round(rng.uniform(*placement.gap_s) * sample_rate) if total is None else total - at
    for size in _minutes(rest, sample_rate):
        yield background(size), None


def _placed(clip: np.ndarray, behind: np.ndarray, fade: int, snr_db: float | None, alone: bool = False) -> np.ndarray:
    level, behind_level = rms(clip), rms(behind)
    gain = 1.0 if snr_db is None or not level or not behind_level else behind_level / level * 10 ** (snr_db / 20)
    if alone:  # what is behind the clip leaves as the clip comes
        behind = behind - faded(behind, fade)
    return behind + faded(clip, fade) * np.float32(gain)


def make_scene(
    clips: Sequence[np.ndarray], background: Background, sample_rate: int, placement: Placement
) -> tuple[np.ndarray, list[Event]]:
    """The samples (n,) of a scene, and its events in order of time."""
    parts = list(scene_parts(clips, background, sample_rate, placement))
    return np.concatenate([samples for samples, _ in parts]), [event for _, event in parts if event is not None]


def needle_parts(
    clip: np.ndarray, background: Background, sample_rate: int, seconds: float, at_s: float, snr_db: float | None = 10.0
) -> Iterator[np.ndarray]:
    """One clip at a known second of a long background, piece by piece: `seconds` in all.

    Raises UserError when the clip does not lie inside.
    """
    total, begin = round(seconds * sample_rate), round(at_s * sample_rate)
    if begin < 0 or begin + len(clip) > total:
        raise UserError(f"a clip of {len(clip) / sample_rate:.1f} s at {at_s:g} s does not fit into {seconds:g} s")
    for size in _minutes(begin, sample_rate):
        yield background(size)
    yield _placed(clip, background(len(clip)), round(FADE_S * sample_rate), snr_db)
    for size in _minutes(total - begin - len(clip), sample_rate):
        yield background(size)


def _minutes(samples: int, sample_rate: int) -> Iterator[int]:
    for at in range(0, samples, 60 * sample_rate):
        yield min(60 * sample_rate, samples - at)


def write_scene(path: Path, parts: Iterator[np.ndarray], sample_rate: int) -> None:
    """Write a scene as a 16-bit WAV (beyond full scale it is clipped), all at once or not at all."""
    import soundfile

    with (
        atomic_write(path, "wb") as file,
        soundfile.SoundFile(file, "w", sample_rate, 1, format="WAV", subtype="PCM_16") as out,
    ):
        for samples in parts:
            out.write(np.clip(samples, -1.0, 1.0))
