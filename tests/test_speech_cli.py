"""`seqssm speech`: n-gram models and synthetic speech, and a checkpoint that brings its n-gram model along."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speller import RATE, checkpoint, spell

from seqssm import hub
from seqssm.cli import main
from seqssm.data.speech.synthesis import plan_sayings, speak
from seqssm.errors import UserError
from seqssm.tasks.decoding.ngram import NGram

# Stands in for a program: a second of a tone, higher for more letters.
PROGRAM = f"""#!{sys.executable}
import sys, wave, struct, math
args = sys.argv[1:]
text = args[args.index("-t") + 1] if "-t" in args else args[-1]
if "mute" in args:
    sys.exit("no such voice: mute")
with wave.open(args[args.index("-o" if "-o" in args else "-w") + 1], "wb") as file:
    file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
    file.writeframes(b"".join(
        struct.pack("<h", int(9000 * math.sin(i * len(text) / 40))) for i in range(8000)))
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for both programs on the path, and no others."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("flite", "espeak-ng"):
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "manifest.tsv"
    path.parent.mkdir()
    rows = [("train", "Call the cat!"), ("train", "call a dog"), ("val", "HELD OUT"), ("test", "never seen")]
    lines = [f"{i}.wav\t{text}\t{split}\n" for i, (split, text) in enumerate(rows * 3)]
    path.write_text("path\ttext\tsplit\n" + "".join(lines))
    return path


def test_an_ngram_model_of_the_train_split(manifest: Path, capsys: pytest.CaptureFixture) -> None:
    out = manifest.parent / "m.arpa.gz"
    more = manifest.parent / "more.txt"
    more.write_text("see the fish\n\n")
    assert main(["speech", "ngram", str(manifest), "--text", str(more), "-o", str(out), "--order", "2"]) == 0
    assert "order 2, 7 words, of 7 sentences" in capsys.readouterr().out
    model = NGram.read(out)
    assert set(model.words) == {"<s>", "</s>", "<unk>", "call", "the", "cat", "a", "dog", "see", "fish"}
    assert model.sentence(["call", "the", "cat"]) > model.sentence(["cat", "the", "call"])
    assert main(["speech", "ngram", str(manifest), "-o", str(out), "--unit", "token"]) == 0
    assert {"<space>", "g"} <= set(NGram.read(out).words)


def test_synthetic_speech_of_the_train_split(manifest: Path, programs: Path, capsys: pytest.CaptureFixture) -> None:
    folder = manifest.parent / "synthetic"
    options = ["--sentences", "12", "--seed", "3", "--spell", "--workers", "2"]
    assert main(["speech", "synthesise", str(manifest), "-o", str(folder), *options]) == 0
    assert "12 sentences" in capsys.readouterr().out
    header, *rows = [line.split("\t") for line in (folder / "manifest.tsv").read_text().splitlines()]
    assert header == ["path", "text", "speaker", "split", "seconds"]
    assert len(rows) == 12
    assert {word for row in rows for word in row[1].split()} <= {"call", "the", "cat", "a", "dog"}
    assert {row[3] for row in rows} == {"train"}
    assert {row[2].split("-")[0] for row in rows} == {"flite", "espeak"}
    sound, rate = soundfile.read(folder / rows[0][0])
    assert (rate, len(sound)) == (16000, 16000)
    assert 0.15 < np.abs(sound).max() < 0.8
    plan = json.loads((folder / "synthesis.json").read_text())
    assert [one["text"] for one in plan["sayings"]] == [row[1] for row in rows]
    # The same again for the same seed; and it is a data set that training takes.
    again = manifest.parent / "again"
    assert main(["speech", "synthesise", str(manifest), "-o", str(again), *options]) == 0
    assert (again / "manifest.tsv").read_text() == (folder / "manifest.tsv").read_text()
    assert main(["speech", "ngram", "--extra", str(folder / "manifest.tsv"), "-o", str(folder / "m.arpa")]) == 0
    as_written = ["--as-written", "--sentences", "2", "--voices", "flite:slt"]
    assert main(["speech", "synthesise", str(manifest), "-o", str(manifest.parent / "third"), *as_written]) == 0
    rows = [line.split("\t") for line in (manifest.parent / "third/manifest.tsv").read_text().splitlines()[1:]]
    assert [row[1:3] for row in rows] == [["call the cat", "flite-slt"], ["call a dog", "flite-slt"]]


