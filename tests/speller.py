"""A recogniser small enough to train in a test, of words that are spelled in tones."""

from pathlib import Path

import numpy as np
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


def train(folder: Path) -> None:
    """Fill a folder with spelled words and what `seqssm fit` learns of them."""
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


def checkpoint(trained: Path) -> str:
    return str(next((trained / "runs").rglob("best*.ckpt")))
