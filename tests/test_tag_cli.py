"""From a folder of sounds to tags, events, a page and a live stream; and what is said of bad input."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from seqssm.cli import main
from seqssm.data.audio.batches import AudioBatch
from seqssm.tasks.tagging import AudioTagging

RATE = 8000
CLASSES = {"high": 3000.0, "low": 300.0, "quiet": 0.0}


def tone(hz: float, seconds: float, rng: np.random.Generator, rate: int = RATE) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hz * t * rng.uniform(0.95, 1.05)) + hush(seconds, rng, rate)).astype(np.float32)


def hush(seconds: float, rng: np.random.Generator, rate: int = RATE) -> np.ndarray:
    return (0.01 * rng.standard_normal(round(seconds * rate))).astype(np.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with class folders of tones and of noise, and what `seqssm fit` made of them."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    for name, hz in CLASSES.items():
        (folder / "sounds" / name).mkdir(parents=True)
        for i in range(14):
            soundfile.write(folder / "sounds" / name / f"{i}.wav", tone(hz, 0.6 + 0.02 * i, rng), RATE)
    arguments = {
        "data.path": f"{folder}/sounds",
        "data.features.sample_rate": RATE,
        "data.features.n_mels": 16,
        "data.batch_size": 4,
        "data.augment.mixup": 0.0,
        "data.cache_dir": f"{folder}/cache",
        "model.backbone.d_model": 16,
        "model.backbone.n_layers": 1,
        "model.stem_channels": "[4, 8, 8]",
        "model.optimizer.lr": 1e-2,
        "trainer.max_epochs": 20,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.logger.save_dir": f"{folder}/runs",
    }
    config = str(Path(__file__).parent.parent / "configs" / "tagging" / "folder.yaml")
    (folder / "fit.json").write_text(json.dumps(["fit", "-c", config, *(f"--{k}={v}" for k, v in arguments.items())]))
    assert main(json.loads((folder / "fit.json").read_text())) == 0
    return folder


def checkpoint(trained: Path) -> str:
    return str(next((trained / "runs").rglob("best*.ckpt")))


@pytest.fixture(scope="module")
def scene(trained: Path) -> Path:
    """Ten seconds at another rate, in stereo: a high tone from 2 to 4 s, a low one from 6.5 to 8 s, silence between."""
    rng = np.random.default_rng(1)
    rate = 22050
    sound = hush(10.0, rng, rate)
    for name, start, seconds in (("high", 2.0, 2.0), ("low", 6.5, 1.5)):
        at = round(start * rate)
        sound[at : at + round(seconds * rate)] = tone(CLASSES[name], seconds, rng, rate)
    path = trained / "scene.wav"
    soundfile.write(path, np.stack([sound, 0.8 * sound], 1), rate)
    return path


def test_tags_the_best_first(trained: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(2)
    for name, hz in CLASSES.items():
        soundfile.write(trained / f"new_{name}.flac", tone(hz, 1.0, rng), RATE)
    files = [str(trained / f"new_{name}.flac") for name in CLASSES]
    capsys.readouterr()
    assert main(["tag", *files, "--checkpoint", checkpoint(trained), "--top-k", "2"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["file", "label", "probability", "threshold"]
    assert [row[0] for row in rows[1:]] == [file for file in files for _ in range(2)]
    assert [row[1] for row in rows[1::2]] == list(CLASSES)
    assert all(float(best[2]) > float(second[2]) for best, second in zip(rows[1::2], rows[2::2], strict=True))
    table = trained / "tags.tsv"
    assert main(["tag", *files, "--checkpoint", checkpoint(trained), "--top-k", "2", "-o", str(table)]) == 0
    assert [line.split("\t") for line in table.read_text().splitlines()] == rows


def test_an_interrupted_fit_says_how_to_go_on(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fit = [*json.loads((trained / "fit.json").read_text()), f"--trainer.logger.save_dir={tmp_path}"]
    step, at = AudioTagging.training_step, {"epoch": 0}

    def training_step(self: AudioTagging, batch: AudioBatch, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == (at["epoch"], 2):
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AudioTagging, "training_step", training_step)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(fit) == 130
        assert "there is no checkpoint yet" in capsys.readouterr().err
        at["epoch"] = 3
        assert main(fit) == 130
        (last,) = tmp_path.rglob("last.ckpt")
        assert f"--ckpt_path {last}" in capsys.readouterr().err
        assert torch.load(last, weights_only=True)["epoch"] == 2
        at["epoch"] = -1
        assert main([*fit, "--trainer.max_epochs=4", f"--ckpt_path={last}"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning has it ignored while it shuts down


def find(events: list[dict], label: str, start: float, end: float) -> dict:
    return next(e for e in events if e["label"] == label and e["start_s"] < end and e["end_s"] > start)


def test_events_and_report_of_a_scene(trained: Path, scene: Path) -> None:
    folder = trained / "out"
    options = ["--events", "--report", "--folder", str(folder), "--threshold", "0.7"]
    assert main(["tag", str(scene), "--checkpoint", checkpoint(trained), *options]) == 0
    names = ["scene.events.csv", "scene.events.jsonl", "scene.events.txt", "scene.html", "scene.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    events = [json.loads(line) for line in (folder / "scene.events.jsonl").read_text().splitlines()]
    high, low = find(events, "high", 2, 4), find(events, "low", 6.5, 8)
    assert high["start_s"] == pytest.approx(2.0, abs=0.35)
    assert low["start_s"] == pytest.approx(6.5, abs=0.35)
    audacity = [line.split("\t") for line in (folder / "scene.events.txt").read_text().splitlines()]
    assert [(float(a), float(b), label) for a, b, label in audacity] == [
        (e["start_s"], e["end_s"], e["label"]) for e in events
    ]
    assert len((folder / "scene.events.csv").read_text().splitlines()) == len(events) + 1
    page = (folder / "scene.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "data:audio/wav;base64," in page
    assert page.count("<tr data-s=") == len(events)
    assert '="http' not in page  # needs nothing from elsewhere
    assert (folder / "scene.png").read_bytes().startswith(b"\x89PNG")


def test_live_prints_events_as_they_begin_and_end(trained: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WAV comes through a pipe; the high tone is told before the rest of the recording is there."""
    (sound_in, sound_out), (text_in, text_out) = os.pipe(), os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(sound_in, "rb"))
    monkeypatch.setattr(sys, "stdout", os.fdopen(text_out, "w"))
    args = ["tag", "-", "--live", "--jsonl", "--threshold", "0.7", "--chunk-ms", "200", "--device", "cpu"]
    codes: list[int] = []
    listener = threading.Thread(
        target=lambda: codes.append(main([*args, "--checkpoint", checkpoint(trained)])), daemon=True
    )
    data = scene.read_bytes()
    half = 44 + 4 * 22050 * 6  # six seconds of 16-bit stereo
    changes: list[dict] = []
    with open(sound_out, "wb", buffering=0) as sound, open(text_in) as text:
        reader = threading.Thread(target=lambda: [changes.append(json.loads(line)) for line in text], daemon=True)
        for thread in (listener, reader):
            thread.start()
        sound.write(data[:half])
        told = wait_for(lambda: [c for c in changes if (c["change"], c["label"]) == ("end", "high")])
        assert told[0]["start_s"] == pytest.approx(2.0, abs=0.35)
        assert told[0]["time_s"] == pytest.approx(4.0, abs=1.0)
        sound.write(data[half:])
        sound.close()
        wait_for(lambda: codes)
        sys.stdout.close()
        reader.join(timeout=10)
    assert codes == [0]
    assert any(c["label"] == "low" and c["time_s"] == pytest.approx(6.5, abs=0.35) for c in changes)


