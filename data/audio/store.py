"""Clips decoded once: mono at one rate, checked, and kept in a memory map where they fit; and their statistics."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqssm.data.audio.layouts import Clip
from seqssm.data.audio.reading import duration, read_audio
from seqssm.data.features import FeatureConfig, fbank
from seqssm.data.progress import progress_bar
from seqssm.data.resampling import resample, resampled_length
from seqssm.errors import UserError
from seqssm.files import atomic_write

VERSION = 1
FULL_SCALE = 0.9999
CLIPPED_SHARE = 1e-3  # of the samples at full scale, from which on a clip counts as clipped
STATISTICS_CLIPS = 10_000
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Scan:
    """What is known of a clip. Only decoding tells `digest` (of the samples), `peak` and `clipped`."""

    samples: int  # at the store's rate
    rate: int  # of the file
    channels: int
    peak: float = float("nan")
    clipped: float = 0.0  # share of samples at full scale
    digest: str = ""
    error: str = ""


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/seqssm/audio`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqssm" / "audio"


def decode(clip: Clip, sample_rate: int) -> tuple[np.ndarray, Scan]:
    """Samples (n,) float32 of a clip, its channels averaged, at a rate; raises UserError naming the file."""
    samples, rate = read_audio(clip.path, clip.start_s, clip.end_s)
    mono = samples.mean(0, dtype=np.float32) if len(samples) > 1 else samples[0]
    made = resample(mono, rate, sample_rate)
    if not len(made):
        raise UserError(f"{clip.name} is shorter than a sample at {sample_rate} Hz: remove it from the data")
    level = np.abs(samples)
    scan = Scan(
        samples=len(made),
        rate=rate,
        channels=len(samples),
        peak=float(level.max()),
        clipped=float((level >= FULL_SCALE).mean()),
        digest=hashlib.blake2b(made.tobytes(), digest_size=8).hexdigest(),
    )
    return made, scan


class ClipStore:
    """Samples of clips by number, read from a memory map or decoded anew.

    Clips are decoded once into `cache_dir`, under a name made of what they are (path, size, time of change, part) and
    the rate, when they take at most `cache_gb` there; otherwise only their headers are read now.

    Args:
        clips: all of them; their files exist.
        sample_rate: Hz.
        cache_dir: default `default_cache()`.
        cache_gb: 0 keeps nothing.
        skip_bad: leave unreadable clips out; then every one is decoded now.

    Raises:
        UserError: clips that are unreadable, empty or hold NaN, the first of them named, unless `skip_bad`.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        sample_rate: int,
        cache_dir: Path | None = None,
        cache_gb: float = 4.0,
        skip_bad: bool = False,
    ) -> None:
        self.sample_rate = sample_rate
        self.cache_dir = cache_dir or default_cache()
        self._samples: np.ndarray | None = None
        self._data: Path | None = None
        self._offsets = np.zeros(len(clips), np.int64)
        key = _key([*map(_identity, clips), VERSION, sample_rate])
        scans = self._open(key) if cache_gb > 0 else None
        if scans is None:
            scans = self._kept(f"{key}.headers", lambda: _headers(clips, sample_rate))
            if 4 * sum(scan.samples for scan in scans) <= cache_gb * 2**30:
                scans = self._fill(key, clips)
            elif skip_bad:
                scans = self._kept(f"{key}.decoded", lambda: list(_decoded(clips, sample_rate, lambda samples: None)))
        bad = [scan.error for scan in scans if scan.error]
        if bad and not skip_bad:
            more = f" ({len(bad)} such clips; skip_bad leaves them out)" if len(bad) > 1 else ""
            raise UserError(f"{bad[0]}{more}")
        self.left_out = {"unreadable clips": len(bad)} if bad else {}
        self.bad = bad
        good = [i for i, scan in enumerate(scans) if not scan.error]
        self._offsets = (np.cumsum([0, *(scan.samples for scan in scans)])[:-1])[good]
        self.clips = [clips[i] for i in good]
        self.scans = [scans[i] for i in good]
        if not self.clips:
            raise UserError(f"not one of {len(clips)} clips is readable: {bad[0]}")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> np.ndarray:
        """Samples (n,) float32; not to be written to."""
        return self.read(number, 0, self.scans[number].samples)

    def read(self, number: int, first: int, count: int) -> np.ndarray:
        """Samples (count,) from a clip's `first` on, fewer at its end; not to be written to."""
        available = self.scans[number].samples
        count = min(count, available - first)
        if self._samples is not None:
            begin = int(self._offsets[number]) + first
            return self._samples[begin : begin + count]
        clip = self.clips[number]
        if first > 0 or count < available:
            start_s = clip.start_s + first / self.sample_rate
            clip = replace(clip, start_s=start_s, end_s=start_s + count / self.sample_rate)
        return decode(clip, self.sample_rate)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": None}  # workers map the file themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._data is not None:
            self._map(self._data)

    @property
    def seconds(self) -> np.ndarray:
        """Durations (clips,)."""
        return np.array([scan.samples for scan in self.scans]) / self.sample_rate

    def _kept(self, name: str, make: Callable[[], list[Scan]]) -> list[Scan]:
        """Scans from a file where it is there, else made and written where that is possible."""
        path = self.cache_dir / f"{name}.json"
        try:
            return [Scan(**scan) for scan in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError):
            scans = make()
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                json.dump([asdict(scan) for scan in scans], file)
        except (OSError, UserError):
            pass  # made again next time
        return scans

    def _open(self, key: str) -> list[Scan] | None:
        index, data = self.cache_dir / f"{key}.json", self.cache_dir / f"{key}.f32"
        try:
            scans = [Scan(**scan) for scan in json.loads(index.read_text())]
            if data.stat().st_size != 4 * sum(scan.samples for scan in scans):
                return None
        except (OSError, ValueError, TypeError):
            return None
        self._map(data)
        return scans

    def _map(self, data: Path) -> None:
        self._data = data
        self._samples = np.memmap(data, np.float32, "r") if data.stat().st_size else np.zeros(0, np.float32)

    def _fill(self, key: str, clips: Sequence[Clip]) -> list[Scan]:
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write in {self.cache_dir} ({error.strerror}): set cache_dir, or cache_gb 0"
            ) from error
        data = self.cache_dir / f"{key}.f32"
        with atomic_write(data, "wb") as file:
            scans = list(_decoded(clips, self.sample_rate, lambda samples: file.write(samples.tobytes())))
        with atomic_write(self.cache_dir / f"{key}.json") as index:
            json.dump([asdict(scan) for scan in scans], index)
        self._map(data)
        return scans


