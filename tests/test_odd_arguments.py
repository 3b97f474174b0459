"""What people type by mistake: one line, exit code 2, nothing lost; and what happens where nobody listens any more."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seqssm import hub
from seqssm.cli import main

SEQUENCE = "ACGTTGCAAC" * 20
WINDOWS = ["--checkpoint", "dna-promoter-notata", "--device", "cpu"]


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "genome.fa"
    path.write_text(f">one\n{SEQUENCE}\n>two\n{SEQUENCE[::-1]}\n")
    return path


def complaint(capsys: pytest.CaptureFixture) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("seqssm: error: ")] == lines[-1:]
    return lines[-1]


BAD = {
    "no such device": (["--device", "gpu"], "argument --device: 'gpu' cannot be used here"),
    "empty device": (["--device", ""], "argument --device: '' cannot be used here"),
    "device that computes nothing": (["--device", "meta"], "'meta' cannot be used here (it computes nothing)"),
    "no windows a pass": (["--batch-size", "0"], "argument --batch-size: '0' is not a whole number from 1 on"),
    "fewer": (["--batch-size", "-1"], "argument --batch-size: '-1' is not a whole number"),
    "VCF without variants": (["--vcf-out", "x.vcf"], "--vcf-out is for --vcf, and would have no effect here"),
    "rows without tracks": (["--bin-bp", "64"], "--bin-bp is for --tracks and --embeddings"),
    "one strand of windows": (["--one-strand"], "--one-strand is for --tracks, --embeddings and --vcf"),
    "no row": (["--tracks", "t", "--bin-bp", "0"], "argument --bin-bp: '0' is not a whole number"),
    "no chunk": (["--tracks", "t", "--chunk", "0"], "argument --chunk: '0' is not a whole number"),
    "no prefix": (
        ["--tracks", "", "--checkpoint", "dna-zymoseptoria"],
        "give what the names of the files are to begin",
    ),
    "stride of tracks": (["--tracks", "t", "--stride-bp", "5"], "--stride-bp is for windows"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_classify_refuses(
    fasta: Path, args: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fasta.parent)
    assert main(["classify", str(fasta), *WINDOWS, *args]) == 2
    assert message in complaint(capsys)
    assert os.listdir(fasta.parent) == ["genome.fa"]


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("tag", ["--smooth-s", "nan"]),
        ("tag", ["--threshold", "inf"]),
        ("tag", ["--chunk-ms", "1e12"]),
        ("tag", ["--threads", "100000"]),  # of which the system refuses some, and then the program crashed
        ("transcribe", ["--chunk-ms", "inf"]),
        ("transcribe", ["--longest-s", "nan"]),
        ("transcribe", ["--threads", "100000"]),
        ("evaluate", ["--device", "nowhere"]),  # was taken for the CPU in silence
        ("calibrate", ["folder", "--window-bp", "0"]),
        ("evaluate", ["--seed", "-1"]),
    ],
)
def test_numbers_that_make_no_sense_are_refused(command: str, args: list[str], capsys: pytest.CaptureFixture) -> None:
    name = next(arg for arg in args if arg.startswith("--"))
    assert main([command, *([] if command == "evaluate" else ["missing.wav"]), *args]) == 2
    assert complaint(capsys).startswith(f"seqssm: error: argument {name}: ")


def test_nothing_that_is_read_is_written_over(fasta: Path, capsys: pytest.CaptureFixture) -> None:
    vcf = fasta.with_name("in.vcf")
    vcf.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\none\t5\t.\tT\tG\t.\t.\t.\n")
    before = {path: path.read_bytes() for path in (fasta, vcf)}
    zymoseptoria = ["--checkpoint", "dna-zymoseptoria", "--device", "cpu", "--window-bp", "128"]
    variants = ["classify", str(fasta), *zymoseptoria, "--vcf", str(vcf)]
    for args in (
        ["classify", str(fasta), *WINDOWS, "-o", str(fasta)],
        [*variants, "-o", str(fasta)],
        [*variants, "-o", str(vcf)],
        [*variants, "--vcf-out", str(vcf)],
    ):
        assert main(args) == 2
        assert "is a file that is read" in complaint(capsys)
    out = str(fasta.with_name("out"))
    assert main([*variants, "-o", out, "--vcf-out", out]) == 2
    assert "give them two names" in complaint(capsys)
    assert {path: path.read_bytes() for path in fasta.parent.iterdir()} == before


def test_what_was_written_is_said(fasta: Path, capsys: pytest.CaptureFixture) -> None:
    out = fasta.with_name("out.tsv")
    assert main(["classify", str(fasta), *WINDOWS, "-o", str(out)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"wrote {out}: 2 windows"


def test_a_pipe_is_classified_as_the_file_is(fasta: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["classify", str(fasta), *WINDOWS]) == 0
    expected = capsys.readouterr().out
    command = [sys.executable, "-m", "seqssm", "classify", *WINDOWS]
    piped = subprocess.run([*command, "-"], input=fasta.read_bytes(), capture_output=True, check=True)
    assert piped.stdout.decode() == expected
    refused = subprocess.run([*command, "-", "--tracks", "t"], input=b"", capture_output=True)
    assert refused.returncode == 2
    assert b"standard input is read once" in refused.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-m", "seqssm"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (
        2,
        "seqssm: error: reading or writing failed: No space left on device\n",
    )


def test_a_reader_that_left_and_a_closed_output_are_no_errors() -> None:
    command = f"{sys.executable} -m seqssm"
    script = f"{command} --help | true; echo ${{PIPESTATUS[0]}}; {command} --help >&-; echo $?"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    first, second = result.stdout.split()
    assert (first in ("0", "141"), second, result.stderr) == (True, "0", "")


def test_a_folder_in_the_way_of_unfinished_tracks_is_kept(fasta: Path, capsys: pytest.CaptureFixture) -> None:
    mine = fasta.with_name("out.partial") / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    args = ["classify", str(fasta), "--checkpoint", "dna-zymoseptoria", "--device", "cpu"]
    assert main([*args, "--tracks", str(fasta.with_name("out"))]) == 2
    assert "out.partial is in the way, and not of an interrupted run" in complaint(capsys)
    assert mine.read_text() == "keep"


def test_two_runs_do_not_write_the_same_tracks(fasta: Path, capsys: pytest.CaptureFixture) -> None:
    from seqssm.commands.classify_tracks import _claimed

    args = ["classify", str(fasta), "--checkpoint", "dna-zymoseptoria", "--device", "cpu"]
    with _claimed(fasta.with_name("out.partial")):
        assert main([*args, "--tracks", str(fasta.with_name("out"))]) == 2
        assert "another process is at work in" in complaint(capsys)
    assert main([*args, "--tracks", str(fasta.with_name("out"))]) == 0
    assert not fasta.with_name("out.partial").exists()


def test_a_checkpoint_from_a_stranger_is_refused_and_nothing_suggested(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import torch

    text, foreign = tmp_path / "text.ckpt", tmp_path / "foreign.ckpt"
    text.write_text("no checkpoint")
    torch.save({"model": Path("x")}, foreign)
    for path in (text, foreign):
        assert main(["classify", str(fasta), "--checkpoint", str(path)]) == 2
        said = complaint(capsys)
        assert f"{path}: not a readable checkpoint: it is none, or holds more than tensors and plain data" in said
        assert "weights_only" not in said


@pytest.mark.parametrize("command", ["tag - --live", "transcribe -"])
def test_live_without_standard_input(command: str) -> None:
    shell = f"{sys.executable} -m seqssm {command} --device cpu <&-"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "seqssm: error: standard input is closed: send sound to it, or name a file in place of -\n"
    )


def test_a_named_pipe_is_heard_live(tmp_path: Path) -> None:
    import numpy as np
    import soundfile

    sound = tmp_path / "sound.wav"
    soundfile.write(sound, 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    os.mkfifo(tmp_path / "pipe")
    tag = f"{sys.executable} -m seqssm tag --live --device cpu --top-k 1"
    told = []
    for shell in (f"cat sound.wav | {tag} -", f"cat sound.wav > pipe & {tag} pipe"):
        heard = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=tmp_path)
        assert heard.returncode == 0, heard.stderr
        told.append((heard.stdout, heard.stderr.splitlines()[-1]))
    assert told[0] == told[1]


def test_a_recording_is_not_written_over_and_what_was_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import numpy as np
    import soundfile

    sound = tmp_path / "sound.wav"
    soundfile.write(sound, 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    before = sound.read_bytes()
    for command in ("tag", "transcribe"):
        assert main([command, str(sound), "-o", str(sound)]) == 2
        assert "is a file that is read" in complaint(capsys)
        assert main([command, str(sound), "--rate", "8000"]) == 2
        assert "--rate is of raw PCM" in complaint(capsys)
        out = tmp_path / f"{command}.txt"
        assert main([command, str(sound), "-o", str(out)]) == 0
        assert capsys.readouterr().err.splitlines()[-1] == f"seqssm: wrote {out}"
        assert out.exists()
    assert main(["tag", str(sound), "--events", "--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().err.splitlines()[-1].removeprefix("seqssm: wrote ").split(", ")
    assert sorted(map(Path, told)) == sorted(tmp_path.glob("sound.events.*"))
    assert len(told) == 3
    assert main(["transcribe", str(sound), "--folder", str(tmp_path / "new"), "--format", "srt"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"seqssm: wrote {tmp_path / 'new' / 'sound.srt'}"
    assert sound.read_bytes() == before


def test_a_checkpoint_does_not_replace_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = tmp_path / "copy"
    assert main(["hub", "pull", str(hub.shipped()["dna-zymoseptoria"]), str(copy)]) == 0
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert "metrics.json" in before
    for args in (["checkpoints", "export", str(copy), f"{copy}/."], ["calibrate", str(copy), str(copy)]):
        assert main(args) == 2
        assert "its metrics and pictures would be lost" in complaint(capsys)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_calibration_without_errors_to_learn_from_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One scale after another would be better: what was written had logits times 350."""
    import numpy as np

    rng, rows = np.random.default_rng(0), []
    for i in range(80):
        weights = [0.45, 0.05, 0.05, 0.45] if i % 2 else [0.05, 0.45, 0.45, 0.05]
        rows.append(f"{''.join(rng.choice(list('ACGT'), 60, p=weights))},{i % 2}")
    (tmp_path / "easy.csv").write_text("sequence,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "config.yaml").write_text(f"""
trainer:
  max_epochs: 8
  accelerator: cpu
  enable_progress_bar: false
  logger: {{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}, name: null, version: run}}}}
