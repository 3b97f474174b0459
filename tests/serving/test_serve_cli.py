"""The command `serve`: clients of its own, TLS, and what it says of bad arguments."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from served import make_tagging, make_task

from seqssm.cli import main
from seqssm.tasks.base import CHECKPOINT_KEY


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    for name, one in (("asr", make_task()), ("tagging", make_tagging())):
        torch.save({CHECKPOINT_KEY: one.describe(), "state_dict": one.state_dict()}, folder / f"{name}.ckpt")
    return folder


def test_the_command_serves_clients_and_reports_how_long_they_wait(
    checkpoints: Path, capsys: pytest.CaptureFixture
) -> None:
    args = ["--checkpoint", str(checkpoints / "asr.ckpt"), "--tag-checkpoint", str(checkpoints / "tagging.ckpt")]
    assert main(["serve", *args, "--port", "0", "--load-test", "2", "--load-s", "2"]) == 0
    out, err = capsys.readouterr()
    assert "listening on http://127.0.0.1:" in err
    assert out.startswith("2 live sessions of 2 s at 16,000 Hz")
    waits = [float(part) for part in out.splitlines()[2].replace(",", "").split()[-4:]]
    assert 0 < waits[0] <= waits[1] <= waits[2] <= waits[3]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl, to make a certificate")
def test_the_command_serves_over_tls(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    key, certificate = checkpoints / "key.pem", checkpoints / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # the clients trust it
    args = ["--checkpoint", str(checkpoints / "asr.ckpt"), "--tls-cert", str(certificate), "--tls-key", str(key)]
    assert main(["serve", *args, "--port", "0", "--load-test", "1", "--load-s", "1"]) == 0
    out, err = capsys.readouterr()
    assert "listening on https://127.0.0.1:" in err
    assert out.startswith("1 live sessions of 1 s")


COMMANDS = {
    "another task": (["--checkpoint", "{folder}/tagging.ckpt"], "this command needs a speech recogniser"),
    "sessions": (["--checkpoint", "{folder}/asr.ckpt", "--sessions", "0"], "sessions is 0"),
    "speed": (["--checkpoint", "{folder}/asr.ckpt", "--speed", "0.5"], "live sound comes at 1"),
    "port": (["--checkpoint", "{folder}/asr.ckpt", "--port", "{port}"], "Address already in use"),
    "no port": (["--checkpoint", "{folder}/asr.ckpt", "--port", "70000"], "between 0 and 65535"),
    "half of TLS": (["--checkpoint", "{folder}/asr.ckpt", "--tls-cert", "{folder}/asr.ckpt"], "give both"),
    "no TLS": (
        ["--checkpoint", "{folder}/asr.ckpt", "--tls-cert", "{folder}/asr.ckpt", "--tls-key", "{folder}/asr.ckpt"],
        "give a matching pair",
    ),
    "url": (["--url", "ws://localhost:1/stream"], "--url is for --load-test"),
}


@pytest.mark.parametrize(("args", "message"), COMMANDS.values(), ids=COMMANDS)
def test_bad_arguments_are_one_line_and_exit_code_2(
    checkpoints: Path, args: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        default = [] if "--port" in args else ["--port", "0"]
        assert main(["serve", *[arg.format(folder=checkpoints, port=port) for arg in args], *default]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("seqssm: error: ")
    assert message in last


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--checkpoint", "x"]) == 2
    assert "pip install 'seqssm[serve]'" in capsys.readouterr().err