def _identity(clip: Clip) -> list[object]:
    try:
        stat = clip.path.stat()
    except OSError:
        return [str(clip.path.resolve())]
    return [str(clip.path.resolve()), stat.st_size, stat.st_mtime_ns, clip.start_s, clip.end_s]


def _key(content: object) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def _headers(clips: Sequence[Clip], sample_rate: int) -> list[Scan]:
    scans = []
    with progress_bar("reading headers", len(clips)) as advance:
        for clip in clips:
            try:
                frames, rate, channels = duration(clip.path, clip.start_s, clip.end_s)
                scans.append(Scan(resampled_length(frames, rate, sample_rate), rate, channels))
            except UserError as error:
                scans.append(Scan(0, 0, 0, error=str(error)))
            advance(1)
    return scans


def _decoded(clips: Sequence[Clip], sample_rate: int, keep: Callable[[np.ndarray], object]) -> Iterator[Scan]:
    """Scans in order; `keep` gets the samples in order."""

    def one(clip: Clip) -> tuple[np.ndarray, Scan]:
        try:
            return decode(clip, sample_rate)
        except UserError as error:
            return np.zeros(0, np.float32), Scan(0, 0, 0, error=str(error))

    with progress_bar("decoding clips", len(clips)) as advance, ThreadPoolExecutor(THREADS) as pool:
        rest = iter(clips)
        waiting = [pool.submit(one, clip) for clip in islice(rest, 4 * THREADS)]
        while waiting:
            samples, scan = waiting.pop(0).result()
            waiting += [pool.submit(one, clip) for clip in islice(rest, 1)]
            keep(samples)
            advance(1)
            yield scan


def with_statistics(config: FeatureConfig, store: ClipStore, numbers: Sequence[int]) -> FeatureConfig:
    """The configuration with the mean and standard deviation of all log-mel energies of these clips.

    At most 10,000 of them are read, evenly spaced. The result is kept beside the decoded clips, under a name made of
    the clips and the settings.
    """
    plain = replace(config, mean=None, std=None)
    if len(numbers) > STATISTICS_CLIPS:
        numbers = [numbers[i] for i in np.linspace(0, len(numbers) - 1, STATISTICS_CLIPS).round().astype(int)]
    key = _key([VERSION, plain.to_dict(), [_identity(store.clips[number]) for number in numbers]])
    path = store.cache_dir / f"{key}.statistics.json"
    try:
        stored = json.loads(path.read_text())
        return replace(plain, mean=float(stored["mean"]), std=float(stored["std"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    mean, std = _moments(plain, store, numbers)
    found = replace(plain, mean=mean, std=std)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            json.dump({"mean": found.mean, "std": found.std, "clips": len(numbers)}, file)
    except (OSError, UserError):
        pass  # computed again next time
    return found


def _moments(config: FeatureConfig, store: ClipStore, numbers: Sequence[int]) -> tuple[float, float]:
    count, total, squares = 0, 0.0, 0.0
    with progress_bar("measuring features", len(numbers)) as advance:
        for number in numbers:
            # log energies lie about -6: double precision sums need no shift
            values = fbank(torch.from_numpy(np.array(store[number])), config).double()
            count += values.numel()
            total += float(values.sum())
            squares += float(values.square().sum())
            advance(1)
    mean = total / count
    std = max(squares / count - mean**2, 0.0) ** 0.5
    if std < 1e-3:
        raise UserError("every train clip has the same features (all silent?): check the recordings")
    return mean, std


def remarks(store: ClipStore) -> list[str]:
    """What a user should know of the recordings, a line each."""
    lines = []
    rates = Counter(scan.rate for scan in store.scans if scan.rate != store.sample_rate)
    if rates:
        named = ", ".join(f"{count} of {rate:,} Hz" for rate, count in sorted(rates.items()))
        lines.append(f"resampled to {store.sample_rate:,} Hz: {named}")
    channels = Counter(scan.channels for scan in store.scans if scan.channels > 1)
    if channels:
        lines.append(
            "averaged channels: " + ", ".join(f"{n} clips of {c} channels" for c, n in sorted(channels.items()))
        )
    for what, chosen in (
        ("silent clips (all samples zero), kept", [scan.peak == 0 for scan in store.scans]),
        ("clipped clips (samples at full scale), kept", [scan.clipped > CLIPPED_SHARE for scan in store.scans]),
    ):
        if any(chosen):
            lines.append(f"{sum(chosen)} {what}; the first: {store.clips[chosen.index(True)].name}")
    if store.bad:
        lines.append(f"left out {len(store.bad)} unreadable clips; the first: {store.bad[0]}")
    return lines
