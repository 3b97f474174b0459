"""Servers with tiny models for tests, and clients for them."""

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from seqssm.backbone import BackboneConfig
from seqssm.data.features import FeatureConfig, fbank
from seqssm.serving.client import Limits
from seqssm.serving.engine import Recogniser, TagEngine
from seqssm.serving.protocol import Message, result_message
from seqssm.serving.server import Server, Service
from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.asr_stream import SlotTable
from seqssm.tasks.decoding.ctc import GreedyCTC
from seqssm.tasks.tagging import AudioTagging
from seqssm.tasks.transcripts import EndpointRules

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


def make_task() -> StreamingASR:
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


def make_tagging() -> AudioTagging:
    """An untrained tagger that nevertheless hears something now and then."""
    torch.manual_seed(0)
    config = BackboneConfig(d_model=16, n_layers=2)
    task = AudioTagging(["a", "b", "c"], True, FEATURES, config, stem_channels=[4, 6, 6]).eval()
    features = fbank(torch.from_numpy(sound(3.0, 15) / np.float32(32768)), FEATURES)[None]
    with torch.no_grad():
        logits = task.frame_logits(features, torch.tensor([features.shape[1]]))[0]
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
