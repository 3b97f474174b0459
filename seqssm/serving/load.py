"""Live clients of a server, and how long they wait: `seqssm serve --load-test` runs this in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from seqssm.data.audio.reading import AUDIO_SUFFIXES, blocks, open_audio
from seqssm.errors import UserError


def main(args: list[str] | None = None) -> int:
    """Run the clients and print what they measured as JSON."""
    parser = argparse.ArgumentParser(prog="python -m seqssm.serving.load", description=__doc__)
    parser.add_argument("url", help="ws://HOST:PORT/stream")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--packet-ms", type=float, default=100.0)
    parser.add_argument("--lookahead-ms", type=int)
    parser.add_argument("--sound", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(args)
    try:
        sound, rate = read_sound(a.sound) if a.sound else (noise(a.seed), 16_000)
        figures = measure(a.url, sound, rate, a.sessions, a.seconds, a.packet_ms, a.lookahead_ms, a.seed)
    except (UserError, OSError, WebSocketException) as error:
        print(f"seqssm: error: {a.url}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures))
    return 0


def read_sound(path: Path) -> tuple[NDArray[np.int16], int]:
    """Samples (n,) of a recording, or of all recordings of the first one's rate in a folder, and their rate in Hz."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise UserError(f"{path} holds no audio files; give a recording or a folder of some")
    with open_audio(files[0]) as first:
        rate = first.samplerate
    parts: list[NDArray[np.float32]] = []
    for file in files:
        with open_audio(file) as audio:
            if audio.samplerate != rate:
                continue
        parts += [samples.mean(0) for samples, _ in blocks(file, 10.0)]
        if sum(map(len, parts)) > 600 * rate:
            break
    return as_int16(np.concatenate(parts)), rate


def noise(seed: int, seconds: float = 60.0, rate: int = 16_000) -> NDArray[np.int16]:
    """Noise (n,) that comes and goes as syllables do."""
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.random(round(seconds * 8)), rate // 8)
    return as_int16(0.2 * level * rng.standard_normal(len(level)))


def as_int16(samples: NDArray[np.floating]) -> NDArray[np.int16]:
    return (np.clip(samples, -1, 1) * 32767).astype("<i2")


def measure(
    url: str,
    sound: NDArray[np.int16],
    rate: int,
    sessions: int,
    seconds: float,
    packet_ms: float = 100.0,
    lookahead_ms: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Have clients speak at real time, and measure when what they said is decoded.

    Args:
        url: of the server's WebSocket.
        sound: (n,), which the clients send over and over, from random places on.
        rate: Hz.
        sessions: clients.
        seconds: that each of them speaks.
        packet_ms: of their packets; they do not send at the same time.
        lookahead_ms: of all sessions; that of the model's validation by default.
        seed: of the places and times.

    Returns:
        Plain data. A position's latency is from the end of its sound at the client, plus the lookahead, until the
        client has what was decoded there: the wait for the packet and for the chunk to be full, the WebSocket and the
        computing. ``final_ms`` is from `Done` to the end of the session; ``waited`` counts the clients that the server
        had to keep waiting, because it was behind.

    Raises:
        UserError: a client was refused or cut off.
        OSError: there is no such server.
    """
    rng = np.random.default_rng(seed)
    places = rng.integers(len(sound), size=sessions)
    delays = rng.uniform(0, 1, size=sessions)

    async def run() -> list[Spoken]:
        clients = (
            _speak(url, np.roll(sound, -int(place)), rate, seconds, packet_ms, lookahead_ms, float(delay))
            for place, delay in zip(places, delays, strict=True)
        )
        return await asyncio.gather(*clients)

    told = asyncio.run(run())
    values = 1000 * np.concatenate([one.latencies_s for one in told])
    if not len(values):
        raise UserError(f"{seconds:g} s are too short: nothing was decoded before the end; speak longer")
    finals = 1000 * np.array([one.final_s for one in told])
    return {
        "sessions": sessions,
        "seconds": seconds,
        "packet_ms": packet_ms,
        "rate": rate,
        "positions": len(values),
        "latency_ms": _percentiles(values),
        "final_ms": _percentiles(finals),
        "results": sum(one.results for one in told),
        "waited": sum(one.waited for one in told),
    }


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(values.max())}


@dataclass
class Spoken:
    """What one client measured: latencies of its positions, and the wait for the end, in seconds."""

    latencies_s: list[float] = field(default_factory=list)
    final_s: float = 0.0
    results: int = 0
    waited: bool = False


async def _speak(
    url: str,
    sound: NDArray[np.int16],
    rate: int,
    seconds: float,
    packet_ms: float,
    lookahead_ms: int | None,
    delay_s: float,
) -> Spoken:
    size = max(1, round(packet_ms / 1000 * rate))
    count = math.ceil(seconds * rate / size)
    spoken = Spoken()
    async with connect(url, compression=None, max_queue=None, ping_interval=None) as socket:
        hello: dict[str, Any] = {"sample_rate": rate, "progress": True, "tags": False}
        await socket.send(json.dumps(hello if lookahead_ms is None else {**hello, "lookahead_ms": lookahead_ms}))
        settings = _checked(json.loads(await socket.recv()))
        await asyncio.sleep(delay_s)
        begin = time.perf_counter()
        listening = asyncio.create_task(
            _listen(socket, spoken, begin, settings["token_ms"] / 1000, count * size / rate)
        )
        try:
            for i in range(count):
                # A packet leaves when its last sample has been spoken, whenever this loop gets to it.
                await asyncio.sleep(begin + (i + 1) * size / rate - time.perf_counter())
                if listening.done():
                    break
                await socket.send(np.take(sound, range(i * size, (i + 1) * size), mode="wrap").tobytes())
            else:
                await socket.send("Done")
            said = time.perf_counter()
            await listening
            spoken.final_s = time.perf_counter() - said
        finally:
            listening.cancel()
    return spoken


async def _listen(socket: ClientConnection, spoken: Spoken, begin: float, token_s: float, seconds: float) -> None:
    """Until the last message. Positions behind the last sample come with the flush, and do not count as live."""
    read = 0
    while True:
        message = _checked(json.loads(await socket.recv()))
        now = time.perf_counter() - begin
        kind = message["type"]
        spoken.results += kind in ("partial", "final")
        spoken.waited |= kind == "warning"
        if kind == "progress" and message["read_s"] < seconds:
            upto = round(message["read_s"] / token_s)
            spoken.latencies_s.extend(now - (i + 1) * token_s for i in range(read, upto))
            read = upto
        if kind == "done":
            return


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    if message["type"] == "error":
        raise UserError(f"the server refused a client ({message['code']}): {message['message']}")
    return message


if __name__ == "__main__":
    sys.exit(main())
