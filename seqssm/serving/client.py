"""One client of the server, from its hello to its last result."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import WebSocket, WebSocketDisconnect

from seqssm.errors import UserError
from seqssm.serving.engine import Engine, Feed, Heard
from seqssm.serving.protocol import (
    CLOSE_CODES,
    END,
    Hello,
    Message,
    Refusal,
    event_message,
    result_message,
)

if TYPE_CHECKING:
    from seqssm.serving.server import Service

log = logging.getLogger("seqssm.serving")
TAGS_TOLD = 5
PASSING = ("partial", "tags", "progress")
"""Messages that the next of their kind makes worthless."""
FAILED = Refusal("internal", "the server has failed; its log says why")
CROWDED, FULL = 64, 4096
"""Messages that wait for a client before the passing ones among them are dropped, and before it is given up."""


@dataclass(frozen=True)
class Limits:
    """What one client may take.

    Args:
        sessions: at once.
        frame_bytes: of a frame.
        session_s: seconds of a session, of sound and of time.
        hello_s: seconds until hello.
        idle_s: seconds without sound, or without reading what the server says.
        ahead_s: seconds of sound that a client may be ahead of real time, and of the model.
        speed: beyond these, sound is read so many times as fast as it is spoken; 0 for as fast as it can be.
    """

    sessions: int = 20
    frame_bytes: int = 256 * 1024
    session_s: float = 4 * 3600.0
    hello_s: float = 10.0
    idle_s: float = 30.0
    ahead_s: float = 5.0
    speed: float = 4.0

    def __post_init__(self) -> None:
        for name in ("sessions", "frame_bytes", "session_s", "hello_s", "idle_s", "ahead_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"the limit {name} is {getattr(self, name)}: it must be positive")
        if self.speed < 0 or 0 < self.speed < 1:
            raise UserError(
                f"a speed of {self.speed:g}: live sound comes at 1, so take at least that, or 0 for no limit"
            )


class Outbox:
    """Messages on their way to a client that may read slowly. Only passing ones are dropped, and only where it does."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._some = asyncio.Event()

    @property
    def full(self) -> bool:
        return len(self._messages) >= FULL

    def put(self, message: Message) -> None:
        if len(self._messages) >= CROWDED and message["type"] in PASSING:
            self._messages = [one for one in self._messages if one["type"] != message["type"]]
        self._messages.append(message)
        self._some.set()

    async def get(self) -> Message:
        while not self._messages:
            self._some.clear()
            await self._some.wait()
        return self._messages.pop(0)


