"""From a manifest to a transcript by the command line: fit, transcribe, evaluate; and what it says of bad input."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seqssm.cli import main

RATE = 8000
TONES = {"a": 500.0, "b": 1000.0, "c": 1700.0, "d": 2600.0}


def spell(text: str, seed: int) -> np.ndarray:
    """A tone of 120 ms for each letter, quiet noise for spaces and at both ends."""
    rng = np.random.default_rng(seed)
    parts = []
    for letter in f" {text} ":
        tone = np.sin(2 * np.pi * TONES.get(letter, 0.0) * np.arange(int(0.12 * RATE)) / RATE)
        parts.append(0.3 * tone + 0.003 * rng.standard_normal(len(tone)))
    return np.concatenate(parts).astype(np.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with spelled words and what `seqssm fit` learnt of them."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    with open(folder / "manifest.tsv", "w") as manifest:
        manifest.write("path\ttext\tsplit\tspeaker\n")
        for i in range(60):
            text = " ".join("".join(rng.choice(list("abcd"), rng.integers(1, 3))) for _ in range(2))
            soundfile.write(folder / f"{i}.wav", spell(text, i), RATE)
            split = ("train", "train", "train", "train", "val", "test")[i % 6]
            manifest.write(f"{i}.wav\t{text.upper()}!\t{split}\ts{i % 5}\n")
    (folder / "config.yaml").write_text(
        f"""
trainer:
  max_epochs: 24
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  check_val_every_n_epoch: 12
  gradient_clip_val: 5.0
  logger: {{class_path: CSVLogger, init_args: {{save_dir: {folder}/runs, name: null}}}}
  callbacks:
    - {{class_path: ModelCheckpoint, init_args: {{monitor: val_wer, mode: min, filename: best}}}}
model:
  class_path: StreamingASR
  init_args:
    backbone: {{d_model: 32, n_layers: 2}}
    stem_channels: 8
    dropout: 0.0
    optimizer: {{lr: 1.0e-2}}
data:
  class_path: SpeechDataModule
  init_args:
    path: {folder}/manifest.tsv
    features: {{sample_rate: {RATE}, n_mels: 16}}
    batch_seconds: 10
    max_utterance_s: 5
    augment: null
    cache_dir: {folder}/cache
"""
    )
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    return folder


def checkpoint(trained: Path) -> str:
    return str(next((trained / "runs").rglob("best*.ckpt")))


def test_a_recording_is_written_down(trained: Path, capsys: pytest.CaptureFixture) -> None:
    soundfile.write(trained / "new.wav", spell("ab d", 100), RATE)
    soundfile.write(trained / "other.flac", spell("c", 101), RATE)
    args = ["--checkpoint", checkpoint(trained)]
    assert main(["transcribe", str(trained / "new.wav"), *args]) == 0
    assert capsys.readouterr().out == "ab d\n"
    both = [str(trained / "new.wav"), str(trained / "other.flac")]
    assert main(["transcribe", *both, *args, "--lookahead-ms", "160", "--chunk-ms", "400"]) == 0
    assert capsys.readouterr().out == f"{both[0]}\tab d\n{both[1]}\tc\n"
    folder = trained / "transcripts"
    for form in ("json", "srt"):
        assert main(["transcribe", *both, *args, "--folder", str(folder), "--format", form, "--decode", "beam"]) == 0
    row = json.loads((folder / "new.jsonl").read_text())
    assert [word["text"] for word in row["words"]] == ["ab", "d"]
    assert row["words"][0]["start_s"] < row["words"][1]["start_s"] <= row["end_s"] <= 0.72
    assert (folder / "other.srt").read_text().startswith("1\n00:00:00,")


def test_a_live_stream_is_written_down(
    trained: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = np.concatenate([spell("ab", 1), np.zeros(RATE * 2, np.float32), spell("d", 2)])
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:  # less than a pipe holds
        pipe.write((samples * 32767).astype("<i2").tobytes())
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["transcribe", "-", "--rate", str(RATE), "--partials", "--checkpoint", checkpoint(trained)]) == 0
    out, err = capsys.readouterr()
    assert out == "ab\nd\n"  # the pause ends a segment
    partials = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [one["text"] for one in partials if one["segment"] == 0][-1] == "ab"


def test_evaluate_reports_errors_delays_and_a_long_stream(trained: Path) -> None:
    folder = trained / "report"
    options = ["--packets", "1000,80000", "--stream-minutes", "0.3", "--stretch-minutes", "0.1", "-o", str(folder)]
    options += ["--sessions", "3", "--sessions-s", "2"]
    assert main(["evaluate", "--checkpoint", checkpoint(trained), "--device", "cpu", *options]) == 0
    report = json.loads((folder / "metrics.json").read_text())
    assert report["utterances"] == 10
    assert report["wer"]["reference"] == 20
    assert report["wer"]["low"] <= report["wer"]["rate"] <= report["wer"]["high"]
    assert report["wer"]["rate"] <= 0.3
    assert report["packets_with_other_bytes"] == {"1000": 0, "80000": 0}
    assert report["emission_delay_ms"]["p50"] >= 0
    assert len(report["long_stream"]["wer_by_stretch"]) == 4
    assert report["long_stream"]["wer"]["rate"] <= 0.5
    assert report["live_sessions"]["sessions"] == 3
    latency = report["live_sessions"]["latency_ms"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
    assert "| WER |" in (folder / "evaluation.md").read_text()
    rows = (folder / "transcripts.tsv").read_text().splitlines()
    assert rows[0] == "name\treference\thypothesis"
    assert len(rows) == 11
    # Other data, in the checkpoint's written form.
    config = ["--data", str(trained / "manifest.tsv"), "--split", "val"]
    assert main(["evaluate", "--checkpoint", checkpoint(trained), *config]) == 0


BAD = {
    "no file": (["transcribe", "missing.wav"], "missing.wav does not exist"),
    "no audio": (["transcribe", "{config}"], "not readable as audio"),
    "lookahead": (["transcribe", "{wav}", "--lookahead-ms", "100"], "trained with 0, 80, 160, 320 ms"),
    "no transducer": (["transcribe", "{wav}", "--decode", "rnnt"], "has no transducer"),
    "hotwords": (["transcribe", "{wav}", "--hotwords", "{config}"], "help a beam search"),
    "unspeakable": (["transcribe", "{wav}", "--hotwords", "{config}", "--decode", "beam"], "does not know"),
    "subtitles": (["transcribe", "{wav}", "{wav}", "--format", "srt"], "need --folder"),
    "live and file": (["transcribe", "-", "{wav}"], "give it alone"),
    "packets": (["evaluate", "--packets", "0"], "must be positive"),
    "gap": (["evaluate", "--gap-s", "2,1"], "least and the greatest gap"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    trained: Path, args: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    args = [a.format(config=trained / "config.yaml", wav=trained / "0.wav") for a in args]
    assert main([*args, "--checkpoint", checkpoint(trained)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("seqssm: error: ")
    assert message in lines[-1]


def test_raw_sound_needs_a_rate(trained: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(bytes(1000))
    with os.fdopen(reader) as stdin:
        assert isinstance(stdin, io.TextIOBase)
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["transcribe", "-", "--checkpoint", checkpoint(trained)]) == 2
    assert "--rate" in capsys.readouterr().err