model:
  class_path: DNAClassification
  init_args: {{backbone: {{d_model: 16, n_layers: 1, backend: torch}}, optimizer: {{lr: 0.02}}}}
data:
  class_path: DNADataModule
  init_args: {{path: {tmp_path}/easy.csv, batch_size: 8, split_fractions: {{train: 0.5, val: 0.5}}}}
""")
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    assert main(["calibrate", str(checkpoint), str(tmp_path / "calibrated"), "--device", "cpu"]) == 2
    assert "validation windows come out right, so that the log loss falls for ever" in complaint(capsys)
    assert not (tmp_path / "calibrated").exists()


def test_what_takes_hours_is_not_begun_where_it_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["evaluate", "--checkpoint", "nowhere", "-o", str(tmp_path / "file")]) == 2
    assert "cannot write in" in complaint(capsys)
    assert main(["plan", "-c", "dna/fasta", "--", "--data.path", str(tmp_path / "none.fa")]) == 2
    assert "none.fa does not exist" in complaint(capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    rows = "".join(f">{i}\n{SEQUENCE}\n" for i in range(20_000))
    (tmp_path / "many.fa").write_text(rows)
    command = [sys.executable, "-m", "seqssm", "classify", "many.fa", "-o", "out.tsv", *WINDOWS]
    # What starts the tests may ignore the signal, which processes inherit: nohup does, and a shell's background.
    default = functools.partial(signal.signal, number, signal.SIG_DFL)
    with (
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=default) as running,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(running.kill)
        begin = time.monotonic()
        while not list(tmp_path.glob(".out.tsv.*")):
            assert running.poll() is None
            assert time.monotonic() < begin + 60
            time.sleep(0.02)
        said = None
        while said is None:
            assert time.monotonic() < begin + 120
            running.send_signal(
                number
            )  # again: one that comes in a finaliser, or in an import that catches all, is lost
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = running.communicate(timeout=3)[1]
    assert running.returncode == 128 + number, said
    assert "Traceback" not in said
    assert os.listdir(tmp_path) == ["many.fa"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are UTF-8 there")
def test_names_that_are_not_utf8_go_through(tmp_path: Path) -> None:
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    folder, name = os.fsencode(tmp_path), b"caf\xe9 ${.wav"  # Latin-1
    os.rename(folder + b"/a.wav", folder + b"/" + name)
    command = [sys.executable, "-m", "seqssm", "tag", name, "--top-k", "1", "--device", "cpu"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[1].startswith(name + b"\t")
    written = subprocess.run([*command, "-o", "tags.tsv", "--events", "--report"], cwd=tmp_path, capture_output=True)
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "tags.tsv").read_bytes() == shown.stdout
    assert os.path.exists(folder + b"/caf\xe9 ${.events.jsonl")
    assert os.path.exists(folder + b"/caf\xe9 ${.html")
