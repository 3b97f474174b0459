"""Audio files through libsndfile (WAV, FLAC, MP3, OGG Vorbis, Opus): whole, a part, or block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from seqssm.data.resampling import check_rate
from seqssm.errors import UserError

Sound = str | Path | npt.ArrayLike
"""A file by its path, or samples: a NumPy array, a CPU tensor, a list."""

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".au", ".w64", ".rf64", ".caf")


# A frame of MP3 needs the bits of frames before it: decoding begins so many samples before those that are wanted.
MP3_LEAD = 32 * 1152
MOST_CHANNELS = 256
LOUDEST = 16.0
"""Of float samples: sound that clips goes a little beyond 1, integers written as floats go far."""


@cache
def _sequential_file() -> type:
    import soundfile

    class SequentialFile(soundfile.SoundFile):
        """Reads on without seeking. soundfile seeks after every read to where it is already, after which MP3 frames
        are decoded without the bits of those before them, and come out wrong."""

        def seekable(self) -> bool:
            return False

    return SequentialFile


def open_audio(source: str | Path | IO[bytes]) -> Any:
    """A `soundfile.SoundFile` to read in order, whose rate has been checked; raises UserError naming the file."""
    import soundfile

    name = _name(source)
    if isinstance(source, str | Path) and not os.path.isfile(source):
        if os.path.isdir(source):
            raise UserError(f"{source} is a folder: name the recordings in it")
        if not os.path.exists(source):
            raise UserError(f"{source} does not exist: correct the path")
        raise UserError(f"{source} is no file but a pipe or a device: live commands read them as -, standard input")
    try:
        # As bytes: soundfile encodes a str, and fails for a name that is not UTF-8, such as from an old archive.
        file = _sequential_file()(os.fsencode(source) if isinstance(source, str | Path) else source)
    except (soundfile.LibsndfileError, TypeError, OSError) as error:
        raise UserError(
            f"{name}: not readable as audio ({_reason(error)}); give WAV, FLAC, MP3, OGG or Opus"
        ) from error
    check_rate(file.samplerate, name)
    return file


def _name(source: str | Path | IO[bytes]) -> str:
    """What messages call it."""
    return str(source if isinstance(source, str | Path) else getattr(source, "name", source))


def cut_off(path: str | Path) -> int:
    """Bytes that a WAV file's header promises and the file does not hold, as after a broken download; 0 for others."""
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(8)
    size = int.from_bytes(head[4:], "little")
    # A program that writes into a pipe cannot know the size: it says zero, or the largest there is.
    if head[:4] != b"RIFF" or size in (0, 0xFFFFFFFF):
        return 0
    return max(0, size + 8 - path.stat().st_size)


def _reason(error: Exception) -> str:
    reason = str(error).rpartition(": ")[2].strip().rstrip(".") or type(error).__name__
    # What libsndfile says of bytes in which it finds no MP3; that the file is there has been seen.
    return "Format not recognised" if "not a regular file" in reason else reason


def duration(path: str | Path, start_s: float = 0.0, end_s: float | None = None) -> tuple[int, int, int]:
    """Samples of a file or of a part of it, sample rate and channels, by the header; raises UserError naming it."""
    with open_audio(path) as file:
        begin, end = _part(file, path, start_s, end_s)
        return end - begin, file.samplerate, file.channels


def _part(file: Any, path: str | Path, start_s: float, end_s: float | None) -> tuple[int, int]:
    rate = file.samplerate
    begin = round(start_s * rate)
    end = file.frames if end_s is None else min(round(end_s * rate), file.frames)
    if begin >= end:
        if not file.frames:
            raise _no_samples(path)
        where = f"no samples from {start_s:g} s on"
        raise UserError(f"{path} has {where} (it is {file.frames / rate:.2f} s long): remove it from the data")
    return begin, end


def read_audio(path: str | Path, start_s: float = 0.0, end_s: float | None = None) -> tuple[np.ndarray, int]:
    """Samples (channels, n) float32 between -1 and 1, and the sample rate, of a file or of a part of it.

    Raises:
        UserError: naming a file that is missing, unreadable or empty there, or holds NaN or infinity.
    """
    with open_audio(path) as file:
        rate = file.samplerate
        begin, end = _part(file, path, start_s, end_s)
        lead = min(begin, MP3_LEAD) if file.format == "MP3" else 0
        if begin > lead:
            file.seek(begin - lead)
        samples = _decode(file, lead + end - begin, path)[lead:]
    if not len(samples):
        raise _no_samples(path)
    _check_sound(samples, path, begin, rate)
    return np.ascontiguousarray(samples.T), rate


