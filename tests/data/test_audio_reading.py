import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seqssm.data.audio.reading import blocks, cut_off, duration, read_audio
from seqssm.errors import UserError


def noise(count: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal((count, channels))).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.wav", {"subtype": "PCM_16"}, 4e-5),
        ("a.wav", {"subtype": "PCM_24"}, 1e-6),
        ("a.wav", {"subtype": "FLOAT"}, 1e-7),
        ("a.flac", {}, 2e-5),
        ("a.ogg", {"subtype": "VORBIS"}, None),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}, None),
        ("a.mp3", {}, None),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_is_read(tmp_path: Path, name: str, options: dict, tolerance: float | None, channels: int) -> None:
    rate = 48000 if name.endswith("opus") else 22050
    time = np.arange(rate) / rate
    tones = np.stack([0.3 * np.sin(2 * np.pi * 440 * (c + 1) * time) for c in range(channels)], 1)
    soundfile.write(tmp_path / name, tones, rate, **options)
    samples, read_rate = read_audio(tmp_path / name)
    assert read_rate == rate
    assert samples.dtype == np.float32
    if tolerance is not None:
        assert samples.shape == (channels, rate)
        assert np.abs(samples - tones.T).max() <= tolerance
    else:  # lossy: the loudest frequency of each channel is its tone
        for channel, heard in enumerate(samples):
            loudest = np.abs(np.fft.rfft(heard)).argmax() / len(heard) * rate
            assert loudest == pytest.approx(440 * (channel + 1), abs=2)
    joined = np.concatenate([block for block, _ in blocks(tmp_path / name, 0.13)], 1)
    assert np.array_equal(joined, samples)


def test_parts_and_eight_channels(tmp_path: Path) -> None:
    data = noise(1000, 8)
    soundfile.write(tmp_path / "a.wav", data, 100, subtype="FLOAT")
    samples, rate = read_audio(tmp_path / "a.wav", 2.5, 4.0)
    assert rate == 100
    assert np.array_equal(samples, data[250:400].T)
    assert np.array_equal(read_audio(tmp_path / "a.wav", 9.0, 99.0)[0], data[900:].T)
    assert duration(tmp_path / "a.wav", 2.5, 4.0) == (150, 100, 8)
    with open(tmp_path / "a.wav", "rb") as file:
        sizes = [block.shape for block, _ in blocks(file, 3.0)]
    assert sizes == [(8, 300), (8, 300), (8, 300), (8, 100)]


def test_mp3_is_the_same_from_any_place_on(tmp_path: Path) -> None:
    time = np.arange(5 * 22050) / 22050
    tone = 0.3 * np.sin(2 * np.pi * 440 * time * (1 + time / 10))
    soundfile.write(tmp_path / "a.mp3", tone, 22050)
    whole = read_audio(tmp_path / "a.mp3")[0]
    assert np.abs(whole[0] - tone)[1000:-1000].max() < 0.1
    for start_s, end_s in ((0.01, 0.5), (2.0, 3.0), (4.5, None)):
        part = read_audio(tmp_path / "a.mp3", start_s, end_s)[0]
        end = None if end_s is None else round(end_s * 22050)
        assert np.abs(part - whole[:, round(start_s * 22050) : end]).max() < 1e-6


def write_wav_header(path: Path, rate: int) -> None:
    path.write_bytes(
        b"RIFF" + (44).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
        + (1).to_bytes(2, "little") + (1).to_bytes(2, "little") + rate.to_bytes(4, "little")
        + (2 * rate % 2**32).to_bytes(4, "little") + (2).to_bytes(2, "little") + (16).to_bytes(2, "little")
        + b"data" + (8).to_bytes(4, "little") + bytes(8)
    )  # fmt: skip


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is not audio, but is long enough to be looked at")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan, 0.1]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "inf.wav", np.array([0.0, np.inf, 0.1]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "integers.wav", np.array([0.0, 0.1, -32768.0]), 2, subtype="FLOAT")
    (tmp_path / "random.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "circle.wav").symlink_to("circle.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    soundfile.write(tmp_path / "open.wav", noise(1000), 16000)
    header = (tmp_path / "open.wav").read_bytes()
    at = header.index(b"data") + 4
    (tmp_path / "open.wav").write_bytes(header[:at] + bytes(4) + header[at + 4 :])  # as a recorder that was killed
    write_wav_header(tmp_path / "zero.wav", 0)
    write_wav_header(tmp_path / "fast.wav", 1_000_000)
    for name, message in {
        "gone.wav": "does not exist",
        "empty.wav": "not readable as audio",
        "text.wav": "not readable as audio",
        "none.wav": "no samples",
        "nan.wav": "NaN or infinite samples",
        "inf.wav": "NaN or infinite samples",
        "integers.wav": "has a sample of -32768 at 1.00 s, where full scale is 1: scale it",
        "random.mp3": r"not readable as audio \(Format not recognised\)",
        "circle.wav": "does not exist",
        "pipe.wav": "is no file but a pipe or a device: live commands read them as -",
        f"{'long' * 80}.wav": "does not exist",
        "open.wav": "no samples by its header, which was never completed, and 2,000 bytes behind it: rewrite it",
        "zero.wav": "(sample rate of 0 Hz|not readable as audio)",
        "fast.wav": "sample rate of 1000000 Hz is not between 1 and 768,000",
    }.items():
        for read in (read_audio, lambda path: list(blocks(path))):
            with pytest.raises(UserError, match=rf"{name}.*{message}"):
                read(tmp_path / name)


def test_a_damaged_stream_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", noise(50_000), 16000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[:5000] + bytes(len(whole) - 5000))
    with pytest.raises(UserError, match=r"cut\.flac"):
        read_audio(tmp_path / "cut.flac")


def test_samples_beyond_full_scale_and_silence_are_kept(tmp_path: Path) -> None:
    loud = np.array([0.0, 3.0, -2.0], np.float32)
    soundfile.write(tmp_path / "loud.wav", loud, 16000, subtype="FLOAT")
    assert np.array_equal(read_audio(tmp_path / "loud.wav")[0][0], loud)
    soundfile.write(tmp_path / "silent.wav", np.zeros(100), 16000)
    assert not read_audio(tmp_path / "silent.wav")[0].any()


def test_blocks_of_bytes_in_memory() -> None:
    data = noise(500)
    stream = io.BytesIO()
    soundfile.write(stream, data, 1000, format="WAV", subtype="FLOAT")
    stream.seek(0)
    joined = np.concatenate([block for block, rate in blocks(stream, 0.1) if rate == 1000], 1)
    assert np.array_equal(joined, data.T)


def test_a_folder_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} is a folder"):
        read_audio(tmp_path)


def test_what_a_cut_off_wav_lacks_is_known(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(1000), 8000)
    whole = path.read_bytes()
    assert cut_off(path) == 0
    path.write_bytes(whole[:-300])
    assert cut_off(path) == 300
    for size in (0, 0xFFFFFFFF):  # what a pipe's writer puts there
        path.write_bytes(whole[:4] + size.to_bytes(4, "little") + whole[8:-300])
        assert cut_off(path) == 0
    soundfile.write(tmp_path / "a.flac", noise(1000), 8000)
    assert cut_off(tmp_path / "a.flac") == 0
