"""Clients of the server that do not behave: each is told so, and no other is harmed."""

import asyncio
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest
from served import (
    RATE,
    SLOTS,
    expected,
    health,
    make_service,
    rest,
    running,
    said,
    say_hello,
    sound,
    until,
)
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from seqssm.serving.client import CROWDED, Client, Limits, Outbox
from seqssm.serving.protocol import Message
from seqssm.tasks.asr import StreamingASR

HELLO = '{"sample_rate": 8000}'
F32 = '{"sample_rate": 8000, "encoding": "f32le"}'
SECOND = sound(1.0, 3)
BAD: dict[str, tuple[list[str | bytes], str, int, str]] = {
    "no rate": (["{}"], "hello", 1008, "sample_rate: Field required"),
    "sound before hello": ([SECOND.tobytes()], "hello", 1008, "sound came before hello"),
    "no JSON": (["hello"], "hello", 1008, "Invalid JSON"),
    "rate in words": (['{"sample_rate": "8000"}'], "hello", 1008, "sample_rate: Input should be a valid integer"),
    "rate too low": (['{"sample_rate": 8}'], "hello", 1008, "greater than or equal to 4000"),
    "rate too high": (['{"sample_rate": 1000000}'], "hello", 1008, "less than or equal to 192000"),
    "unknown word": (['{"sample_rate": 8000, "lookahead": 80}'], "hello", 1008, "lookahead: Extra inputs"),
    "lookahead": (['{"sample_rate": 8000, "lookahead_ms": 100}'], "hello", 1008, "trained with 0, 80, 160, 320 ms"),
    "encoding": (['{"sample_rate": 8000, "encoding": "mp3"}'], "hello", 1008, "'s16le' or 'f32le'"),
    "odd bytes": ([HELLO, SECOND.tobytes(), b"\x01\x02\x03"], "odd_bytes", 1007, "3 bytes holds no whole number"),
    "text": ([HELLO, SECOND.tobytes(), "more"], "text_frame", 1003, "binary frames of PCM, then Done"),
    "NaN": ([F32, np.array([0, 0.1, np.nan], "<f4").tobytes()], "bad_samples", 1007, "sample 2 is nan"),
    "infinite": ([F32, np.array([np.inf], "<f4").tobytes()], "bad_samples", 1007, "sample 0 is inf"),
    "no sound": ([F32, np.array([0, 1e30], "<f4").tobytes()], "bad_samples", 1007, "sample 1 is 1e"),
    "frame": ([HELLO, bytes(300_000)], "frame_too_large", 1009, "send 262,144 at most"),
}


def test_bad_input_is_told_to_the_one_concerned_alone(task: StreamingASR, url: str) -> None:
    """A well-behaved client speaks before, between and after all the others, and hears nothing of them."""
    samples = sound(0.1 * len(BAD) + 1, 8)
    parts = np.array_split(samples, len(BAD))
    heard = [message for message in expected(task, SECOND) if message["type"] == "final"]
    with connect(url, compression=None) as good:
        say_hello(good)
        for part, (name, (frames, code, close_code, what)) in zip(parts, BAD.items(), strict=True):
            good.send(part.tobytes())
            with connect(url, compression=None) as bad:
                for frame in frames:
                    bad.send(frame)
                messages, closed = rest(bad)
            error = messages[-1]
            assert (error["type"], error["code"], closed) == ("error", code, close_code), name
            assert what in error["message"], name
            assert "\n" not in error["message"]
            # What was heard before it is not lost.
            finals = [message for message in messages if message["type"] == "final"]
            assert finals == (heard if SECOND.tobytes() in frames[1:] else []), name
        good.send("Done")
        assert rest(good)[0][:-1] == expected(task, samples)


def test_a_client_that_vanishes_mid_word_leaves_its_place_and_no_trace(task: StreamingASR, url: str) -> None:
    samples = sound(2.0, 9)
    with connect(url, compression=None) as good:
        say_hello(good)
        good.send(samples[:5000].tobytes())
        for i in range(2 * SLOTS):  # more than there are slots
            until(lambda: health(url)["sessions"] == 1)
            bad = connect(url, compression=None)
            say_hello(bad)
            bad.send(sound(0.37, i).tobytes())
            bad.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            bad.socket.close()  # a reset, without a goodbye
        good.send(samples[5000:].tobytes())
        good.send("Done")
        assert rest(good)[0][:-1] == expected(task, samples)
    until(lambda: health(url)["sessions"] == 0)


