"""Live transcription equals the whole recording's, to the byte for any packets, beside others, in another process."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqssm.backbone import BackboneConfig
from seqssm.data.features import FeatureConfig, fbank
from seqssm.errors import UserError
from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.asr_decoding import DecodingConfig, decoders
from seqssm.tasks.asr_encoder import TableStep
from seqssm.tasks.asr_stream import SlotTable, Transcriber
from seqssm.tasks.base import CHECKPOINT_KEY
from seqssm.tasks.transcripts import EndpointRules, Result

RATE = 8000
FEATURES = FeatureConfig(sample_rate=RATE, n_mels=16, mean=-6.0, std=4.0)
MIXERS = {
    "m": {"class_path": "Mamba"},
    "s": {"class_path": "Mamba2", "init_args": {"headdim": 16, "d_state": 8}},
    "a": {"class_path": "Attention", "init_args": {"heads": 2, "window": 8}},
}


def make_task(pattern: str = "m", **arguments: Any) -> StreamingASR:
    torch.manual_seed(0)
    config = BackboneConfig(d_model=16, n_layers=3, mixers=MIXERS, pattern=pattern)
    tokenizer = {"kind": "characters", "characters": " abcd"}
    task = StreamingASR(tokenizer, features=FEATURES, backbone=config, stem_channels=4, **arguments)
    task.eval()
    # An untrained model whose output varies: many tokens, blanks and repeats.
    features = fbank(torch.from_numpy(sound(3.0, 99)), FEATURES)[None]
    with torch.no_grad():
        encoded = task.encode(features, torch.tensor([features.shape[1]])).encoded
        task.head.weight.mul_(3 / encoded.std(1).mean())
        task.head.bias.copy_(-task.head.weight @ encoded.mean((0, 1)))
    return task


def sound(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    envelope = np.repeat(rng.random(int(seconds * 8) + 1), rate // 8)[: int(seconds * rate)]
    return (0.3 * rng.standard_normal(int(seconds * rate)) * envelope).astype(np.float32)


def hear(transcriber: Transcriber, samples: np.ndarray, sizes: list[int]) -> list[Result]:
    """Results of packets of these sizes, over and over."""
    results, at, i = [], 0, 0
    while at < samples.shape[-1]:
        size = sizes[i % len(sizes)]
        results += transcriber.accept(samples[..., at : at + size])
        at, i = at + size, i + 1
    return results + transcriber.finish()


def said(results: list[Result]) -> str:
    return " ".join(result.text for result in results if result.is_final)


class Recorder:
    """A decoder that keeps what it reads."""

    reads = "log_probs"

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.partial: list[Any] = []

    def advance(self, rows: np.ndarray) -> None:
        self.rows.append(rows.copy())

    def take(self) -> list[Any]:
        return []

    def settle(self) -> None:
        pass


@pytest.mark.parametrize(("pattern", "chunk_ms"), [("m", 40), ("sma", 120), ("m", 160), ("sma", 400)])
def test_the_stream_equals_the_whole(pattern: str, chunk_ms: int) -> None:
    """Any grid, also one that the lookahead is no multiple of: every position is there once, the last ones too."""
    task = make_task(pattern)
    for seconds in (0.01, 0.93):
        samples = sound(seconds)
        features = fbank(torch.from_numpy(samples), FEATURES)[None]
        for choice, lookahead_ms in enumerate(task.lookahead_ms):
            with torch.no_grad():
                whole, _ = task(features, torch.tensor([features.shape[1]]), choice)
            recorder = Recorder()
            transcriber = Transcriber(task, RATE, lookahead_ms=lookahead_ms, chunk_ms=chunk_ms, decoder=recorder)  # type: ignore[arg-type]
            hear(transcriber, samples, [len(samples)])
            torch.testing.assert_close(torch.from_numpy(np.concatenate(recorder.rows)), whole[0], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_runs_the_step_as_one_graph_with_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("sma").cuda()
    sounds = [sound(seconds, seed) for seed, seconds in enumerate((0.8, 1.7, 0.4, 1.1))]

    def results() -> list[list[Result]]:
        table, heard = SlotTable(task, 3, 120), []
        for first, other in ((0, 1), (2, 3)):  # the second pair begins in slots that were used
            sessions = [table.open(RATE, ms) for ms in (320, 80)]
            for session, samples in zip(sessions, (sounds[first], sounds[other]), strict=True):
                session.accept(samples)
                session.finish()
            while table.step():
                pass
            heard += [session.take() for session in sessions]
            for session in sessions:
                table.close(session)
        return heard

    graph = results()
    assert any(graph)

    def eager(step: TableStep) -> tuple[torch.Tensor, torch.Tensor]:
        for to, source in zip(step._inputs, step._from, strict=True):
            to.copy_(source)
        return step._run()

    monkeypatch.setattr(TableStep, "__call__", eager)
    assert results() == graph


@pytest.mark.gpu
def test_a_table_does_not_need_the_one_before() -> None:
    """A graph must not count on memory that goes when another graph goes."""
    task, samples = make_task("sma").cuda(), sound(1.3)

    def heard_by(table: SlotTable) -> list[Result]:
        session = table.open(RATE, 320)
        session.accept(samples)
        session.finish()
        while table.step():
            pass
        results = session.take()
        table.close(session)
        return results

    first, second = SlotTable(task, 2, 120), SlotTable(task, 2, 120)
    expected = heard_by(first)
    assert expected
    assert heard_by(second) == expected
    del first
    gc.collect()
    torch.cuda.empty_cache()
    assert heard_by(second) == expected


@pytest.mark.parametrize("method", ["greedy", "beam", "rnnt"])
def test_packets_do_not_matter(method: str) -> None:
    task, samples = make_task(rnnt_weight=0.5), sound(1.23)
    make_decoder = decoders(task, DecodingConfig(method=method, size=3))  # type: ignore[arg-type]

    def results(sizes: list[int]) -> list[Result]:
        return hear(Transcriber(task, RATE, decoder=make_decoder()), samples, sizes)

    first = results([len(samples)])
    assert len(said(first)) > 5
    rng = np.random.default_rng(0)
    for sizes in ([1], [7, 400], list(rng.integers(1, 3000, 40)), [10 * RATE]):
        assert results(sizes) == first


def test_packets_of_another_rate_with_two_channels_do_not_matter() -> None:
    task = make_task()
    stereo = np.stack([sound(0.8, 1, 44100), sound(0.8, 2, 44100)])
    first = hear(Transcriber(task, 44100), stereo, [stereo.shape[1]])
    assert first
    assert hear(Transcriber(task, 44100), stereo, [441, 1000, 3]) == first
    as_integers = (stereo * 32767).astype(np.int16)
    again = hear(Transcriber(task, 44100), as_integers.astype(np.float32) / 32768, [999])
    assert hear(Transcriber(task, 44100), as_integers, [500]) == again


def test_stable_text_is_only_added_to_and_times_stay_inside() -> None:
    task, samples = make_task(), sound(5.0, 4)
    make_decoder = decoders(task, DecodingConfig(method="beam", size=4))
    rules = EndpointRules(after_text_s=0.2, silence_s=0.4, longest_s=2.0)
    transcriber = Transcriber(task, RATE, decoder=make_decoder(), rules=rules, chunk_ms=80)
    done, before, heard_s = "", "", 0.0
    for at in range(0, len(samples) + 500, 500):
        packet = samples[at : at + 500]
        heard_s = min((at + 500) / RATE, 5.0)
        for result in transcriber.accept(packet) if len(packet) else transcriber.finish():
            stable = (done + result.stable).replace(" ", "")
            assert stable.startswith(before)
            assert result.text.startswith(result.stable)
            assert all(0 <= word.start_s <= word.end_s <= heard_s for word in result.words)
            before = stable
            if result.is_final:
                done += result.text
    assert len(done) > 15


def test_endpoints_cut_the_text_and_not_the_state() -> None:
    task, samples = make_task(), sound(4.0, 5)
    texts = {}
    for after_text_s in (0.12, 0.3, 50.0):
        rules = EndpointRules(silence_s=60, after_text_s=after_text_s, longest_s=60)
        results = [r for r in hear(Transcriber(task, RATE, rules=rules, chunk_ms=80), samples, [800]) if r.is_final]
        assert [result.segment for result in results] == list(range(len(results)))
        texts[after_text_s] = [result.text for result in results]
    assert len(texts[0.12]) > len(texts[0.3]) >= len(texts[50.0]) == 1
    joined = {"".join(parts).replace(" ", "") for parts in texts.values()}
    assert len(joined) == 1


@pytest.mark.parametrize("cut", [1, 4001])
@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_a_snapshot_goes_on_elsewhere(cut: int, method: str) -> None:
    task, samples = make_task(), sound(2.0)
    make_decoder = decoders(task, DecodingConfig(method=method))  # type: ignore[arg-type]
    whole = hear(Transcriber(task, RATE, decoder=make_decoder()), samples, [500])
    before = Transcriber(task, RATE, decoder=make_decoder())
    results = before.accept(samples[:cut])
    after = Transcriber(make_task(), RATE, decoder=make_decoder())
    after.restore(before.snapshot())
    assert results + after.accept(samples[cut:]) + after.finish() == whole


def test_a_snapshot_goes_on_in_another_process(tmp_path: Path) -> None:
    task, samples = make_task(), sound(2.0, 7, 11025)
    whole = hear(Transcriber(task, 11025), samples, [500])
    before = Transcriber(task, 11025)
    results = before.accept(samples[:9000])
    torch.save({CHECKPOINT_KEY: task.describe(), "state_dict": task.state_dict()}, tmp_path / "x.ckpt")
    (tmp_path / "snapshot").write_bytes(before.snapshot())
    np.save(tmp_path / "rest.npy", samples[9000:])
    script = """