def test_letters_are_spelled(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqssm.data.speech import synthesis

    flite, espeak = plan_sayings(["a b oh <i>"] * 2, ["flite:slt"])[0], plan_sayings(["a be"], ["espeak-ng:en"])[0]
    said = synthesis.PROGRAMS["flite"](flite, True, "x")
    assert said[said.index("-t") + 1].replace(",", "") == "ay b oh <i>"
    assert "<say-as" in synthesis.PROGRAMS["espeak-ng"](espeak, True, "x")[-1]
    assert synthesis.PROGRAMS["espeak-ng"](plan_sayings(["a <i>"], ["espeak-ng:en"])[0], False, "x")[-1] == (
        "<speak>a &lt;i&gt;</speak>"
    )


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_a_real_program_speaks() -> None:
    (saying,) = plan_sayings(["enter one two"], ["espeak-ng:en-us+f2"])
    sound = speak(saying)
    assert 0.5 < len(sound) / 16000 < 4
    assert np.abs(sound).max() == pytest.approx(saying.level, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--voices", "festival:kal"], "'festival:kal' is no voice: give PROGRAM:VOICE"),
        (["--voices", "flite:mute"], "flite cannot say 'call the cat' with mute: no such voice: mute"),
        (["--sentences", "0"], "--sentences is 0"),
        (["-o", "{data}"], "is there already"),
    ],
)
def test_bad_input_of_synthesis(
    manifest: Path, programs: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    options = [one.format(data=manifest.parent) for one in options]
    args = ["-o", str(manifest.parent / "out"), "--as-written", *options]
    assert main(["speech", "synthesise", str(manifest), *args]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in manifest.parent.iterdir()) == ["manifest.tsv"]


def test_a_missing_program_is_named(manifest: Path, programs: Path, capsys: pytest.CaptureFixture) -> None:
    (programs / "flite").unlink()
    out = str(manifest.parent / "out")
    assert main(["speech", "synthesise", str(manifest), "-o", out]) == 2
    assert "flite is not installed: install it (apt install flite)" in capsys.readouterr().err
    assert main(["speech", "synthesise", str(manifest), "-o", out, "--voices", "espeak-ng:en", "--sentences", "1"]) == 0
    with pytest.raises(UserError, match="flite is not installed"):
        plan_sayings(["a"])


def test_a_checkpoint_brings_its_ngram_model(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, arpa = tmp_path / "folder", tmp_path / "m.arpa"
    assert main(["checkpoints", "export", checkpoint(trained), str(folder)]) == 0
    NGram.estimate([["dd", "c"]] * 3, 2).write(arpa)
    assert main(["checkpoints", "ngram", str(folder), str(arpa), "--weight", "9", "--bonus", "1"]) == 0
    assert hub.find_ngram(folder) == {"path": str(folder / hub.NGRAM), "unit": "word", "weight": 9.0, "bonus": 1.0}
    assert "ngram.arpa.gz, weight 9, bonus 1" in (folder / hub.CARD).read_text()
    assert main(["checkpoints", "card", str(folder), "--check"]) == 0
    recording = tmp_path / "r.wav"
    soundfile.write(recording, spell("ab d", 100), RATE)
    capsys.readouterr()

    def heard(*options: str) -> str:
        assert main(["transcribe", str(recording), "--checkpoint", str(folder), *options]) == 0
        return capsys.readouterr().out.strip()

    assert heard() == heard("--decode", "beam", "--ngram", "none") == "ab d"
    assert heard("--decode", "beam") != "ab d"  # a model that insists on other words
    assert heard("--decode", "beam", "--ngram-weight", "0.001") == heard(
        "--decode", "beam", "--ngram", str(arpa), "--ngram-weight", "0.001", "--ngram-bonus", "1"
    )
    report = ["--data", str(trained / "manifest.tsv"), "--split", "val", "-o", str(tmp_path / "report")]
    assert main(["evaluate", "--checkpoint", str(folder), "--decode", "beam", *report]) == 0
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert metrics["decoding"] == "beam of 16 with ngram.arpa.gz (weight 9, bonus 1)"
    # It goes where the checkpoint goes, and an altered one is refused.
    assert main(["hub", "push", str(folder), str(tmp_path / "pushed")]) == 0
    assert main(["checkpoints", "export", str(folder), str(tmp_path / "exported")]) == 0
    for copy in ("pushed", "exported"):
        assert (tmp_path / copy / hub.NGRAM).read_bytes() == (folder / hub.NGRAM).read_bytes()
        assert hub.find_ngram(tmp_path / copy) is not None
    (folder / hub.NGRAM).write_bytes(b"else")
    with pytest.raises(UserError, match="is not the file that was saved"):
        hub.load(folder)
    (folder / hub.NGRAM).unlink()
    assert main(["transcribe", str(recording), "--checkpoint", str(folder)]) == 2
    assert "copy the whole checkpoint folder" in capsys.readouterr().err
    assert main(["checkpoints", "ngram", str(tmp_path / "pushed"), str(recording)]) == 2
