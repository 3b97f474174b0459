"""The server through real WebSockets: the same text as `transcribe`, and no client harms another."""

import asyncio
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from seqssm.backbone import BackboneConfig
from seqssm.cli import main
from seqssm.data.features import FeatureConfig, fbank
from seqssm.serving.client import CROWDED, Client, Limits, Outbox
from seqssm.serving.engine import Recogniser, TagEngine, TagListener
from seqssm.serving.protocol import Message, Refusal, event_message, result_message
from seqssm.serving.server import Server, Service
from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.asr_stream import SlotTable, Transcriber
from seqssm.tasks.base import CHECKPOINT_KEY
from seqssm.tasks.decoding.ctc import GreedyCTC
from seqssm.tasks.tagging import AudioTagging
from seqssm.tasks.transcripts import EndpointRules, Result

RATE = 8000
FEATURES = FeatureConfig(sample_rate=RATE, n_mels=16, mean=-6.0, std=4.0)
RULES = EndpointRules(silence_s=0.6, after_text_s=0.3, longest_s=2.0)
SLOTS = 3
SLACK = Limits(sessions=SLOTS, speed=0, ahead_s=60)


def sound(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """16-bit samples (n,)."""
    rng = np.random.default_rng(seed)
    envelope = np.repeat(rng.random(int(seconds * 8) + 1), rate // 8)[: int(seconds * rate)]
    return (8000 * rng.standard_normal(int(seconds * rate)) * envelope).astype("<i2")


@pytest.fixture(scope="module")
def task() -> StreamingASR:
    """An untrained recogniser whose output varies: many tokens, blanks and repeats."""
    torch.manual_seed(0)
    config = BackboneConfig(d_model=16, n_layers=2)
    tokenizer = {"kind": "characters", "characters": " abcd"}
    task = StreamingASR(tokenizer, features=FEATURES, backbone=config, stem_channels=4).eval()
    features = fbank(torch.from_numpy(sound(3.0, 99) / np.float32(32768)), FEATURES)[None]
    with torch.no_grad():
        encoded = task.encode(features, torch.tensor([features.shape[1]])).encoded
        task.head.weight.mul_(3 / encoded.std(1).mean())
        task.head.bias.copy_(-task.head.weight @ encoded.mean((0, 1)))
    return task


@pytest.fixture(scope="module")
def tagging() -> AudioTagging:
    torch.manual_seed(0)
    config = BackboneConfig(d_model=16, n_layers=2)
    task = AudioTagging(["a", "b", "c"], True, FEATURES, config, stem_channels=[4, 6, 6]).eval()
    features = fbank(torch.from_numpy(sound(3.0, 15) / np.float32(32768)), FEATURES)[None]
    with torch.no_grad():
        logits = task.frame_logits(features, torch.tensor([features.shape[1]]))[0]
    # An untrained model that nevertheless hears something now and then.
    task.thresholds = task.probabilities(logits).quantile(0.7, 0).tolist()
    return task


def make_service(task: StreamingASR, limits: Limits = SLACK, tagging: AudioTagging | None = None) -> Service:
    recogniser = Recogniser(task, limits.sessions, 160, GreedyCTC, RULES)
    tagger = None if tagging is None else TagEngine(tagging, 0.48)
    return Service(recogniser, tagger, limits, frozenset({"http://localhost:8000"}))


@contextmanager
def running(service: Service) -> Iterator[tuple[str, Server]]:
    """The WebSocket's address and the server, which serves in a thread meanwhile."""
    server = Server(service)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}/stream", server
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def url(task: StreamingASR) -> Iterator[str]:
    with running(make_service(task)) as (url, _):
        yield url


def health(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url.replace("ws://", "http://").replace("/stream", "/health")) as answer:
        return json.load(answer)


def say_hello(client: ClientConnection, **hello: Any) -> Message:
    client.send(json.dumps({"sample_rate": RATE, **hello}))
    return json.loads(client.recv(30))


def rest(client: ClientConnection) -> tuple[list[Message], int]:
    """All messages up to the end, and the code that the server closes with."""
    messages = []
    try:
        while True:
            messages.append(json.loads(client.recv(30)))
    except ConnectionClosed as closed:
        return messages, closed.rcvd.code if closed.rcvd else 1006


def said(url: str, samples: np.ndarray, sizes: list[int], **hello: Any) -> list[Message]:
    """What the server says of packets of these sizes, over and over, behind `ready`."""
    with connect(url, compression=None) as client:
        assert say_hello(client, **hello)["type"] == "ready"
        at = i = 0
        while at < len(samples):
            client.send(samples[at : at + sizes[i % len(sizes)]].tobytes())
            at, i = at + sizes[i % len(sizes)], i + 1
        client.send("Done")
        messages, code = rest(client)
        assert code == 1000
        return messages


def expected(task: StreamingASR, samples: np.ndarray, rate: int = RATE, slots: int = SLOTS) -> list[Message]:
    """What a table of as many slots makes of samples (n,) or (channels, n), by itself."""
    table = SlotTable(task, slots, 160)
    session = table.open(rate, rules=RULES)
    session.accept(samples)
    session.finish()
    while table.step():
        pass
    results = session.take()
    assert results
    return [json.loads(json.dumps(result_message(result))) for result in results]


def texts(messages: list[Message]) -> list[str]:
    return [message["text"] for message in messages if message["type"] == "final"]


# ---- text ------------------------------------------------------------------------------------------------------------


def test_the_text_is_that_of_transcribe_for_any_packets(task: StreamingASR, url: str) -> None:
    samples = sound(2.5)
    transcriber = Transcriber(task, RATE, rules=RULES)
    whole: list[Result] = transcriber.accept(samples) + transcriber.finish()
    finals = [result.text for result in whole if result.is_final]
    assert len("".join(finals)) > 10
    first = said(url, samples, [len(samples)])
    assert texts(first) == finals
    assert first == [*expected(task, samples), {"type": "done", "heard_s": 2.5}]
    rng = np.random.default_rng(0)
    for sizes in ([800], [7, 4000], [int(size) for size in rng.integers(1, 3000, 40)]):
        assert said(url, samples, sizes) == first
    assert said(url, samples[:1500], [1]) == said(url, samples[:1500], [1500])
    floats = (samples / np.float32(32768)).astype("<f4")
    assert said(url, floats, [999], encoding="f32le") == first


def test_another_rate_with_two_channels(task: StreamingASR, url: str) -> None:
    stereo = np.stack([sound(1.0, 1, 44100), sound(1.0, 2, 44100)], 1)
    done = {"type": "done", "heard_s": 1.0}
    want = [*expected(task, stereo.T, 44100), done]
    for sizes in ([44100], [441, 1000, 3]):
        assert said(url, stereo, sizes, sample_rate=44100, channels=2) == want


def test_a_server_of_one_session_says_what_transcribe_says_to_the_byte(task: StreamingASR) -> None:
    samples = sound(2.0, 5)
    transcriber = Transcriber(task, RATE, rules=RULES, lookahead_ms=80)
    results = transcriber.accept(samples) + transcriber.finish()
    want = [json.loads(json.dumps(result_message(result))) for result in results]
    with running(make_service(task, Limits(sessions=1, speed=0))) as (url, _):
        assert said(url, samples, [333], lookahead_ms=80)[:-1] == want


def test_ready_says_what_was_agreed_and_progress_how_far(url: str) -> None:
    with connect(url) as client:
        ready = say_hello(client, lookahead_ms=160, progress=True)
        assert ready["lookahead_ms"] == 160
        assert ready["model_rate"] == RATE
        assert ready["tags"] is False
        client.send(sound(1.0).tobytes())
        client.send("Done")
        read = [message["read_s"] for message in rest(client)[0] if message["type"] == "progress"]
    assert read == sorted(read)
    assert read[0] == pytest.approx(0.16)
    assert read[-1] == 1.0


def test_no_sound_is_no_text(url: str) -> None:
    assert said(url, sound(0.0), [1]) == [{"type": "done", "heard_s": 0.0}]


# ---- clients that do not behave --------------------------------------------------------------------------------------

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


# ---- the server ------------------------------------------------------------------------------------------------------


def test_pages_from_elsewhere_may_not_connect(url: str) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:9000"):
        with pytest.raises(InvalidStatus) as refused:
            connect(url, origin=origin)  # type: ignore[arg-type]
        assert refused.value.response.status_code == 403
        assert f"--origin {origin}".encode() in refused.value.response.body
    with connect(url, origin="http://localhost:8000") as client:  # type: ignore[arg-type]
        assert say_hello(client)["type"] == "ready"


def test_a_server_that_stops_tells_what_it_has_heard(task: StreamingASR) -> None:
    samples = sound(1.5, 14)
    with running(make_service(task)) as (url, server):
        client = connect(url)
        say_hello(client, progress=True)
        client.send(samples.tobytes())
        while json.loads(client.recv(30)).get("read_s", 0) < 1.3:
            pass
        server.should_exit = True
        messages, code = rest(client)
    assert code == 1012
    assert messages[-1]["code"] == "stopping"
    assert texts(messages) == texts(expected(task, samples))[-1:]


def test_a_failed_model_ends_the_server_and_all_are_told(task: StreamingASR) -> None:
    service = make_service(task)

    def fail() -> Any:
        raise RuntimeError("out of memory")

    with running(service) as (url, _):
        with connect(url) as client:
            say_hello(client)
            assert health(url)["status"] == "ok"
            service.recogniser.table.step = fail  # type: ignore[method-assign]
            client.send(sound(0.5).tobytes())
            messages, code = rest(client)
        assert (messages[-1]["code"], code) == ("internal", 1011)
        until(lambda: service.failed)


def test_the_page_needs_nothing_from_elsewhere(url: str) -> None:
    with urllib.request.urlopen(url.replace("ws://", "http://").replace("/stream", "/")) as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "<title>seqssm live</title>" in page
    assert "//" not in "".join(part.split('"', 1)[0] for part in page.split('src="')[1:] + page.split('href="')[1:])
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert health(url)["lookaheads_ms"] == [0, 80, 160, 320]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url.replace("ws://", "http://").replace("/stream", "/docs"))


