"""Benchmarks of whole models, beside those of the kernels: the cases of ``seqssm bench``.

``model-12x128-1048576`` is a Mamba backbone of 12 layers of width 128 over 2^20 tokens, ``model2-...`` the same of
Mamba-2 layers, ``model-...-checkpointed`` with recomputed activations; ``decode-12x128`` is one token at a time with
carried state. ``cpu-`` puts any of them on the CPU.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.kernels import bench
from seqssm.kernels.bench import BOTH, FORWARD, OURS, Case, Run, Work
from seqssm.kernels.bench_cases import KERNEL_CASES, ConvCase, ScanCase, SSDCase

PORTABLE = "seqssm, torch backend"
"""Our own kernels in plain PyTorch, timed among the peers where a compiled backend is the default."""


@dataclass(frozen=True)
class ModelCase(Case):
    """A backbone over one sequence of embedded tokens: published sizes (expand 2, n 16 or 128, head width 64)."""

    layers: int
    d_model: int
    mixer: str
    checkpointed: bool = False

    defaults: ClassVar = (
        "model-12x128-1048576",
        "model-12x128-1048576-checkpointed",
        "model2-12x128-1048576",
        "cpu-model-4x128-1024",
        "cpu-model-4x128-4096",
        "cpu-model2-4x128-1024",
        "cpu-model2-4x128-4096",
    )
    formula: ClassVar = (
        "layers times (scan + convolution, as in their own cases, + projections: "
        "max(flop, activations read and written once)), backward projections twice the forward's"
    )

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"(cpu-)?model(2?)-(\d+)x(\d+)-(\d+)(-checkpointed)?", name)
        if match is None:
            return None
        layers, d_model, l = (int(size) for size in match.groups()[2:5])
        return cls(name, "cpu" if match[1] else "cuda", l, layers, d_model, f"Mamba{match[2]}", bool(match[6]))

    @property
    def tokens(self) -> int:
        return self.l

    def config(self, backend: str = "auto") -> BackboneConfig:
        return BackboneConfig(
            d_model=self.d_model,
            n_layers=self.layers,
            mixers={"m": {"class_path": self.mixer}},
            checkpoint_activations=self.checkpointed,
            backend=backend,
        )

    @property
    def peers(self) -> tuple[str, ...]:
        # transformers without compiled kernels loops over the tokens for Mamba: hours at a million.
        short = ("transformers",) if self.l <= (1024 if self.mixer == "Mamba" else 8192) else ()
        if self.device == "cuda":
            return ("mamba_ssm", *short)
        return (PORTABLE, *short, "mambapy") if self.mixer == "Mamba" else short

    def build(self, implementation: str) -> Run:
        torch.manual_seed(0)
        x = torch.randn(1, self.l, self.d_model, device=self.device)
        if implementation in (OURS, PORTABLE):
            config = self.config() if implementation == OURS else self.config("torch")
            model: nn.Module = Backbone(config).to(self.device)

            def function() -> Tensor:
                return model(x)[0]
        else:
            model, function = self._peer(implementation, x)

        def cast() -> Tensor:
            with _autocast(self):
                return function()

        leaves = {k: parameter for k, parameter in model.named_parameters() if "embed" not in k}
        return Run(cast, leaves, torch.randn_like(x))

    def _peer(self, name: str, x: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
        sizes = {"hidden_size": self.d_model, "num_hidden_layers": self.layers, "vocab_size": 8}
        if name == "transformers":
            if self.mixer == "Mamba":
                from transformers import MambaConfig, MambaModel

                model: nn.Module = MambaModel(MambaConfig(**sizes)).to(self.device)
            else:
                from transformers import Mamba2Config, Mamba2Model

                heads = {"num_heads": self.d_model // 32, "head_dim": 64, "n_groups": 1, "state_size": 128}
                model = Mamba2Model(Mamba2Config(**sizes, **heads)).to(self.device)
            return model, lambda: model(inputs_embeds=x, use_cache=False).last_hidden_state
        if name == "mambapy":
            from mambapy.mamba import Mamba, MambaConfig

            model = Mamba(MambaConfig(d_model=self.d_model, n_layers=self.layers)).to(self.device)
            return model, lambda: model(x)
        from mamba_ssm.models.mixer_seq_simple import MixerModel

        layer = {"layer": "Mamba1" if self.mixer == "Mamba" else "Mamba2"}
        options = {"ssm_cfg": layer, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
        model = MixerModel(self.d_model, self.layers, d_intermediate=0, vocab_size=8, **options).to(self.device)
        model.embedding = nn.Identity()
        return model, lambda: model(x)

    def work(self, pass_name: str) -> list[Work]:
        s, d = self.dtype.itemsize, self.d_model
        e = 2 * d
        if self.mixer == "Mamba":
            rank, n = -(-d // 16), 16
            pairs = [(d, 2 * e), (e, rank + 2 * n), (rank, e), (e, d)]
            scan: Case = ScanCase("", self.device, self.l, 1, e)
            conv = ConvCase("", self.device, self.l, 1, e)
        else:
            heads, n = e // 64, 128
            pairs = [(d, 2 * e + 2 * n + heads), (e, d)]
            scan = SSDCase("", self.device, self.l, 1, heads)
            conv = ConvCase("", self.device, self.l, 1, e + 2 * n)
        linear = Work(bytes=self.l * s * sum(a + b for a, b in pairs), flops=self.l * 2 * sum(a * b for a, b in pairs))
        passes = [linear, linear, linear] if pass_name == BOTH else [linear]
        return (scan.work(pass_name) + conv.work(pass_name) + passes) * self.layers

    def error(self, pass_name: str, run: Run) -> float:
        """Against the torch backend in float64 on the first 1,024 tokens: the output, or all gradients at once."""
        torch.manual_seed(0)
        model = Backbone(self.config()).to(self.device)
        exact = Backbone(self.config("torch")).to(self.device, torch.float64)
        exact.load_state_dict(model.state_dict())
        x = torch.randn(1, min(self.l, 1024), self.d_model, device=self.device)
        gradient = torch.randn_like(x)

        def results(backbone: Backbone, x: Tensor) -> Tensor:
            y, gradients = Run(lambda: backbone(x)[0], dict(backbone.named_parameters()), gradient.to(x.dtype))(
                pass_name
            )
            return torch.cat([g.double().flatten() for g in gradients]) if pass_name == BOTH else y.detach().double()

        with _autocast(self):
            actual = results(model, x)
        expected = results(exact, x.double())
        return ((actual - expected).norm() / expected.norm()).item()


@dataclass(frozen=True)
class DecodeCase(Case):
    """One token through a Mamba backbone with carried state, batch 1; on a GPU replayed from a CUDA graph."""

    layers: int
    d_model: int

    defaults: ClassVar = ("decode-12x128", "cpu-decode-4x128")
    passes: ClassVar = (FORWARD,)
    formula: ClassVar = "parameters and state read once, state written once"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"(cpu-)?decode-(\d+)x(\d+)", name)
        if match is None:
            return None
        return cls(name, "cpu" if match[1] else "cuda", 1, int(match[2]), int(match[3]))

    @property
    def tokens(self) -> int:
        return 1

    def build(self, implementation: str) -> Run:
        torch.manual_seed(0)
        model = Backbone(BackboneConfig(d_model=self.d_model, n_layers=self.layers)).to(self.device, self.dtype).eval()
        x = torch.randn(1, self.d_model, device=self.device, dtype=self.dtype)
        state = model.init_state(1)

        def step() -> Tensor:
            return model.step(x, state)

        return Run(_captured(step) if self.device == "cuda" else step, dict(model.named_parameters()), x)

    def work(self, pass_name: str) -> list[Work]:
        e, s = 2 * self.d_model, self.dtype.itemsize
        d, rank, n, k = self.d_model, -(-self.d_model // 16), 16, 4
        weights = 3 * d * e + e * (rank + 2 * n) + rank * e + e * k
        return [Work(bytes=self.layers * (weights * s + e * n * 4 + 2 * e * (n * 4 + (k - 1) * s)))]

    def error(self, pass_name: str, run: Run) -> float:
        """64 steps against one pass in float64."""
        torch.manual_seed(0)
        model = Backbone(BackboneConfig(d_model=self.d_model, n_layers=self.layers)).to(self.device, self.dtype).eval()
        exact = copy.deepcopy(model).double()
        x = torch.randn(1, 64, self.d_model, device=self.device, dtype=self.dtype)
        state = model.init_state(1)
        with torch.no_grad():
            steps = torch.stack([model.step(token, state) for token in x.unbind(1)], dim=1).double()
            expected = exact(x.double())[0]
        return ((steps - expected).norm() / expected.norm()).item()


def _captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = step()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


@contextmanager
def _autocast(case: Case) -> Iterator[None]:
    with torch.autocast(case.device, torch.bfloat16, enabled=case.device == "cuda"):
        yield


CASES: tuple[type[Case], ...] = (*KERNEL_CASES, ModelCase, DecodeCase)


def main(names: Sequence[str] | None = None, json_path: Path | None = None, **options: Any) -> list[dict[str, Any]]:
    """Run benchmarks by name or pattern; see :func:`seqssm.kernels.bench.main` for the options."""
    return bench.main(names, json_path, families=CASES, **options)
