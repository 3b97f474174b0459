"""What clients and server say to each other on the WebSocket.

A client says hello in a JSON text frame, sends its sound in binary frames of PCM, and ends with the text frame `Done`:

    -> {"sample_rate": 48000, "lookahead_ms": 320, "encoding": "s16le", "channels": 1, "tags": true, "progress": false}
    <- {"type": "ready", ...}                            the settings of the session, and the server's limits
    -> binary frames
    <- {"type": "partial", "segment": 0, "text": ..., "stable": ..., "start_s": ..., "end_s": ...}
    <- {"type": "final", ..., "words": [{"text": ..., "start_s": ..., "end_s": ..., "confidence": ...}, ...]}
    <- {"type": "tags", "end_s": ..., "tags": [{"label": ..., "probability": ..., "present": ...}, ...]}
    <- {"type": "event", "change": "begin" | "end", "label": ..., "time_s": ..., "heard_s": ...}
    <- {"type": "progress", "read_s": ...}               where hello asks for it: how far the model has read
    <- {"type": "warning", "code": ..., "message": ...}  the session goes on
    -> Done
    <- the last results, then {"type": "done", "heard_s": ...}, and the server closes with 1000

Only `sample_rate` must be in hello. Whatever ends a session early is told by {"type": "error", "code": ..., "message":
...}, behind the final results of all that was heard before it; the server closes with the code's number below.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seqssm.data.audio.reading import LOUDEST
from seqssm.tasks.events import Change
from seqssm.tasks.transcripts import Result

END = "Done"
LOWEST_RATE, HIGHEST_RATE = 4_000, 192_000
"""Hz: below, a small packet would become a huge one in the model; above, nobody records speech."""
PCM: dict[str, np.dtype[Any]] = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
# https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1 and the registry of WebSocket close codes
CLOSE_CODES = {
    "hello": 1008,  # not what it must be, too late, or not there
    "busy": 1013,
    "text_frame": 1003,
    "odd_bytes": 1007,
    "bad_samples": 1007,
    "frame_too_large": 1009,
    "idle": 1008,
    "session_limit": 1008,
    "not_reading": 1008,
    "stopping": 1012,
    "internal": 1011,
}

Message = dict[str, Any]


class Refusal(Exception):
    """Why a session ends early; its client is told.

    Args:
        code: a key of ``CLOSE_CODES``.
        message: a line that names what is wrong and what to do about it.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    def to_message(self) -> Message:
        """For the client."""
        return {"type": "error", "code": self.code, "message": self.message}


class Hello(BaseModel):
    """A client's first frame: what it will send, and what it wants.

    Attributes:
        sample_rate: Hz, of the sound; there is no default, since a wrong one gives wrong text in silence.
        encoding: 16-bit integers or 32-bit floats between -1 and 1, little-endian.
        channels: interleaved; they are averaged.
        lookahead_ms: one that the model was trained with; by default that of its validation.
        tags: whether to tell tags, where the server has a tagger.
        progress: whether to tell how far the model has read.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sample_rate: int = Field(ge=LOWEST_RATE, le=HIGHEST_RATE)
    encoding: Literal["s16le", "f32le"] = "s16le"
    channels: int = Field(default=1, ge=1, le=8)
    lookahead_ms: int | None = None
    tags: bool = True
    progress: bool = False

    @classmethod
    def read(cls, frame: str | bytes) -> Hello:
        """Raises Refusal unless the frame is a hello."""
        example = '{"sample_rate": 16000}'
        if isinstance(frame, bytes):
            raise Refusal(
                "hello", f"sound came before hello: declare its rate first, in a text frame such as {example}"
            )
        try:
            return cls.model_validate_json(frame)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            what = f"{where}: {first['msg']}" if where else first["msg"]
            raise Refusal("hello", f"hello is not valid ({what}); say for example {example}") from error

    def samples(self, frame: bytes, before: int) -> NDArray[np.float32]:
        """(n,) samples of a binary frame, between -1 and 1; ``before`` came earlier.

        Raises:
            Refusal: it ends inside a sample, or holds NaN or what is no sound.
        """
        dtype = PCM[self.encoding]
        width = dtype.itemsize * self.channels
        if len(frame) % width:
            raise Refusal(
                "odd_bytes",
                f"a frame of {len(frame):,} bytes holds no whole number of samples: {self.encoding} with "
                f"{self.channels} channel{'s' * (self.channels > 1)} takes {width} bytes each",
            )
        values = np.frombuffer(frame, dtype).reshape(-1, self.channels)
        if dtype.kind == "i":
            return values.mean(1, dtype=np.float32) / np.float32(32768)
        sound = np.abs(values) <= LOUDEST  # false for NaN, too
        if not sound.all():
            at = int(np.argmin(sound.all(1)))
            value = values[at][~sound[at]][0]
            raise Refusal("bad_samples", f"sample {before + at} is {value:g}; f32le is sound between -1 and 1")
        return values.mean(1, dtype=np.float32)


def result_message(result: Result) -> Message:
    """A partial or final result; words come with the final ones."""
    message = {
        "type": "final" if result.is_final else "partial",
        "segment": result.segment,
        "text": result.text,
        "start_s": result.start_s,
        "end_s": result.end_s,
    }
    if result.is_final:
        return {**message, "words": [word.to_dict() for word in result.words]}
    return {**message, "stable": result.stable}


def event_message(change: Change) -> Message:
    """The beginning or the end of a tagged event."""
    message = {
        "type": "event",
        "change": change.kind,
        "label": change.label,
        "time_s": change.time_s,
        "heard_s": change.heard_s,
    }
    if change.event is not None:
        message |= {"start_s": change.event.start_s, "peak": change.event.peak, "mean": change.event.mean}
    return message
