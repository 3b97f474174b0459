"""Packets on their way to a model."""

import random

import numpy as np
import pytest
import torch

from seqssm.errors import UserError
from seqssm.tasks.packets import SampleQueue, mono


def test_a_queue_gives_back_what_came_in_whatever_the_sizes() -> None:
    rng, queue, sent, taken = random.Random(0), SampleQueue(), [], []
    for number in range(400):
        packet = np.full(rng.choice([0, 1, 7, 300, 9000]), number, np.float32)
        queue.append(packet)
        packet[:] = -1  # the queue has its own
        sent += [number] * len(packet)
        count = rng.choice([0, 5, 4000, 10**6])
        some = queue.samples[:count].tolist()
        queue.drop(count)
        taken += some
        assert len(queue) == len(sent) - len(taken)
    taken += queue.samples.tolist()
    assert taken == sent


def test_a_queue_does_not_grow_with_the_stream() -> None:
    queue = SampleQueue()
    for _ in range(2000):
        queue.append(np.zeros(640, np.float32))
        if len(queue) > 2800:
            queue.drop(2560)
    assert len(queue._memory) < 16_000


def test_packets_become_mono_float32() -> None:
    stereo = np.array([[0.5, 1.0], [-0.5, 0.0]])
    for packet in (stereo, torch.from_numpy(stereo), stereo.astype(np.float32)):
        assert mono(packet, 0).tolist() == [0.0, 0.5]
        assert mono(packet, 0).dtype == np.float32
    assert mono(np.array([16384, -32768], np.int16), 0).tolist() == [0.5, -1.0]
    loud = np.full(3, 1e30, np.float32)  # whose squares are infinite
    assert mono(loud, 0).tolist() == loud.tolist()
    assert mono(np.zeros(0, np.float32), 0).shape == (0,)


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (np.array([0, np.nan], np.float32), "sample 11 is NaN or infinite; the packet was not taken"),
        (np.array([[0, 0, 0], [0, 0, -np.inf]]), "sample 12 is NaN or infinite"),
        (np.array([1, 2]), "got int64"),
        (np.zeros((1, 1, 1), np.float32), "got \\(1, 1, 1\\)"),
    ],
)
def test_bad_packets_are_named(packet: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mono(packet, 10)