def wait_for(condition: Callable[[], list]) -> list:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_live_on_a_growing_file_equals_the_file(trained: Path, scene: Path, capsys: pytest.CaptureFixture) -> None:
    data, growing = scene.read_bytes(), trained / "growing.wav"
    growing.write_bytes(data[:60_000])

    def grow() -> None:
        for at in range(60_000, len(data), 200_000):
            time.sleep(0.05)
            with open(growing, "ab") as file:
                file.write(data[at : at + 200_000])

    args = ["--live", "--jsonl", "--checkpoint", checkpoint(trained), "--threshold", "0.7", "--idle-s", "0.6"]
    capsys.readouterr()
    writer = threading.Thread(target=grow)
    writer.start()
    assert main(["tag", str(growing), *args]) == 0
    writer.join()
    grown = capsys.readouterr()
    assert main(["tag", str(scene), *args]) == 0
    whole = capsys.readouterr()
    assert grown.out == whole.out
    assert "of all that was heard" in whole.err


def test_evaluate_reports_model_and_baselines(trained: Path) -> None:
    folder = trained / "report"
    args = [
        "evaluate",
        "--checkpoint",
        checkpoint(trained),
        "--output",
        str(folder),
        "--device",
        "cpu",
        "--epochs",
        "2",
    ]
    assert main(args) == 0
    names = ["confusion.png", "evaluation.md", "metrics.json", "precision_recall.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    report = json.loads((folder / "metrics.json").read_text())
    assert list(report["baselines"]) == ["majority", "mean spectrum", "small CNN"]
    assert report["metrics"]["accuracy"]["value"] > 0.8
    assert report["metrics"]["map"]["value"] > 0.9
    assert report["baseline_settings"]["small CNN"]["epochs"] == 2
    assert "clips in all" in (folder / "evaluation.md").read_text()


def test_bad_files_are_named_or_skipped(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(3)
    good, broken, empty, silent = (tmp_path / f"{name}.wav" for name in ("good", "broken", "empty", "silent"))
    soundfile.write(good, np.clip(9 * tone(3000, 1.0, rng), -1, 1), RATE)
    broken.write_bytes(b"not a sound")
    soundfile.write(empty, np.zeros(0), RATE)
    soundfile.write(silent, np.zeros((RATE, 8)), RATE)
    files = [str(path) for path in (good, broken, empty, silent)]
    assert main(["tag", *files, "--checkpoint", checkpoint(trained)]) == 2
    assert "broken.wav" in capsys.readouterr().err.splitlines()[-1]
    assert main(["tag", *files, "--checkpoint", checkpoint(trained), "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert {line.split("\t")[0] for line in captured.out.splitlines()[1:]} == {str(good), str(silent)}
    assert "skipped 2 of 4 files" in captured.err
    assert "silent.wav is silent" in captured.err
    assert "cut off" not in captured.err
    good.write_bytes(good.read_bytes()[:-1000])
    assert main(["tag", str(good), "--checkpoint", checkpoint(trained)]) == 0
    assert "good.wav is cut off: its header promises 1,000 more bytes" in capsys.readouterr().err
    assert "of its samples are clipped" in captured.err


BAD = {
    "no file": (["missing.wav"], "missing.wav does not exist"),
    "none readable": (["missing.wav", "--skip-bad"], "none of the 1 files could be read"),
    "stdin without live": (["-"], "- is read with --live"),
    "two live": (["{scene}", "{scene}", "--live"], "listens to one stream"),
    "same name": (["{scene}", "x/scene.mp3", "--events"], "two recordings are called scene"),
    "threshold": (["{scene}", "--threshold", "1.5"], "must lie between 0 and 1"),
    "top-k": (["{scene}", "--top-k", "0"], "--top-k: '0' is not a whole number from 1 on"),
    "threads": (["{scene}", "--threads", "0"], "--threads: '0' is not a whole number from 1 on"),
    "folder": (["."], ". is a folder"),
    "live missing": (["missing.wav", "--live"], "missing.wav does not exist"),
    "smoothing": (["{scene}", "--smooth-s", "1e9"], "must lie between 0 and 600 s"),
    "report live": (["{scene}", "--live", "--report"], "needs the whole recording"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    trained: Path, scene: Path, tmp_path: Path, args: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    args = [a.format(scene=scene) for a in args]
    assert main(["tag", *args, "--checkpoint", checkpoint(trained), "--folder", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("seqssm: error: ")
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not list(tmp_path.iterdir())
