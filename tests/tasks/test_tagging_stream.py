"""Live tagging equals the whole recording, to the byte for any packets, also in another process."""

from typing import Any

import numpy as np
import pytest
import torch

from seqssm.backbone import BackboneConfig
from seqssm.data.features import FeatureConfig, fbank
from seqssm.errors import UserError
from seqssm.streaming import Stream
from seqssm.tasks.tagging import AudioTagging
from seqssm.tasks.tagging_stream import LiveTagger, StreamingTagger, Tagger, WindowTagger, make_tagger

RATE = 8000
FEATURES = FeatureConfig(sample_rate=RATE, n_mels=16, mean=-6.0, std=4.0)
POOLINGS = ["mean", "mean_max", "attention", "last"]


def make_task(pooling: str = "mean", bidirectional: str = "none", pattern: str = "m", **changes) -> AudioTagging:
    torch.manual_seed(0)
    mixers = {"m": {"class_path": "Mamba"}, "s": {"class_path": "Mamba2", "init_args": {"headdim": 16, "d_state": 8}}}
    config = BackboneConfig(d_model=16, n_layers=2, bidirectional=bidirectional, mixers=mixers, pattern=pattern)
    task = AudioTagging(["a", "b", "c"], True, FEATURES, config, stem_channels=[4, 6, 6], pooling=pooling, **changes)
    if pooling == "attention":
        torch.nn.init.normal_(task.pooling.attention.weight)
    return task.eval()


