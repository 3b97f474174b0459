"""The page in headless Chromium: a real WAV file as the microphone, and one through the file picker."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from served import make_service, running
from speller import RATE, checkpoint, spell
from websockets.sync.client import connect

from seqssm.serving.client import Limits
from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.base import load_task
from seqssm.tasks.tagging import AudioTagging

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium"),
]
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--mute-audio"),
]


class Browser:
    """One tab, driven over the DevTools protocol."""

    def __init__(self, folder: Path, microphone: Path) -> None:
        fake = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        self.process = subprocess.Popen(
            [
                *(CHROMIUM, *QUIET, *fake, f"--use-file-for-fake-audio-capture={microphone}%noloop"),
                *(f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0", "--window-size=1000,760"),
                "about:blank",
            ],
            stderr=subprocess.DEVNULL,
        )
        active = folder / "profile" / "DevToolsActivePort"
        self.wait(lambda: active.exists() and len(active.read_text().splitlines()) == 2)
        port = active.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            (tab,) = (one for one in json.load(answer) if one["type"] == "page")
        self.socket = connect(tab["webSocketDebuggerUrl"], max_size=None, compression=None)
        self.numbers = itertools.count(1)
        self.said: list[str] = []  # errors and messages of the console
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(60))
            if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def js(self, code: str) -> Any:
        """The value of an expression, evaluated as by a click."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: Any, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, "Chromium has ended"
            assert time.monotonic() < deadline, self.js("document.body.innerText") + "".join(self.said)
            time.sleep(0.1)

    def text(self, selector: str) -> str:
        return self.js(f"[...document.querySelectorAll({selector!r})].map(e => e.innerText).join('|')")

    def choose(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def browser(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page of a server with the trained recogniser and a tagger; words are spelled into the microphone."""
    folder = tmp_path_factory.mktemp("page")
    pause = np.zeros(RATE, np.float32)
    words = np.concatenate([pause, spell("ab d", 100), pause, pause, spell("c", 101), pause, pause])
    soundfile.write(folder / "microphone.wav", words, RATE, subtype="PCM_16")
    soundfile.write(folder / "picked.flac", np.stack([spell("d ba", 102)] * 2, 1), RATE)
    task = load_task(checkpoint(trained), StreamingASR)
    tagging = AudioTagging(["speech", "tone"], True, task.features, task.backbone_config, stem_channels=[4, 6, 6])
    service = make_service(task, Limits(sessions=2), tagging.eval())
    with running(service) as (url, _):
        service.origins = frozenset({url.replace("ws://", "http://").removesuffix("/stream")})
        browser = Browser(folder, folder / "microphone.wav")
        try:
            browser.call("Page.navigate", url=f"{next(iter(service.origins))}/")
            browser.wait(lambda: browser.js("document.querySelector('#status')?.dataset.state") == "ready")
            browser.folder = folder  # type: ignore[attr-defined]
            yield browser
        finally:
            browser.close()
    pictures = os.environ.get("SEQSSM_SCREENSHOTS")
    for picture in folder.glob("*.png") if pictures else ():
        shutil.copy(picture, str(pictures))


def test_the_microphone_is_written_down_live(browser: Browser) -> None:
    assert "0 ms|80 ms|160 ms|320 ms" in browser.text("#lookahead option")
    browser.js("document.querySelector('#microphone').click()")
    browser.wait(lambda: browser.js("document.querySelector('#status').dataset.state") == "live")
    # The first word is there while the second one is still to come.
    browser.wait(lambda: "ab" in browser.text("#transcript p"))
    browser.wait(lambda: browser.text("#transcript p.final > span").startswith("ab d"))
    browser.wait(lambda: browser.text("#transcript p.final > span") == "ab d|c")
    assert "%" in browser.text("#tags")
    browser.picture(browser.folder / "live.png")  # type: ignore[attr-defined]
    browser.js("document.querySelector('#stop').click()")
    browser.wait(lambda: browser.js("document.querySelector('#status').dataset.state") == "ready")
    assert browser.text("#transcript p.final > span") == "ab d|c"
    assert "2 segments" in browser.text("#facts")
    assert browser.text("#note") == ""
    assert not browser.said, "the console has complaints, such as of the content policy"


def test_a_file_goes_the_same_way(browser: Browser) -> None:
    browser.choose("#file", browser.folder / "picked.flac")  # type: ignore[attr-defined]
    browser.wait(lambda: browser.text("#facts").endswith("1 segment"))
    assert browser.text("#transcript p.final > span") == "d ba"
    browser.wait(lambda: browser.js("document.querySelector('#status').dataset.state") == "ready")
    browser.picture(browser.folder / "file.png")  # type: ignore[attr-defined]
    assert not browser.said


def test_a_file_that_is_no_sound_is_told(browser: Browser) -> None:
    browser.choose("#file", Path(__file__))
    browser.wait(lambda: "cannot read this file" in browser.text("#note"))
    assert browser.js("document.querySelector('#microphone').disabled") is False
    browser.picture(browser.folder / "error.png")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("source", "target"), [(48000, 16000), (44100, 16000), (48000, 8000), (16000, 16000)])
def test_the_page_resamples_as_well_as_soxr(browser: Browser, source: int, target: int) -> None:
    """Tones below the model's highest frequency come through as they are, those above it do not come back as others."""
    from seqssm.data.resampling import resample

    rng = np.random.default_rng(0)
    t = np.arange(source // 2) / source
    tones = [(f, a) for f, a in zip(rng.uniform(100, 0.43 * target, 20), rng.uniform(0.01, 0.1, 20), strict=True)]
    samples = sum(a * np.sin(2 * np.pi * f * t) for f, a in tones)
    samples = (samples * np.minimum(1, np.minimum(np.arange(len(t)), np.arange(len(t))[::-1]) / 500)).astype(np.float32)
    aliased = samples.copy()
    if source > target:
        aliased += (0.5 * np.sin(2 * np.pi * 0.6 * target * t)).astype(np.float32)
    code = f"""(() => {{
        const Resampler = new Function(WORKLET.split("class Packets")[0] + "return Resampler;")();
        const resampler = new Resampler({source}, {target});
        const samples = {json.dumps([round(float(x), 7) for x in aliased])}, out = [];
        for (let i = 0; i < samples.length; i += 128)
            out.push(...resampler.push(Float32Array.from(samples.slice(i, i + 128))));
        out.push(...resampler.push(new Float32Array(resampler.half)));
        return out;
    }})()"""
    made = np.array(browser.js(code))
    want = resample(samples, source, target)
    assert abs(len(made) - len(want)) <= 1
    inner = slice(200, min(len(made), len(want)) - 200)
    error = np.sqrt(np.mean((made[inner] - want[inner]) ** 2) / np.mean(want[inner] ** 2))
    assert error < 2e-3
