"""Raw PCM and WAV that are still coming in."""

import io
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seqssm.data.audio.live import LiveAudio
from seqssm.errors import UserError


class Dribble(io.RawIOBase):
    """A pipe that gives some bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size, self.at = data, size, 0

    def read(self, size: int = -1) -> bytes:
        given = self.data[self.at : self.at + min(self.size, size)]
        self.at += len(given)
        return given


def samples(channels: int = 2, n: int = 1000) -> np.ndarray:
    return (np.random.default_rng(0).random((n, channels)).astype(np.float32) - 0.5) * 1.9


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize(
    ("subtype", "step"), [("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-31), ("PCM_U8", 2**-7), ("FLOAT", 0)]
)
def test_wav_of_any_encoding_in_any_packets(subtype: str, step: float, size: int) -> None:
    file = io.BytesIO()
    soundfile.write(file, samples(), 22050, subtype, format="WAV")
    audio = LiveAudio(Dribble(file.getvalue(), size), "pipe")
    assert (audio.rate, audio.channels) == (22050, 2)
    heard = np.concatenate(list(audio), axis=1).T
    expected = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0]
    np.testing.assert_array_equal(heard, expected)
    np.testing.assert_allclose(heard, samples(), atol=max(step, 1e-7))


def test_a_header_that_does_not_know_the_length_yet() -> None:
    file = io.BytesIO()
    soundfile.write(file, samples(1), 8000, "PCM_16", format="WAV")
    data = file.getvalue()
    at = data.index(b"data")
    for size in (0, 0xFFFFFFFF):
        unknown = data[: at + 4] + struct.pack("<I", size) + data[at + 8 :]
        assert np.concatenate(list(LiveAudio(Dribble(unknown, 50), "pipe")), axis=1).shape == (1, 1000)
    # With a length, what follows the samples is no sound.
    assert np.concatenate(list(LiveAudio(Dribble(data + b"LIST1234", 50), "pipe")), axis=1).shape == (1, 1000)


def test_raw_pcm() -> None:
    values = (samples(3) * 32767).astype("<i2")
    audio = LiveAudio(Dribble(values.tobytes(), 5), "pipe", rate=48000, channels=3)
    np.testing.assert_array_equal(np.concatenate(list(audio), axis=1).T, values / np.float32(32768))
    broken = samples(1)
    broken[3], broken[500], broken[700] = np.nan, np.inf, -32768.0
    audio = LiveAudio(Dribble(broken.tobytes(), 999), "pipe", rate=8000, encoding="f32le")
    heard = np.concatenate(list(audio), axis=1)[0]
    assert audio.repaired == 3
    assert (heard[[3, 500, 700]] == 0).all()
    np.testing.assert_array_equal(heard[4:500], broken[4:500, 0])
    assert audio.complaints() == ["3 samples were NaN, infinite or far beyond full scale, and taken for silence"]


def test_an_end_in_the_wrong_place_is_told() -> None:
    audio = LiveAudio(Dribble(b"\1\0" * 500 + b"\1", 7), "pipe", rate=8000, channels=2)
    assert np.concatenate(list(audio), axis=1).shape == (2, 250)
    (complaint,) = audio.complaints()
    assert complaint.startswith("it ended within a sample, 1 bytes of which were left out")
    file = io.BytesIO()
    soundfile.write(file, samples(1), 8000, "PCM_16", format="WAV")
    audio = LiveAudio(Dribble(file.getvalue()[:-100], 50), "pipe")
    assert np.concatenate(list(audio), axis=1).shape == (1, 950)
    assert audio.complaints() == ["it ended 100 bytes before the end that its WAV header tells"]
    whole = LiveAudio(Dribble(file.getvalue(), 50), "pipe")
    assert np.concatenate(list(whole), axis=1).shape == (1, 1000)
    assert whole.complaints() == []


def test_a_file_that_grows(tmp_path: Path) -> None:
    file = io.BytesIO()
    soundfile.write(file, samples(1, 3000), 8000, "PCM_16", format="WAV")
    data, path = file.getvalue(), tmp_path / "growing.wav"
    path.write_bytes(data[:1000])

    def grow() -> None:
        for start in range(1000, len(data), 1500):
            time.sleep(0.05)
            with open(path, "ab") as out:
                out.write(data[start : start + 1500])

    writer = threading.Thread(target=grow)
    writer.start()
    with open(path, "rb") as stream:
        heard = np.concatenate(list(LiveAudio(stream, "growing.wav", follow_s=0.5)), axis=1)
    writer.join()
    assert heard.shape == (1, 3000)


def test_bad_streams() -> None:
    wav = io.BytesIO()
    soundfile.write(wav, samples(1), 8000, "DOUBLE", format="WAV")
    cases = [
        (b"", {}, "has no samples"),
        (b"\x00" * 100, {}, "raw PCM, not WAV: say its sample rate"),
        (b"\x00" * 100, {"rate": 0}, "pipe"),
        (b"\x00" * 100, {"rate": 900_000}, "pipe"),
        (b"\x00" * 100, {"rate": 8000, "channels": 0}, "0 channels"),
        (b"\x00" * 100, {"rate": 8000, "encoding": "mp3"}, "unknown encoding"),
        (wav.getvalue()[:30], {}, "header ends too early"),
        (b"RIFF....WAVELIST" + b"\xff" * 4 + bytes(99), {}, "a part of it is 4,294,967,295 bytes long"),
        (wav.getvalue(), {}, "64 bits cannot be read live"),
    ]
    for data, options, message in cases:
        with pytest.raises(UserError, match=message):
            LiveAudio(Dribble(data, 64), "pipe", **options)