def sound(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    envelope = np.repeat(rng.random(int(seconds * 20) + 1), rate // 20)[: int(seconds * rate)]
    return (0.3 * rng.standard_normal(int(seconds * rate)) * envelope).astype(np.float32)


def hear(tagger: Tagger, samples: np.ndarray, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Frame logits (t, c) and the last clip logits (c,) of packets of these sizes, over and over."""
    outputs, at, i = [], 0, 0
    while at < len(samples):
        size = sizes[i % len(sizes)]
        outputs += tagger.accept(samples[at : at + size])
        at, i = at + size, i + 1
    outputs += tagger.flush()
    return torch.cat([scores.frames[0] for scores in outputs]), outputs[-1].clip[0]


@pytest.mark.parametrize(
    ("pooling", "pattern", "stem"),
    [(pooling, pattern, {}) for pooling in POOLINGS for pattern in ("m", "ms")]
    + [("mean", "m", {"stem_downsampling": "max"})]
    + [
        (pooling, "m", {"stem_downsampling": how, "stem_depth": 2}) for pooling in POOLINGS for how in ("stride", "max")
    ],
)
def test_live_equals_whole_and_packets_do_not_matter(pooling: str, pattern: str, stem: dict[str, Any]) -> None:
    task, samples = make_task(pooling, pattern=pattern, **stem), sound(4.37)
    features = fbank(torch.from_numpy(samples), FEATURES)
    lengths = torch.tensor([len(features)])
    with torch.no_grad():
        frames, clip = task.frame_logits(features[None], lengths)[0], task(features[None], lengths)[0]
    first = hear(LiveTagger(task, RATE), samples, [len(samples)])
    torch.testing.assert_close(first[0], frames, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[1], clip, rtol=1e-4, atol=1e-5)
    rng = np.random.default_rng(0)
    for sizes in ([1, 7, 400], list(rng.integers(1, 3000, 40)), [8000]):
        other = hear(LiveTagger(task, RATE), samples, sizes)
        assert torch.equal(other[0], first[0])
        assert torch.equal(other[1], first[1])


def test_resampled_stereo_packets_do_not_matter() -> None:
    task = make_task()
    stereo = np.stack([sound(2.0, 1, 44100), sound(2.0, 2, 44100)])
    whole = hear_stereo(task, stereo, [stereo.shape[1]])
    assert len(whole) == pytest.approx(50, abs=1)
    assert torch.equal(hear_stereo(task, stereo, [441, 1000, 3]), whole)


def hear_stereo(task: AudioTagging, samples: np.ndarray, sizes: list[int]) -> torch.Tensor:
    tagger, outputs, at, i = LiveTagger(task, 44100), [], 0, 0
    while at < samples.shape[1]:
        size = sizes[i % len(sizes)]
        outputs += tagger.accept(samples[:, at : at + size])
        at, i = at + size, i + 1
    outputs += tagger.flush()
    return torch.cat([scores.frames[0] for scores in outputs])


@pytest.mark.parametrize("cut", [1, 4001, 9000])
def test_a_snapshot_goes_on_elsewhere(cut: int) -> None:
    task, samples = make_task("attention"), sound(2.0)
    whole = hear(LiveTagger(task, RATE), samples, [500])
    before = LiveTagger(task, RATE)
    outputs = before.accept(samples[:cut])
    blob = before.snapshot()
    after = LiveTagger(make_task("attention"), RATE)
    after.restore(blob)
    outputs += after.accept(samples[cut:])
    outputs += after.flush()
    assert torch.equal(torch.cat([scores.frames[0] for scores in outputs]), whole[0])
    assert torch.equal(outputs[-1].clip[0], whole[1])


def test_a_snapshot_of_something_else_is_refused() -> None:
    blob = LiveTagger(make_task(), RATE).snapshot()
    with pytest.raises(UserError, match="is of another model"):
        LiveTagger(make_task("attention"), RATE).restore(blob)
    with pytest.raises(UserError, match="8000 Hz, not 16000"):
        LiveTagger(make_task(), 16000).restore(blob)
    with pytest.raises(UserError, match="not a snapshot"):
        LiveTagger(make_task(), RATE).restore(b"nothing of the kind")


def test_state_does_not_grow_over_ten_hours() -> None:
    """Ten hours by the clock of the tokens: the state has the same size, and the mean is still exact."""
    task = make_task("mean")
    tokens = round(10 * 3600 / task.token_s)
    state = task.pooling.init_state(1)
    logits = torch.full((1, 100_000, 3), 0.1)
    for _ in range(tokens // 100_000):
        clip, state = task.pooling.advance(logits, logits, state)
    torch.testing.assert_close(clip, torch.full((1, 3), 0.1), rtol=1e-6, atol=0)
    tagger, sizes = LiveTagger(task, RATE), []
    for i in range(60):
        tagger.accept(sound(1.0, i))
        sizes.append(len(tagger.snapshot()))
    assert max(sizes[20:]) <= max(sizes[:20]) + 64  # digits of the position


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_file_within_a_window_gets_the_scores_of_the_whole_clip(pooling: str) -> None:
    task, samples = make_task(pooling, "tied"), sound(3.3)
    features = fbank(torch.from_numpy(samples), FEATURES)
    lengths = torch.tensor([len(features)])
    with torch.no_grad():
        frames, clip = task.frame_logits(features[None], lengths)[0], task(features[None], lengths)[0]
    heard = hear(make_tagger(task, RATE), samples, [1000])
    torch.testing.assert_close(heard[0], frames, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heard[1], clip, rtol=1e-4, atol=1e-5)


def test_windows_join_to_every_token_once() -> None:
    task, samples = make_task("mean", "tied"), sound(9.0)
    features = fbank(torch.from_numpy(samples), FEATURES)
    with torch.no_grad():
        frames = task.frame_logits(features[None], torch.tensor([len(features)]))[0]
    tagger = WindowTagger(task, RATE, window_s=4.0, context_s=1.0)
    heard = hear(tagger, samples, [700])
    assert heard[0].shape == frames.shape
    # A second of context is about all that a fresh model remembers.
    torch.testing.assert_close(heard[0], frames, rtol=0, atol=0.02)
    torch.testing.assert_close(heard[1], heard[0].mean(0), rtol=1e-4, atol=1e-5)


def test_a_two_way_model_cannot_run_live() -> None:
    with pytest.raises(UserError, match="reads both ways and cannot run live"):
        StreamingTagger(make_task("mean", "tied"))


@torch.no_grad()
def test_streams_side_by_side() -> None:
    task = make_task("attention")
    features = torch.randn(2, 50, 16)
    stream = Stream(StreamingTagger(task).eval(), chunk=8, batch=2)
    outputs = stream.advance(features[:, :21]) + stream.advance(features[:, 21:]) + stream.flush()
    lengths = torch.tensor([50, 50])
    torch.testing.assert_close(outputs[-1].clip, task(features, lengths), rtol=1e-4, atol=1e-5)
    frames = torch.cat([scores.frames for scores in outputs], dim=1)
    torch.testing.assert_close(frames, task.frame_logits(features, lengths), rtol=1e-4, atol=1e-5)