def test_clients_at_the_same_time_hear_their_own(task: StreamingASR, url: str) -> None:
    clips = [sound(1.0 + 0.3 * i, 20 + i) for i in range(SLOTS)]
    found: dict[int, list[Message]] = {}

    def speak(i: int) -> None:
        found[i] = said(url, clips[i], [300 + 211 * i])

    threads = [threading.Thread(target=speak, args=(i,)) for i in range(SLOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, clip in enumerate(clips):
        assert found[i][:-1] == expected(task, clip)


def test_one_client_too_many(url: str) -> None:
    clients = [connect(url) for _ in range(SLOTS)]
    assert all(say_hello(client)["type"] == "ready" for client in clients)
    with connect(url) as late:
        error = say_hello(late)
        assert error["code"] == "busy"
        assert "in use; try again later" in error["message"]
        assert rest(late) == ([], 1013)
    for client in clients:
        client.close()
    until(lambda: health(url)["sessions"] == 0)
    with connect(url) as late:
        assert say_hello(late)["type"] == "ready"


def drip(client: ClientConnection, samples: np.ndarray) -> None:
    """A sample now and then."""
    for sample in samples[:200]:
        client.send(sample.tobytes())
        time.sleep(0.1)


def test_limits_end_a_session_with_what_was_heard(task: StreamingASR) -> None:
    samples = sound(3.0, 11)
    limits = Limits(sessions=SLOTS, session_s=2.0, hello_s=0.3, idle_s=1.0, speed=0, ahead_s=60)
    with running(make_service(task, limits)) as (url, _):
        with connect(url) as client:  # more sound than is allowed
            say_hello(client)
            client.send(samples.tobytes())
            messages, code = rest(client)
            assert code == 1008
            assert messages[-1]["code"] == "session_limit"
            assert messages[:-1] == expected(task, samples[: 2 * RATE])
        with connect(url) as client:  # silence on the line, in spite of empty frames
            say_hello(client)
            client.send(samples[:8000].tobytes())
            for _ in range(4):
                time.sleep(0.2)
                client.send(b"")
            messages, code = rest(client)
            assert code == 1008
            assert messages[-1]["code"] == "idle"
            assert messages[:-1] == expected(task, samples[:8000])
        with connect(url) as client:  # drips
            say_hello(client)
            with pytest.raises(ConnectionClosed):
                drip(client, samples)
            assert rest(client)[0][-1]["code"] == "session_limit"
        with connect(url) as client:
            messages, code = rest(client)
            assert messages[-1]["message"] == "no hello came within 0.3 s"


def test_a_client_that_is_too_fast_is_slowed_down_and_told_so(task: StreamingASR) -> None:
    """Ten times real time and more: nothing is lost, for it neither, but it is not read before its time."""
    samples = sound(4.0, 12)
    with running(make_service(task, Limits(sessions=SLOTS, speed=4, ahead_s=1))) as (url, _):
        begin = time.monotonic()
        messages = said(url, samples, [800])
        assert time.monotonic() - begin >= 0.7
    # On a busy machine the server may also be behind, and say so.
    warnings = {message["code"]: message["message"] for message in messages if message["type"] == "warning"}
    assert "its rate is not the declared 8000 Hz" in warnings["too_fast"]
    assert [message for message in messages if message["type"] != "warning"][:-1] == expected(task, samples)


def test_a_model_that_is_slow_is_waited_for(task: StreamingASR) -> None:
    service = make_service(task, Limits(sessions=SLOTS, speed=0, ahead_s=0.4))
    step, backlogs = service.recogniser.table.step, []

    def slowly() -> Any:
        backlogs.extend(feed.backlog_s for feed in service.recogniser.feeds)
        time.sleep(0.02)
        return step()

    service.recogniser.table.step = slowly  # type: ignore[method-assign]
    samples = sound(4.0, 13)
    with running(service) as (url, _):
        messages = said(url, samples, [800])
    assert 0.2 < max(backlogs) <= 0.4 + 0.1 + 0.01  # that, and a packet
    (warning,) = (message for message in messages if message["type"] == "warning")
    assert warning["code"] == "behind"
    messages.remove(warning)
    assert messages[:-1] == expected(task, samples)


class Deaf:
    """A WebSocket whose client has said a lot and takes nothing."""

    client = None

    def __init__(self, frames: list[Message]) -> None:
        self.frames = frames

    async def receive(self) -> Message:
        await asyncio.sleep(0)
        return self.frames.pop(0) if self.frames else await asyncio.sleep(3600)

    async def send_text(self, text: str) -> None:
        await asyncio.sleep(3600)


def test_a_client_that_does_not_read_is_given_up(task: StreamingASR, caplog: pytest.LogCaptureFixture) -> None:
    service = make_service(task, Limits(sessions=1, idle_s=0.2))
    frames = [{"type": "websocket.receive", "text": HELLO}, {"type": "websocket.receive", "bytes": SECOND.tobytes()}]

    async def serve() -> None:
        engine = asyncio.create_task(service.recogniser.run())
        await asyncio.wait_for(Client(Deaf(frames), service).serve(), 30)  # type: ignore[arg-type]
        engine.cancel()

    with caplog.at_level("INFO", logger="seqssm.serving"):
        asyncio.run(serve())
    assert not service.recogniser.table.sessions
    assert "not_reading" in caplog.text


def test_a_slow_reader_loses_partial_results_alone() -> None:
    async def drain() -> list[Message]:
        outbox, told = Outbox(), []
        for i in range(CROWDED):
            outbox.put({"type": "final", "i": i})
            outbox.put({"type": "partial", "i": i})
        outbox.put({"type": "done"})
        while not told or told[-1]["type"] != "done":
            told.append(await outbox.get())
        return told

    told = asyncio.run(drain())
    assert [one["i"] for one in told if one["type"] == "final"] == list(range(CROWDED))
    assert told[-2] == {"type": "partial", "i": CROWDED - 1}
    assert len(told) < 2 * CROWDED