def test_tags_come_beside_the_text_for_any_packets(task: StreamingASR, tagging: AudioTagging) -> None:
    samples = sound(3.0, 15)
    listener = TagListener(tagging, RATE, 0.48)
    whole = [listener.hear(samples / np.float32(32768)), listener.hear(None)]
    events = [json.loads(json.dumps(event_message(change))) for one in whole if one for change in one.changes]
    assert events
    with running(make_service(task, tagging=tagging)) as (url, _):
        first = None
        for sizes in ([len(samples)], [500, 7, 9000]):
            messages = said(url, samples, sizes)
            assert [one for one in messages if one["type"] in ("partial", "final")] == expected(task, samples)
            assert [one for one in messages if one["type"] == "event"] == events
            tags = [one for one in messages if one["type"] == "tags"]
            assert [one["end_s"] for one in tags][:3] == pytest.approx([0.48, 0.96, 1.44])
            first = first or tags
            assert tags == first
            best = [tag["probability"] for tag in tags[0]["tags"]]
            assert best == sorted(best, reverse=True)
        assert not [one for one in said(url, samples, [8000], tags=False) if one["type"] in ("tags", "event")]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(task: StreamingASR, tagging: AudioTagging, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    for name, one in (("asr", task), ("tagging", tagging)):
        torch.save({CHECKPOINT_KEY: one.describe(), "state_dict": one.state_dict()}, folder / f"{name}.ckpt")
    return folder


def test_the_command_serves_clients_and_reports_how_long_they_wait(
    checkpoints: Path, capsys: pytest.CaptureFixture
) -> None:
    args = ["--checkpoint", str(checkpoints / "asr.ckpt"), "--tag-checkpoint", str(checkpoints / "tagging.ckpt")]
    assert main(["serve", *args, "--port", "0", "--load-test", "2", "--load-s", "2"]) == 0
    out, err = capsys.readouterr()
    assert "listening on http://127.0.0.1:" in err
    assert out.startswith("2 live sessions of 2 s at 16,000 Hz")
    waits = [float(part) for part in out.splitlines()[2].replace(",", "").split()[-4:]]
    assert 0 < waits[0] <= waits[1] <= waits[2] <= waits[3]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl, to make a certificate")
def test_the_command_serves_over_tls(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    key, certificate = checkpoints / "key.pem", checkpoints / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # the clients trust it
    args = ["--checkpoint", str(checkpoints / "asr.ckpt"), "--tls-cert", str(certificate), "--tls-key", str(key)]
    assert main(["serve", *args, "--port", "0", "--load-test", "1", "--load-s", "1"]) == 0
    out, err = capsys.readouterr()
    assert "listening on https://127.0.0.1:" in err
    assert out.startswith("1 live sessions of 1 s")


COMMANDS = {
    "nothing": ([], "--checkpoint is missing"),
    "another task": (["--checkpoint", "{folder}/tagging.ckpt"], "needs a StreamingASR checkpoint"),
    "sessions": (["--checkpoint", "{folder}/asr.ckpt", "--sessions", "0"], "sessions is 0"),
    "speed": (["--checkpoint", "{folder}/asr.ckpt", "--speed", "0.5"], "live sound comes at 1"),
    "port": (["--checkpoint", "{folder}/asr.ckpt", "--port", "{port}"], "Address already in use"),
    "no port": (["--checkpoint", "{folder}/asr.ckpt", "--port", "70000"], "between 0 and 65535"),
    "half of TLS": (["--checkpoint", "{folder}/asr.ckpt", "--tls-cert", "{folder}/asr.ckpt"], "give both"),
    "no TLS": (
        ["--checkpoint", "{folder}/asr.ckpt", "--tls-cert", "{folder}/asr.ckpt", "--tls-key", "{folder}/asr.ckpt"],
        "give a matching pair",
    ),
    "url": (["--url", "ws://localhost:1/stream"], "--url is for --load-test"),
}


@pytest.mark.parametrize(("args", "message"), COMMANDS.values(), ids=COMMANDS)
def test_bad_arguments_are_one_line_and_exit_code_2(
    checkpoints: Path, args: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        default = [] if "--port" in args else ["--port", "0"]
        assert main(["serve", *[arg.format(folder=checkpoints, port=port) for arg in args], *default]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("seqssm: error: ")
    assert message in last


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert main(["serve", "--checkpoint", "x"]) == 2
    assert "pip install 'seqssm[serve]'" in capsys.readouterr().err


def test_refusals_have_a_close_code() -> None:
    from seqssm.serving.protocol import CLOSE_CODES

    for code in CLOSE_CODES:
        assert Refusal(code, "why").to_message() == {"type": "error", "code": code, "message": "why"}
