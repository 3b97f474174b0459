"""Packets of sound on their way to a model: checked, and queued in one piece of memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seqssm.errors import UserError


def mono(samples: np.ndarray | Tensor, before: int) -> NDArray[np.float32]:
    """(n,) float32 of (n,) or (channels, n), floats between -1 and 1 or 16-bit integers; perhaps the same memory.

    Args:
        samples: a packet.
        before: samples that came earlier, for messages.

    Raises:
        UserError: they are of another kind, or NaN or infinite.
    """
    array = samples.numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if array.dtype == np.int16:
        array = array.astype(np.float32) / 32768
    elif array.dtype.kind != "f":
        raise UserError(f"samples must be floats between -1 and 1 or 16-bit integers, got {array.dtype}")
    if array.ndim not in (1, 2):
        raise UserError(f"samples must be (n,) or (channels, n), got {array.shape}")
    if not np.isfinite(array).all():
        at = int(np.argmin(np.isfinite(array.reshape(-1, array.shape[-1])).all(0)))
        raise UserError(f"sample {before + at} is NaN or infinite; the packet was not taken")
    if array.ndim == 2:
        array = array.mean(0, dtype=np.float32)
    return array.astype(np.float32, copy=False)


class SampleQueue:
    """Samples that wait: appended at one end, taken at the other, without a copy of all of them each time."""

    def __init__(self) -> None:
        self._memory = np.zeros(0, np.float32)
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    def append(self, samples: NDArray[np.float32]) -> None:
        """More samples (n,)."""
        end = self._end + len(samples)
        if end > len(self._memory):
            waiting = self.samples
            end = len(waiting) + len(samples)
            # Room for as much again: moving costs a constant a sample.
            memory = self._memory if 2 * end <= len(self._memory) else np.empty(2 * end + 4096, np.float32)
            memory[: len(waiting)] = waiting
            self._memory, self._begin, self._end = memory, 0, len(waiting)
        self._memory[self._end : end] = samples
        self._end = end

    @property
    def samples(self) -> NDArray[np.float32]:
        """All that wait (n,), until the next :meth:`append`."""
        return self._memory[self._begin : self._end]

    def drop(self, count: int) -> None:
        """Forget the first ones, or all where there are fewer."""
        self._begin = min(self._begin + count, self._end)