import json, sys
import numpy as np, torch
from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.asr_stream import Transcriber
from seqssm.tasks.base import load_task
folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
transcriber = Transcriber(load_task(folder + "/x.ckpt", StreamingASR), 11025)
transcriber.restore(open(folder + "/snapshot", "rb").read())
results = transcriber.accept(np.load(folder + "/rest.npy")) + transcriber.finish()
print(json.dumps([result.to_dict() for result in results]))
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rest = json.loads(done.stdout)
    assert json.loads(json.dumps([result.to_dict() for result in results])) + rest == json.loads(
        json.dumps([result.to_dict() for result in whole])
    )


def test_a_snapshot_of_something_else_is_refused() -> None:
    task = make_task()
    blob = Transcriber(task, RATE).snapshot()
    for other, message in (
        (Transcriber(make_task("ms"), RATE), "the snapshot's model is"),
        (Transcriber(task, 16000), "rate is 8000, not 16000"),
        (Transcriber(task, RATE, lookahead_ms=80), "lookahead is 320, not 80"),
        (Transcriber(task, RATE, chunk_ms=400), "chunk is 4, not 10"),
        (
            Transcriber(task, RATE, decoder=decoders(task, DecodingConfig("beam"))()),
            "decoder is GreedyCTC, not BeamCTC",
        ),
    ):
        with pytest.raises(UserError, match=message):
            other.restore(blob)
    with pytest.raises(UserError, match="not a snapshot"):
        Transcriber(task, RATE).restore(b"nothing of the kind")


