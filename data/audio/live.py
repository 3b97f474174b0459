"""Sound that is still coming in: raw PCM or WAV through a pipe, or a WAV file that grows."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from seqssm.data.audio.reading import LOUDEST, MOST_CHANNELS
from seqssm.data.resampling import check_rate
from seqssm.errors import UserError

ENCODINGS = {"u8": ("u1", 1), "s16le": ("<i2", 2), "s24le": ("", 3), "s32le": ("<i4", 4), "f32le": ("<f4", 4)}
"""PCM encodings by ffmpeg's names: dtype, bytes a sample."""
POLL_S = 0.05
LONGEST_CHUNK = 1 << 24
"""Bytes of a part of a WAV header, such as a picture: what is longer would only fill the memory."""
UNKNOWN_SIZE = 0x7F000000
"""Programs that write WAV to a pipe put a size about as large as the field takes into its header."""


def standard_input() -> IO[bytes]:
    """Standard input, unbuffered: a packet is heard when it comes, not when a buffer is full. To be closed.

    Raises:
        UserError: the program was started without one.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed: send sound to it, or name a file in place of -")
    return os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)


class LiveAudio:
    """Packets of samples from a stream, as they arrive, in constant memory.

    A stream that begins as a WAV file says its own rate, channels and encoding; anything else is raw PCM.

    Args:
        stream: opened for reading bytes.
        name: for messages.
        rate: Hz, of raw PCM; may be None when the stream is WAV.
        channels: of raw PCM.
        encoding: of raw PCM, one of ``ENCODINGS``.
        follow_s: wait so long for a file to grow before taking its end for the end; 0 for a pipe, whose end is known.

    Attributes:
        rate, channels: of the samples.
        repaired: samples so far that were NaN, infinite or far beyond full scale, and were taken for silence.
        left_over: bytes at the end that made no whole sample.
        missing: bytes that did not come although a WAV header says so.

    Raises:
        UserError: no bytes, a damaged header, an unknown encoding, or raw PCM without a rate.
    """

    def __init__(
        self,
        stream: IO[bytes],
        name: str,
        *,
        rate: int | None = None,
        channels: int = 1,
        encoding: str = "s16le",
        follow_s: float = 0.0,
    ) -> None:
        self.name, self.follow_s = name, follow_s
        self._stream: Any = stream
        self._head = b""  # read already, not yet given out
        self._left: int | None = None  # bytes of sound that the header promises
        self.repaired = self.left_over = self.missing = 0
        self._fill(12)
        if not self._head:
            raise UserError(f"{name} has no samples: nothing came before it ended")
        if self._head[:4] in (b"RIFF", b"RF64") and self._head[8:12] == b"WAVE":
            rate, channels, encoding = self._read_header()
        elif rate is None:
            raise UserError(f"{name} is raw PCM, not WAV: say its sample rate (--rate), and --channels and --encoding")
        if encoding not in ENCODINGS:
            raise UserError(f"{name}: unknown encoding {encoding!r}; choose among {', '.join(ENCODINGS)}")
        if not 1 <= channels <= MOST_CHANNELS:
            raise UserError(f"{name}: {channels} channels; 1 to {MOST_CHANNELS} can be read")
        check_rate(rate, name)
        self.rate, self.channels, self.encoding = rate, channels, encoding

    def _fill(self, size: int) -> None:
        """Have ``size`` bytes ready, or what there is before the end."""
        while len(self._head) < size:
            more = self._receive(size - len(self._head))
            if not more:
                return
            self._head += more

    def _receive(self, size: int) -> bytes:
        """Some bytes, at most ``size``; none at the end."""
        deadline = time.monotonic() + self.follow_s
        while True:
            # read1 gives what is there; read would wait for all of it.
            data = getattr(self._stream, "read1", self._stream.read)(size)
            if data or time.monotonic() >= deadline:
                return data
            time.sleep(POLL_S)

    def _take(self, size: int) -> bytes:
        self._fill(size)
        taken, self._head = self._head[:size], self._head[size:]
        if len(taken) < size:
            raise UserError(f"{self.name}: its WAV header ends too early")
        return taken

    def _read_header(self) -> tuple[int, int, str]:
        self._take(12)
        form: tuple[int, int, str] | None = None
        while True:
            kind, size = struct.unpack("<4sI", self._take(8))
            if kind == b"data":
                break
            if size > LONGEST_CHUNK:
                raise UserError(f"{self.name}: its WAV header is damaged: a part of it is {size:,} bytes long")
            body = self._take(size + size % 2)
            if kind == b"fmt ":
                form = self._read_format(body)
        if form is None:
            raise UserError(f"{self.name}: its WAV header has no format before the samples")
        # A growing file's header tells how long it was when it was last brought up to date.
        if not self.follow_s and 0 < size < UNKNOWN_SIZE:
            self._left = size
        return form

    def _read_format(self, body: bytes) -> tuple[int, int, str]:
        if len(body) < 16:
            raise UserError(f"{self.name}: its WAV header is damaged")
        tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
        if tag == 0xFFFE and len(body) >= 26:  # extensible: the tag begins the sub-format
            (tag,) = struct.unpack("<H", body[24:26])
        encoding = {(1, 8): "u8", (1, 16): "s16le", (1, 24): "s24le", (1, 32): "s32le", (3, 32): "f32le"}.get(
            (tag, bits)
        )
        if encoding is None:
            raise UserError(
                f"{self.name}: WAV format {tag} with {bits} bits cannot be read live; use PCM or 32-bit float"
            )
        return rate, channels, encoding

    def __iter__(self) -> Iterator[np.ndarray]:
        """Packets (channels, n) float32 between -1 and 1, n as they come."""
        width = ENCODINGS[self.encoding][1] * self.channels
        waiting = b""
        while self._left is None or self._left > 0:
            size = 65536 if self._left is None else min(65536, self._left)
            if self._head:
                data, self._head = self._head[:size], self._head[size:]
            else:
                data = self._receive(size)
            if not data:
                break
            if self._left is not None:
                self._left -= len(data)
            waiting += data
            whole = len(waiting) - len(waiting) % width
            if whole:
                yield self._samples(waiting[:whole])
                waiting = waiting[whole:]
        self.left_over = len(waiting)
        self.missing = self._left or 0

    def complaints(self) -> list[str]:
        """What was wrong with the stream, in sentences without a full stop; once it has ended."""
        said = []
        if self.repaired:
            said.append(f"{self.repaired:,} samples were NaN, infinite or far beyond full scale, and taken for silence")
        if self.left_over:
            said.append(
                f"it ended within a sample, {self.left_over} bytes of which were left out; are --channels and "
                "--encoding right?"
            )
        if self.missing:
            said.append(f"it ended {self.missing:,} bytes before the end that its WAV header tells")
        return said

    def _samples(self, data: bytes) -> np.ndarray:
        if self.encoding == "s24le":
            parts = np.frombuffer(data, np.uint8).reshape(-1, 3)
            wide = np.zeros((len(parts), 4), np.uint8)
            wide[:, 1:] = parts
            values = wide.view("<i4").ravel() / np.float32(2**31)
        else:
            values = np.frombuffer(data, ENCODINGS[self.encoding][0])
            if self.encoding == "u8":
                values = (values.astype(np.float32) - 128) / 128
            elif self.encoding != "f32le":
                values = values / np.float32(2 ** (8 * values.itemsize - 1))
        values = values.astype(np.float32)
        bad = ~(np.abs(values) <= LOUDEST)  # NaN, too
        if bad.any():
            self.repaired += int(bad.sum())
            values = np.where(bad, np.float32(0), values)
        return np.ascontiguousarray(values.reshape(-1, self.channels).T)
