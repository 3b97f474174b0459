"""From a manifest to a transcript by the command line: fit, transcribe, evaluate; and what it says of bad input."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speller import RATE, checkpoint, spell

from seqssm.cli import main


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


def test_texts_that_the_model_cannot_spell_are_scored_where_the_config_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "own.tsv").write_text(f"path\ttext\tsplit\n{trained}/5.wav\tab it's\ttest\n")
    config = tmp_path / "own.yaml"
    config.write_text(f"data:\n  init_args: {{path: {tmp_path}/own.tsv, root: /, text: {{unknown: error}}}}\n")
    command = ["evaluate", "--checkpoint", checkpoint(trained), "--device", "cpu", "--data", str(config)]
    assert main(command) == 2
    assert "set text.unknown to remove" in capsys.readouterr().err
    config.write_text(config.read_text().replace("error", "remove"))
    assert main(command) == 0
    assert "| WER" in capsys.readouterr().out


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