def test_neighbours_do_not_matter_whoever_comes_and_goes() -> None:
    """Five sessions of different lengths, rates, lookaheads and packets in a table of three slots."""
    task = make_task()
    plans = [(sound(0.5 + 0.3 * i, i), 320 if i % 2 else 80, 300 + 211 * i) for i in range(5)]

    def alone(samples: np.ndarray, lookahead_ms: int, packet: int) -> list[Result]:
        table = SlotTable(task, 3)
        session = table.open(RATE, lookahead_ms)
        for at in range(0, len(samples), packet):
            session.accept(samples[at : at + packet])
        session.finish()
        while table.step():
            pass
        return session.take()

    table, waiting, open_sessions = SlotTable(task, 3), list(enumerate(plans)), {}
    found: dict[int, list[Result]] = {i: [] for i in range(5)}
    while waiting or open_sessions:
        while waiting and len(open_sessions) < 3:
            i, (_, lookahead_ms, _) = waiting.pop(0)
            open_sessions[i] = (table.open(RATE, lookahead_ms), 0)
        for i, (session, at) in list(open_sessions.items()):
            samples, _, packet = plans[i]
            if at < len(samples):
                session.accept(samples[at : at + packet])
                open_sessions[i] = (session, at + packet)
            else:
                session.finish()
        table.step()
        for i, (session, _) in list(open_sessions.items()):
            found[i] += session.take()
            if session.done:
                table.close(session)
                del open_sessions[i]
    for i, plan in enumerate(plans):
        assert found[i] == alone(*plan)
        assert said(found[i]) == said(hear(Transcriber(task, RATE, lookahead_ms=plan[1]), plan[0], [4000]))