def _check_sound(samples: np.ndarray, name: object, before: int, rate: float) -> None:
    """Raise UserError for samples (n, channels) that are no sound; ``before`` came earlier."""
    sound = np.abs(samples) <= LOUDEST  # false for NaN, too
    if sound.all():
        return
    row = int(np.argmin(sound.all(1)))
    at, value = (before + row) / rate, samples[row][~sound[row]][0]
    if not np.isfinite(value):
        raise UserError(f"{name} holds NaN or infinite samples at {at:.2f} s: repair it, or remove it from the data")
    raise UserError(f"{name} has a sample of {value:g} at {at:.2f} s, where full scale is 1: scale it")


def _no_samples(name: object) -> UserError:
    """The error for a recording without any; one whose header was never completed may have some all the same."""
    if isinstance(name, str | Path) and os.path.isfile(name):
        with open(name, "rb") as file:
            head = file.read(4096)
        at = head.find(b"data")
        behind = os.path.getsize(name) - at - 8
        if head[:4] == b"RIFF" and at > 0 and head[at + 4 : at + 8] == bytes(4) and behind > 0:
            return UserError(
                f"{name} has no samples by its header, which was never completed, and {behind:,} bytes behind it: "
                "rewrite it, such as by ffmpeg -i OLD.wav NEW.wav"
            )
    return UserError(f"{name} has no samples: remove it from the data")


def _decode(file: Any, count: int, name: object) -> np.ndarray:
    import soundfile

    try:
        return file.read(count, dtype="float32", always_2d=True)  # (n, channels)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"{name}: damaged audio ({_reason(error)}); repair it or remove it from the data") from error


def blocks(source: str | Path | IO[bytes], seconds: float = 10.0) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks (channels, n) float32 of a file or a seekable binary stream, and the rate, in constant memory.

    Raises UserError as `read_audio`.
    """
    name = _name(source)
    with open_audio(source) as file:
        size, seen = max(1, round(seconds * file.samplerate)), 0
        while True:
            samples = _decode(file, size, name)
            if not len(samples):
                break
            _check_sound(samples, name, seen, file.samplerate)
            seen += len(samples)
            yield np.ascontiguousarray(samples.T), file.samplerate
        if not seen:
            raise _no_samples(name)


def sound_blocks(source: Sound, rate: int | None = None, seconds: float = 10.0) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks (channels, n) float32 and the rate, of a file by its path or of samples (n,) or (channels, n) at ``rate``.

    Raises UserError as `blocks`, or where samples are no finite floats or 16-bit integers, or their rate is not given.
    """
    if isinstance(source, str | Path):
        if rate is not None:
            raise UserError(f"{source} says its own sample rate: leave rate out, which is for samples")
        yield from blocks(source, seconds)
        return
    if isinstance(source, bytes | bytearray) or hasattr(source, "read"):
        raise UserError("give the path of a recording, or its samples and their rate; not the bytes of a file")
    if rate is None:
        raise UserError("samples need their sample rate: predict(samples, rate=16000)")
    if isinstance(rate, str):
        raise UserError(f"a sample rate of {rate!r} is not a number of Hz, such as 16000")
    rate = check_rate(rate, "the samples")
    try:
        samples = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    except ValueError as error:
        raise UserError(f"the samples are no array ({error}): give (n,) or (channels, n)") from error
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768
    if samples.dtype.kind != "f" or samples.ndim not in (1, 2) or not samples.shape[-1]:
        raise UserError(
            "samples must be floats between -1 and 1, or 16-bit integers, (n,) or (channels, n): "
            f"got {samples.dtype} {samples.shape}"
        )
    samples = np.atleast_2d(samples).astype(np.float32)
    if len(samples) > MOST_CHANNELS:
        # soundfile and scipy give (n, channels), which would be taken for thousands of channels of a sample or two.
        raise UserError(
            f"samples {samples.shape} have {len(samples):,} channels: give (channels, n), such as samples.T"
        )
    _check_sound(samples.T, "the array", 0, rate)
    size = max(1, round(seconds * rate))
    for begin in range(0, samples.shape[1], size):
        yield samples[:, begin : begin + size], rate