class Client:
    """A WebSocket that was accepted.

    Args:
        socket: the WebSocket.
        service: who serves it.
    """

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self._socket, self._service, self._limits = socket, service, service.limits
        self._outbox = Outbox()
        self._refusal: Refusal | None = None
        self._gone = False
        self._listening: asyncio.Task[None] | None = None
        self._feeds: list[tuple[Engine, Feed]] = []
        self._talking = 0  # feeds that have more to say
        self._finished = asyncio.Event()
        self._begin = time.monotonic()
        self._sent = 0  # samples
        self._warned: set[str] = set()
        self.hello: Hello | None = None

    @property
    def name(self) -> str:
        """For the log."""
        peer = self._socket.client
        return f"{peer.host}:{peer.port}" if peer else "client"

    def stop(self, refusal: Refusal) -> None:
        """End the session, if its client has not done so; what was heard so far is told first."""
        if self._listening is None or not self._listening.done():
            self._end(refusal)

    def _end(self, refusal: Refusal) -> None:
        """Only the first reason counts."""
        if self._refusal is None and not self._gone:
            self._refusal = refusal
        if self._listening is not None:
            self._listening.cancel()

    async def serve(self) -> None:
        """From hello to goodbye. Whatever the client does, its feeds are closed at the end."""
        sending = asyncio.create_task(self._send_all())
        try:
            await self._converse()
            if not self._gone:
                await self._say_goodbye(sending)
        finally:
            sending.cancel()
            for engine, feed in self._feeds:
                await engine.close(feed)
            why = self._refusal.code if self._refusal else "vanished" if self._gone else "done"
            log.info("%s: %s after %.1f s of sound", self.name, why, self._heard_s)

    @property
    def _heard_s(self) -> float:
        return self._sent / self.hello.sample_rate if self.hello is not None else 0.0

    # ---- what the client says ----------------------------------------------------------------------------------------

    async def _converse(self) -> None:
        self._listening = asyncio.create_task(self._listen())
        try:
            if self._refusal is not None:  # stopped before it began
                self._listening.cancel()
            await self._listening
        except Refusal as refusal:
            self._end(refusal)
        except WebSocketDisconnect:
            self._gone = True
        except asyncio.CancelledError:
            self._listening.cancel()
            if self._refusal is None and not self._gone:  # it is we who are cancelled
                raise

    async def _listen(self) -> None:
        """Everything up to the client's end of the sound."""
        try:
            self.hello = Hello.read(await self._receive(self._limits.hello_s))
        except TimeoutError:
            raise Refusal("hello", f"no hello came within {self._limits.hello_s:g} s") from None
        await self._join(self.hello)
        begin = last = time.monotonic()
        most = round(self._limits.session_s * self.hello.sample_rate)
        while True:
            now = time.monotonic()
            try:
                frame = await self._receive(min(last + self._limits.idle_s, begin + self._limits.session_s) - now)
            except TimeoutError:
                if time.monotonic() >= begin + self._limits.session_s:
                    raise self._over_limit() from None
                raise Refusal(
                    "idle", f"no sound came for {self._limits.idle_s:g} s; send silence, too, or say {END}"
                ) from None
            if isinstance(frame, str):
                if frame.strip() == END:
                    return
                raise Refusal("text_frame", f"a text frame came where sound is due: binary frames of PCM, then {END}")
            samples = self.hello.samples(frame, self._sent)
            if not len(samples):
                continue
            taken = samples[: most - self._sent]
            self._sent += len(taken)
            for _, feed in self._feeds:
                feed.send(taken)
            if len(taken) < len(samples):
                raise self._over_limit()
            await self._keep_pace(begin, self.hello.sample_rate)
            last = time.monotonic()

    def _over_limit(self) -> Refusal:
        return Refusal(
            "session_limit", f"the session has reached its limit of {self._limits.session_s:g} s; begin a new one"
        )

    async def _receive(self, seconds: float) -> str | bytes:
        """The next frame; raises TimeoutError when it does not come in time."""
        async with asyncio.timeout(max(seconds, 0)):
            message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        frame: str | bytes = message["text"] if message.get("bytes") is None else message["bytes"]
        if len(frame) > self._limits.frame_bytes:
            raise Refusal(
                "frame_too_large", f"a frame of {len(frame):,} bytes: send {self._limits.frame_bytes:,} at most"
            )
        return frame

    async def _join(self, hello: Hello) -> None:
        service, rate = self._service, hello.sample_rate
        if service.failed:
            raise FAILED
        try:
            feed = await service.recogniser.open_session(rate, hello.lookahead_ms, self._tell_text)
        except UserError as error:
            raise Refusal("busy" if service.recogniser.full else "hello", str(error)) from error
        lookahead_ms = feed.listener.lookahead_ms
        self._feeds.append((service.recogniser, feed))
        self._talking += 1
        if service.tagger is not None and hello.tags:
            self._feeds.append((service.tagger, await service.tagger.open_session(rate, self._tell_tags)))
            self._talking += 1
        log.info("%s: began, %d Hz, lookahead %d ms", self.name, rate, lookahead_ms)
        settings = {**hello.model_dump(), "lookahead_ms": lookahead_ms, "tags": len(self._feeds) > 1}
        self._outbox.put({"type": "ready", **settings, **service.about()})

    async def _keep_pace(self, begin: float, rate: int) -> None:
        """Read no more, so that the client can send no more, while it is too far ahead of real time or of the model."""
        limits, heard_s = self._limits, self._sent / rate
        if limits.speed:
            passed_s = time.monotonic() - begin
            wait_s = (heard_s - limits.ahead_s) / limits.speed - passed_s
            if wait_s > 0:
                self._warn(
                    "too_fast",
                    f"sound came {heard_s / max(passed_s, 1e-3):.1f} times as fast as it is spoken; it is read "
                    f"{limits.speed:g} times as fast, and waits meanwhile: nothing is lost. If it is live, its rate is "
                    f"not the declared {rate} Hz",
                )
                await asyncio.sleep(wait_s)
        while (behind_s := max(feed.backlog_s for _, feed in self._feeds)) > limits.ahead_s:
            self._warn("behind", f"the server is {behind_s:.1f} s behind; sound waits meanwhile: nothing is lost")
            await asyncio.sleep(0.05)

    def _warn(self, code: str, message: str) -> None:
        """Each once in a session."""
        if code not in self._warned:
            self._warned.add(code)
            self._outbox.put({"type": "warning", "code": code, "message": message})

    # ---- what the client is told -------------------------------------------------------------------------------------

    def _tell_text(self, heard: Heard | None) -> None:
        if heard is not None:
            for result in heard.results:
                self._outbox.put(result_message(result))
            if self.hello is not None and self.hello.progress:
                self._outbox.put({"type": "progress", "read_s": heard.read_s})
        self._after(heard)

    def _tell_tags(self, heard: Heard | None) -> None:
        if heard is not None:
            for change in heard.changes:
                self._outbox.put(event_message(change))
            if heard.tags:
                best = sorted(heard.tags, key=lambda tag: -tag[1])[:TAGS_TOLD]
                tags = [{"label": label, "probability": p, "present": present} for label, p, present in best]
                self._outbox.put({"type": "tags", "end_s": heard.read_s, "tags": tags})
        self._after(heard)

    def _after(self, heard: Heard | None) -> None:
        if heard is None:
            self._end(FAILED)
            self._finished.set()
            return
        if self._outbox.full:
            self._give_up()
        self._talking -= heard.done
        if not self._talking:
            self._finished.set()

    def _give_up(self) -> None:
        """The client does not read: it cannot be told."""
        self._end(Refusal("not_reading", f"what was said has not been read for {self._limits.idle_s:g} s"))
        self._gone = True
        self._finished.set()

    async def _send_all(self) -> None:
        """Send what is in the outbox, until cancelled or the client reads no more."""
        while True:
            message = await self._outbox.get()
            text = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
            try:
                async with asyncio.timeout(self._limits.idle_s):
                    await self._socket.send_text(text)
            except TimeoutError:
                self._give_up()
                return
            except (WebSocketDisconnect, RuntimeError):  # Starlette raises either where the socket is closed
                self._gone = True
                if self._listening is not None:
                    self._listening.cancel()
                self._finished.set()
                return
            if message["type"] in ("done", "error"):
                return

    async def _say_goodbye(self, sending: asyncio.Task[None]) -> None:
        if self._feeds and not self._service.failed:
            for _, feed in self._feeds:
                feed.finish()
            await self._finished.wait()
        if self._gone:
            return
        refusal = self._refusal
        self._outbox.put({"type": "done", "heard_s": self._heard_s} if refusal is None else refusal.to_message())
        await sending
        if not self._gone:
            code = 1000 if refusal is None else CLOSE_CODES[refusal.code]
            with suppress(WebSocketDisconnect, RuntimeError):  # gone meanwhile
                await self._socket.close(code, "" if refusal is None else refusal.code)