def test_a_session_moves_to_another_slot_of_another_table() -> None:
    task, samples = make_task(), sound(2.0)
    table = SlotTable(task, 2)
    session = table.open(RATE)
    session.accept(samples)
    session.finish()
    while table.step():
        pass
    whole = session.take()
    first = SlotTable(task, 2)
    session = first.open(RATE)
    session.accept(samples[:7001])
    while first.step():
        pass
    results = session.take()
    second = SlotTable(task, 2)
    second.open(RATE)
    moved = second.open(RATE)
    second.restore(moved, first.snapshot(session))
    assert moved.slot == 1
    moved.accept(samples[7001:])
    moved.finish()
    while second.step():
        pass
    assert results + moved.take() == whole


def test_bad_packets_harm_nobody() -> None:
    task, samples = make_task(), sound(1.0)
    whole = hear(Transcriber(task, RATE), samples, [1000])
    transcriber = Transcriber(task, RATE)
    results = transcriber.accept(samples[:3000])
    spoilt = samples[3000:4000].copy()
    spoilt[17] = np.nan
    with pytest.raises(UserError, match="sample 3017 is NaN or infinite"):
        transcriber.accept(spoilt)
    with pytest.raises(UserError, match="got int64"):
        transcriber.accept(np.arange(5))
    with pytest.raises(UserError, match=r"\(n,\) or \(channels, n\)"):
        transcriber.accept(np.zeros((1, 1, 1), np.float32))
    assert results + transcriber.accept(samples[3000:]) + transcriber.finish() == whole
    with pytest.raises(ValueError, match="has ended"):
        transcriber.accept(samples)
    table = SlotTable(task, 1)
    table.open(RATE)
    with pytest.raises(UserError, match="all 1 sessions are in use"):
        table.open(RATE)
    with pytest.raises(UserError, match="was trained with 0, 80, 160, 320 ms"):
        SlotTable(task).open(RATE, 100)
    with pytest.raises(UserError, match="no transducer"):
        decoders(task, DecodingConfig("rnnt"))
    with pytest.raises(UserError, match="help a beam search"):
        DecodingConfig("greedy", hotwords=["a"])


def test_nothing_at_all_and_less_than_a_frame() -> None:
    task = make_task()
    assert Transcriber(task, RATE).finish() == []
    transcriber = Transcriber(task, RATE)
    transcriber.accept(np.zeros(0, np.float32))
    transcriber.accept(np.zeros(5, np.float32))
    results = transcriber.finish()
    assert transcriber.session.done
    assert all(word.end_s <= 5 / RATE for result in results for word in result.words)


def test_memory_does_not_grow() -> None:
    task = make_task()
    transcriber = Transcriber(task, RATE, chunk_ms=800)
    sizes = []
    for i in range(40):
        transcriber.accept(sound(1.0, i))
        sizes.append(len(transcriber.snapshot()))
    assert max(sizes[20:]) <= max(sizes[:20]) + 2000  # the open segment's tokens differ
    assert transcriber.table.state_bytes == sum(v.nbytes for v in transcriber.table.encoder.init_state(1).values())
