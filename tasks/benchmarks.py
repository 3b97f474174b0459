"""Benchmarks of tasks, beside those of kernels and backbones: the further cases of ``seqssm bench``.

``cpu-tag-12x256-60`` hears 60 seconds of 16 kHz sound live with a causal tagger of 12 layers of width 256 (5 million
parameters), from samples to tags, in chunks of 480 ms. Its tokens are seconds of sound: the real-time factor is one
over the tokens a second.

``model-dna-12x128-1048576`` is one training step of a DNA classifier, from bases to gradients: a causal backbone of 12
layers of width 128 over 2^20 bases, embedding, pooling and head included. Behind the name: ``-checkpointed`` and
``-tight`` recompute layers in the backward pass (``backbone.checkpoint_activations``), ``-chunk262144`` takes chunks of
so many bases, ``-kept2`` keeps activations of so many chunks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from seqssm.backbone import BackboneConfig
from seqssm.benchmarks import ModelCase
from seqssm.data.features import FeatureConfig, fbank
from seqssm.kernels.bench import BOTH, FORWARD, Case, Run, Work
from seqssm.tasks.dna import DNAClassification
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


@dataclass(frozen=True)
class ClassifierCase(Case):
    """A DNA classifier over one causal window; see the module's docstring for the names."""

    layers: int
    d_model: int
    checkpointed: bool | Literal["tight"] = False
    chunk: int = 0
    kept: int = 1

    defaults: ClassVar = (
        "model-dna-12x128-1048576",
        "model-dna-12x128-1048576-checkpointed",
        "model-dna-12x128-1048576-tight",
        "model-dna-12x128-1048576-tight-chunk209920-kept4",
    )
    formula: ClassVar = "the backbone's model case"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(
            r"(cpu-)?model-dna-(\d+)x(\d+)-(\d+)(-checkpointed|-tight)?(?:-chunk(\d+)(?:-kept(\d+))?)?", name
        )
        if match is None:
            return None
        layers, d_model, l = (int(size) for size in match.groups()[1:4])
        chunk, kept = int(match[6] or 0), int(match[7] or 1)
        checkpointed: bool | Literal["tight"] = "tight" if match[5] == "-tight" else bool(match[5])
        return cls(name, "cpu" if match[1] else "cuda", l, layers, d_model, checkpointed, chunk, kept)

    @property
    def tokens(self) -> int:
        return self.l

    def shrunk(self) -> Self:
        return replace(self, l=min(self.l, 64), chunk=min(self.chunk, 16))

    def task(self, backend: str = "auto") -> DNAClassification:
        """The classifier, with fresh weights."""
        torch.manual_seed(0)
        config = BackboneConfig(
            d_model=self.d_model, n_layers=self.layers, checkpoint_activations=self.checkpointed, backend=backend
        )
        labels = [f"class {i}" for i in range(4)]
        task = DNAClassification(labels, config, chunk_length=self.chunk, chunk_kept=self.kept)
        return task.to(self.device).train()

    def build(self, implementation: str) -> Run:
        return self._run(self.task())

    def _run(self, task: DNAClassification) -> Run:
        generator = torch.Generator(self.device).manual_seed(0)
        tokens = torch.randint(4, (1, self.l), dtype=torch.uint8, device=self.device, generator=generator)
        lengths = torch.tensor([self.l], device=self.device)
        wide = next(task.head.parameters()).dtype

        def score() -> Tensor:
            narrow = self.device == "cuda" and wide == torch.float32
            with torch.autocast(self.device, torch.bfloat16, enabled=narrow):
                return task(tokens, lengths)

        return Run(
            score, dict(task.named_parameters()), torch.tensor([[0.6, -0.2, -0.3, -0.1]]).to(tokens.device, wide)
        )

    def work(self, pass_name: str) -> list[Work]:
        return ModelCase("", self.device, self.l, self.layers, self.d_model, "Mamba").work(pass_name)

    def error(self, pass_name: str, run: Run) -> float:
        """Against one pass of the torch backend in float64 on 1,024 bases, with chunks of a quarter: the scores, or all
        gradients at once."""
        short = replace(self, l=min(self.l, 1024), chunk=min(self.chunk, 256))
        exact = replace(short, checkpointed=False, chunk=0).task("torch").double()
        pairs = []
        for task in (short.task(), exact):
            output, gradients = short._run(task)(pass_name)
            results = gradients if pass_name == BOTH else (output.detach(),)
            pairs.append(torch.cat([result.double().flatten() for result in results]))
        return ((pairs[0] - pairs[1]).norm() / pairs[1].norm()).item()
