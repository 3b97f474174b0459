"""The server through real WebSockets: the same text as `transcribe`, and what it says of itself."""

import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
from served import (
    RATE,
    RULES,
    expected,
    health,
    make_service,
    rest,
    running,
    said,
    say_hello,
    sound,
    texts,
    until,
)
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from seqssm.serving.client import Limits
from seqssm.serving.engine import TagListener
from seqssm.serving.protocol import event_message, result_message
from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.asr_stream import Transcriber
from seqssm.tasks.tagging import AudioTagging
from seqssm.tasks.transcripts import Result

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
