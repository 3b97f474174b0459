"""Sample rate conversion with soxr, of whole recordings and of streams, with the same result."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from seqssm.errors import UserError

MAX_RATE = 768_000
# Reach of soxr's filter (quality HQ) to either side in samples of the slower rate, rounded up: 105 were measured.
REACH_SAMPLES = 160
SEGMENT_S = 0.04


def check_rate(rate: float, where: str) -> int:
    """The rate as a whole number; raises UserError unless it lies in 1 to 768,000 Hz."""
    if not 0 < rate <= MAX_RATE or rate != int(rate):
        raise UserError(f"{where}: a sample rate of {rate} Hz is not between 1 and {MAX_RATE:,} Hz; correct its header")
    return int(rate)


def resampled_length(samples: int, source_rate: int, target_rate: int) -> int:
    """How many samples `resample` gives: the nearest whole number, a half being rounded up."""
    return (2 * samples * target_rate + source_rate) // (2 * source_rate)


def resample(samples: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Samples (..., n) float32 at another rate; the first samples coincide."""
    if source_rate == target_rate or not samples.shape[-1]:
        return samples
    import soxr

    rows = samples.reshape(-1, samples.shape[-1])
    length = resampled_length(rows.shape[1], source_rate, target_rate)
    out = np.zeros((len(rows), length), np.float32)
    for row, to in zip(rows, out, strict=True):
        made = soxr.resample(np.ascontiguousarray(row, np.float32), source_rate, target_rate)[:length]
        to[: len(made)] = made
    return out.reshape(*samples.shape[:-1], length)


class StreamingResampler:
    """The result of `resample` for mono packets of any size, with a state that can be written down.

    soxr's own streams keep a state that cannot be saved. Its filter is finite, so a segment of the output needs only
    the input around it: every segment of a fixed grid is converted by itself, with the filter's reach to either side,
    which equals the conversion of the whole within rounding and does not depend on the packets.

    The delay is a segment and the reach: 50 ms for common rates, up to a second where `source_rate` and `target_rate`
    have hardly a common divisor.
    """

    def __init__(self, source_rate: int, target_rate: int) -> None:
        self.source_rate = check_rate(source_rate, "input")
        self.target_rate = target_rate
        divisor = math.gcd(source_rate, target_rate)
        step_in, step_out = source_rate // divisor, target_rate // divisor  # the grids coincide every so many samples
        steps = math.ceil(SEGMENT_S * source_rate / step_in)
        self._segment_in, self._segment_out = steps * step_in, steps * step_out
        reach = math.ceil(REACH_SAMPLES * source_rate / min(source_rate, target_rate) / step_in)
        self._reach_in, self._reach_out = reach * step_in, reach * step_out
        self.reset()

    def reset(self) -> None:
        """Start a new recording."""
        self._input = np.zeros(0, np.float32)  # from `_first` on
        self._first = 0  # number of the first sample kept
        self._done = 0  # input samples whose output has been given

    def accept(self, samples: np.ndarray) -> np.ndarray:
        """New output samples (m,), possibly none, for the next input samples (n,); perhaps the same memory."""
        if self.source_rate == self.target_rate:
            return samples.astype(np.float32, copy=False)
        self._input = np.concatenate([self._input, samples.astype(np.float32)])
        end = self._first + len(self._input)
        out = []
        while self._done + self._segment_in + self._reach_in <= end:
            out.append(self._convert(self._done + self._segment_in + self._reach_in, self._segment_out))
            self._done += self._segment_in
        self._forget()
        return np.concatenate(out) if out else np.zeros(0, np.float32)

    def flush(self) -> np.ndarray:
        """The rest of the output, the recording having ended."""
        end = self._first + len(self._input)
        out = []
        while self._done < end:
            done_out = self._done // self._segment_in * self._segment_out
            rest = resampled_length(end, self.source_rate, self.target_rate) - done_out
            upto = min(self._done + self._segment_in + self._reach_in, end)
            out.append(self._convert(upto, min(self._segment_out, rest)))
            self._done += self._segment_in
        self.reset()
        return np.concatenate(out) if out else np.zeros(0, np.float32)

    def _convert(self, end: int, count: int) -> np.ndarray:
        begin = max(self._done - self._reach_in, 0)
        made = resample(self._input[begin - self._first : end - self._first], self.source_rate, self.target_rate)
        skip = self._reach_out if self._done >= self._reach_in else self._done // self._segment_in * self._segment_out
        piece = made[skip : skip + count]
        return piece if len(piece) == count else np.pad(piece, (0, count - len(piece)))

    def _forget(self) -> None:
        drop = max(self._done - self._reach_in, 0) - self._first
        if drop > 0:
            self._input = self._input[drop:].copy()
            self._first += drop

    def snapshot(self) -> dict[str, Any]:
        """The state: `input` (n,) float32 and two numbers."""
        return {"input": self._input.copy(), "first": self._first, "done": self._done}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `snapshot` gave."""
        self._input = np.asarray(state["input"], np.float32).copy()
        self._first, self._done = int(state["first"]), int(state["done"])
