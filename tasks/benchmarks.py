"""Benchmarks of tasks, beside those of kernels and backbones: the further cases of ``seqssm bench``.

``cpu-tag-12x256-60`` hears 60 seconds of 16 kHz sound live with a causal tagger of 12 layers of width 256 (5 million
parameters), from samples to tags, in chunks of 480 ms. Its tokens are seconds of sound: the real-time factor is one
over the tokens a second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from seqssm.backbone import BackboneConfig
from seqssm.benchmarks import ModelCase
from seqssm.data.features import FeatureConfig, fbank
from seqssm.kernels.bench import FORWARD, Case, Run, Work
from seqssm.tasks.tagging import AudioTagging
from seqssm.tasks.tagging_stream import LiveTagger

FEATURES = FeatureConfig(n_mels=64, mean=-6.0, std=4.0)
CLASSES = 50


@dataclass(frozen=True)
class TaggingCase(Case):
    """Live tagging; ``l`` is the seconds of sound."""

    layers: int
    d_model: int

    defaults: ClassVar = ("cpu-tag-12x256-60",)
    passes: ClassVar = (FORWARD,)
    formula: ClassVar = (
        "the backbone's model case at 25 tokens a second; tokens here are seconds of sound: real-time factor = 1 / "
        "(tokens/s)"
    )

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"(cpu-)?tag-(\d+)x(\d+)-(\d+)", name)
        if match is None:
            return None
        layers, d_model, seconds = (int(size) for size in match.groups()[1:])
        return cls(name, "cpu" if match[1] else "cuda", seconds, layers, d_model)

    @property
    def tokens(self) -> int:
        return self.l

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def shrunk(self) -> Self:
        return replace(self, l=min(self.l, 1))

    def task(self) -> AudioTagging:
        """The tagger, with fresh weights."""
        torch.manual_seed(0)
        config = BackboneConfig(d_model=self.d_model, n_layers=self.layers)
        labels = [f"class {i}" for i in range(CLASSES)]
        return AudioTagging(labels, True, FEATURES, config).to(self.device).eval()

    def sound(self) -> np.ndarray:
        """(n,) samples of noise."""
        size = self.l * FEATURES.sample_rate
        return 0.1 * np.random.default_rng(0).standard_normal(size, dtype=np.float32)

    def build(self, implementation: str) -> Run:
        task, samples = self.task(), self.sound()

        def hear() -> Tensor:
            tagger = LiveTagger(task, FEATURES.sample_rate)
            scores = [one for packet in np.split(samples, self.l) for one in tagger.accept(packet)] + tagger.flush()
            return torch.cat([one.frames for one in scores], dim=1)

        return Run(hear, dict(task.named_parameters()), torch.zeros(0))

    def work(self, pass_name: str) -> list[Work]:
        return ModelCase("", self.device, self.l * 25, self.layers, self.d_model, "Mamba").work(pass_name)

    def error(self, pass_name: str, run: Run) -> float:
        """Of the live scores, against those of the whole recording at once."""
        task = self.task()
        features = fbank(torch.from_numpy(self.sound()), FEATURES).to(self.device)
        with torch.no_grad():
            expected = task.frame_logits(features[None], torch.tensor([len(features)], device=self.device))
        live = run(pass_name)[0]
        return ((live - expected).norm() / expected.norm()).item()
