"""How many live sessions a machine carries: clients in virtual time, computing in real time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seqssm.tasks.asr_stream import SlotTable


def simulate_sessions(
    table: SlotTable,
    recordings: Sequence[NDArray[np.float32]],
    input_rate: int,
    *,
    seconds: float,
    packet_ms: float,
    lookahead_ms: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fill every slot with a client that speaks at real time, and measure when each position is decoded.

    One thread serves all clients. The clock is virtual: it goes on by what accepting and stepping take here, and jumps
    to the next packet where there is nothing to do; so a machine that is too slow falls ever further behind, as it
    would.

    Args:
        table: without sessions, in which everything that is compiled on first use has run.
        recordings: (n,) at ``input_rate``, which the clients send over and over, from random places on.
        input_rate: Hz.
        seconds: that each client speaks.
        packet_ms: of a client's packets.
        lookahead_ms: of all sessions; that of validation by default.
        seed: of the places and times.

    Returns:
        Plain data. A position's latency is from the end of its sound, plus the lookahead, until it is decoded: the wait
        for the packet and for the chunk to be full, and the computing.
    """
    rng = np.random.default_rng(seed)
    size = max(1, round(packet_ms / 1000 * input_rate))
    sound = np.concatenate(recordings)
    length = len(sound)
    sound = np.concatenate([sound, np.resize(sound, size)])
    sessions = [table.open(input_rate, lookahead_ms) for _ in range(table.slots)]
    places = rng.integers(length, size=table.slots)
    token_s = table.task.token_s
    # People do not begin together: neither their packets nor their chunks are full at the same time.
    begins = rng.uniform(0, max(packet_ms / 1000, table.chunk * token_s), size=table.slots)
    rounds = -(-round(seconds * input_rate) // size)
    arrivals = begins[:, None] + np.arange(1, rounds + 1) * size / input_rate
    order = np.argsort(arrivals, axis=None)
    packets = zip((order // rounds).tolist(), (order % rounds).tolist(), arrivals.ravel()[order].tolist(), strict=True)
    coming = next(packets, None)
    if table.task.device.type == "cuda":
        torch.cuda.synchronize(table.task.device)  # all that opening has queued
    latencies: list[NDArray[np.float64]] = []
    now, busy_s, steps = 0.0, 0.0, 0
    while True:
        begin = time.perf_counter()
        while coming is not None and coming[2] <= now:
            i, number, _ = coming
            first = (places[i] + number * size) % length
            sessions[i].accept(sound[first : first + size])
            coming = next(packets, None)
        advanced = table.step()
        took = time.perf_counter() - begin
        now, busy_s, steps = now + took, busy_s + took, steps + bool(advanced)
        for session in advanced:
            session.take()
            read = np.arange(session.position - table.chunk, session.position)  # that the lookahead has reached
            latencies.append(now - begins[session.slot] - (read + 1) * token_s)
        if not advanced:
            if coming is None:
                break
            now = max(now, coming[2])
    for session in sessions:
        table.close(session)
    values = 1000 * np.concatenate(latencies)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {
        "sessions": table.slots,
        "seconds": seconds,
        "packet_ms": packet_ms,
        "chunk_ms": 1000 * table.chunk * token_s,
        "latency_ms": {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(values.max())},
        "busy": busy_s / max(now, 1e-9),
        "step_ms": 1000 * busy_s / max(steps, 1),
    }
