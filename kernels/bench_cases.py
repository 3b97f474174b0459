"""Benchmark cases of the three kernels: ``scan-BxDxL``, ``ssd-BxHxL`` and ``conv-BxDxL``.

``cpu-`` before the name puts a case on the CPU, ``-nN`` after a scan's sets its state size.
"""

import functools
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.kernels.bench import BOTH, OURS, Case, Run, Work
from seqssm.kernels.causal_conv1d.op import causal_conv1d
from seqssm.kernels.selective_scan.op import selective_scan
from seqssm.kernels.ssd.op import ssd


@dataclass(frozen=True)
class KernelCase(Case):
    """A kernel on random inputs of a batch of b sequences, ``width`` channels or heads."""

    b: int
    width: int

    family: ClassVar[str]
    shared: ClassVar[tuple[str, ...]]
    """Inputs that all channels or heads share."""

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(rf"(cpu-)?{cls.family}-(\d+)x(\d+)x(\d+)(-n(\d+))?", name)
        if match is None or (match[5] and not hasattr(cls, "n")):
            return None
        b, width, l = (int(size) for size in match.groups()[1:4])
        n = {"n": int(match[6])} if match[5] else {}
        return cls(name, "cpu" if match[1] else "cuda", l, b, width, **n)

    @property
    def tokens(self) -> int:
        return self.b * self.l

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Inputs by name; the first is the one whose shape the output has."""

    @abstractmethod
    def operator(self, inputs: Mapping[str, Any], backend: str) -> Tensor:
        """Our kernel."""

    @abstractmethod
    def peer(self, name: str, inputs: Mapping[str, Tensor]) -> tuple[Callable[[], Tensor], Mapping[str, Tensor]]:
        """A peer's call on the same values in the layout that it likes best, and its leaves."""

    def inputs(self) -> dict[str, Tensor]:
        """Random inputs, those of a trained layer in size: steps of 0.001 to 0.1, decays of 1 to 16 a unit of time."""
        generator = torch.Generator(self.device).manual_seed(0)
        inputs = {}
        for name, shape in self.shapes().items():
            parameter = name in ("A", "D", "delta_bias", "dt_bias")
            x = torch.empty(shape, device=self.device, dtype=torch.float32 if parameter else self.dtype)
            x.normal_(generator=generator)
            if name == "A":
                x.abs_().mul_(4).add_(0.5).neg_()
            elif name in ("delta_bias", "dt_bias"):
                x.sub_(4)
            inputs[name] = x.requires_grad_()
        return inputs

    def build(self, implementation: str) -> Run:
        inputs = self.inputs()
        function: Callable[[], Tensor] = functools.partial(self.operator, inputs, "auto")
        leaves: Mapping[str, Tensor] = inputs
        if implementation != OURS:
            function, leaves = self.peer(implementation, inputs)
        first = next(iter(leaves.values()))
        gradient = torch.empty_like(first, requires_grad=False)
        return Run(function, leaves, gradient.normal_(generator=torch.Generator(first.device).manual_seed(1)))

    def error(self, pass_name: str, run: Run) -> float:
        """Against the vectorised backend in float64 on the first channels or heads, over the whole length. Gradients of
        inputs that other channels share are left out."""
        part = min(self.width, 8 if self.family != "ssd" else 1)
        inputs = {name: self.part(name, x.detach(), part).double().requires_grad_() for name, x in run.leaves.items()}
        first = next(iter(inputs))
        gradient = self.part(first, run.gradient, part).double()
        exact = Run(lambda: self.operator(inputs, "torch"), inputs, gradient)(pass_name)
        actual = run(pass_name)
        pairs = [(self.part(first, actual[0].detach(), part), exact[0].detach())]
        if pass_name == BOTH:
            pairs += [
                (self.part(name, ours, part), theirs)
                for name, ours, theirs in zip(inputs, actual[1], exact[1], strict=True)
                if name not in self.shared
            ]
        return max(((a.double() - e).square().mean() / e.square().mean()).sqrt().item() for a, e in pairs)

    @abstractmethod
    def part(self, name: str, x: Tensor, size: int) -> Tensor:
        """An input or its gradient in the first ``size`` channels or heads."""


@dataclass(frozen=True)
class ScanCase(KernelCase):
    """Selective scan as in a Mamba layer: n = 16, one group, skip, gate, softplus."""

    n: int = 16

    family: ClassVar = "scan"
    shared: ClassVar = ("B", "C")
    defaults: ClassVar = (
        "scan-1x256x1048576",
        "scan-1x512x1048576",
        "scan-1x256x131072",
        "scan-64x256x16384",
        "scan-8x1536x2048",
        "cpu-scan-1x256x8192",
    )
    formula: ClassVar = (
        "a token and channel, n states, s bytes an element: forward max(4s+2ns/d bytes, n+4 exp, 4n float32 ops); "
        "backward max(7s+4ns/d bytes, n+6 exp, 19n float32 ops)"
    )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        wide, narrow, d = (self.b, self.l, self.width), (self.b, self.l, self.n), (self.width,)
        return {
            "u": wide,
            "delta": wide,
            "A": (*d, self.n),
            "B": narrow,
            "C": narrow,
            "D": d,
            "z": wide,
            "delta_bias": d,
        }

    def operator(self, inputs: Mapping[str, Any], backend: str) -> Tensor:
        return selective_scan(**inputs, delta_softplus=True, backend=backend)[0]

    def part(self, name: str, x: Tensor, size: int) -> Tensor:
        return x if name in self.shared else x[:size] if name in ("A", "D", "delta_bias") else x[..., :size]

    @property
    def peers(self) -> tuple[str, ...]:
        return ("mamba_ssm",) if self.device == "cuda" else ("mambapy",)

    def peer(self, name: str, inputs: Mapping[str, Tensor]) -> tuple[Callable[[], Tensor], Mapping[str, Tensor]]:
        if name == "mamba_ssm":
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

            leaves = {
                k: x.detach().transpose(1, 2).contiguous().requires_grad_() if x.dim() == 3 else x
                for k, x in inputs.items()
            }
            return lambda: selective_scan_fn(**leaves, delta_softplus=True), leaves
        from mambapy.mamba import MambaBlock, MambaConfig

        block = MambaBlock(MambaConfig(d_model=self.width, n_layers=1, expand_factor=1, d_state=self.n))
        i = inputs

        def run() -> Tensor:
            delta = F.softplus(i["delta"] + i["delta_bias"])
            return block.selective_scan(i["u"], delta, i["A"], i["B"], i["C"], i["D"]) * F.silu(i["z"])

        return run, inputs

    def work(self, pass_name: str) -> list[Work]:
        s, n = self.dtype.itemsize, self.n
        count = self.tokens * self.width
        share = n * s / self.width
        forward = Work(bytes=count * (4 * s + 2 * share), exps=count * (n + 4), lanes=count * 4 * n)
        backward = Work(bytes=count * (7 * s + 4 * share), exps=count * (n + 6), lanes=count * 19 * n)
        return [forward, backward] if pass_name == BOTH else [forward]


@dataclass(frozen=True)
class SSDCase(KernelCase):
    """SSD scan as in a Mamba-2 layer: heads of p = 64, n = 128, one group, skip, softplus."""

    p: int = 64
    n: int = 128

    family: ClassVar = "ssd"
    shared: ClassVar = ("B", "C")
    defaults: ClassVar = ("ssd-1x4x1048576", "ssd-1x8x1048576", "ssd-8x24x2048", "cpu-ssd-1x4x8192")
    formula: ClassVar = (
        "a token and head, s bytes an element, chunks of q = 64, decays by blocks of 16: "
        "forward max((2p+2n/h+1)s bytes, 4np+qp+qn/h flop, 18 exp); "
        "backward max((3p+4n/h+2)s bytes, 12np+3qp+3qn/h flop, 18 exp)"
    )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        b, l, h = self.b, self.l, self.width
        narrow = (b, l, 1, self.n)
        return {
            "x": (b, l, h, self.p),
            "dt": (b, l, h),
            "A": (h,),
            "B": narrow,
            "C": narrow,
            "D": (h,),
            "dt_bias": (h,),
        }

    def operator(self, inputs: Mapping[str, Any], backend: str) -> Tensor:
        return ssd(**inputs, dt_softplus=True, backend=backend)[0]

    def part(self, name: str, x: Tensor, size: int) -> Tensor:
        return x if name in self.shared else x[:size] if name in ("A", "D", "dt_bias") else x[:, :, :size]

    @property
    def peers(self) -> tuple[str, ...]:
        return ("mamba_ssm", "fla") if self.device == "cuda" else ()

    def peer(self, name: str, inputs: Mapping[str, Tensor]) -> tuple[Callable[[], Tensor], Mapping[str, Tensor]]:
        i = dict(inputs)
        if name == "mamba_ssm":
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

            return lambda: mamba_chunk_scan_combined(**i, chunk_size=256, dt_softplus=True), i
        from fla.ops.simple_gla import chunk_simple_gla

        # Its keys and queries are a head's own, and it knows no skip: both are made for it within the call.
        def simple_gla() -> Tensor:
            step = F.softplus(i["dt"] + i["dt_bias"])
            keys, queries = (i["B"] * step.unsqueeze(-1)).to(self.dtype), i["C"].expand(-1, -1, self.width, -1)
            y, _ = chunk_simple_gla(queries, keys, i["x"], g=step * i["A"], scale=1.0)
            return y + (i["D"].unsqueeze(-1) * i["x"]).to(y.dtype)

        return simple_gla, i

    def work(self, pass_name: str) -> list[Work]:
        s, p, n, h, q = self.dtype.itemsize, self.p, self.n, self.width, 64
        count = self.tokens * h
        flops = 4 * n * p + q * p + q * n / h
        forward = Work(bytes=count * (2 * p + 2 * n / h + 1) * s, flops=count * flops, exps=count * 18)
        backward = Work(bytes=count * (3 * p + 4 * n / h + 2) * s, flops=count * 3 * flops, exps=count * 18)
        return [forward, backward] if pass_name == BOTH else [forward]


@dataclass(frozen=True)
class ConvCase(KernelCase):
    """Causal convolution as in a Mamba layer: k = 4, bias, SiLU."""

    k: int = 4

    family: ClassVar = "conv"
    shared: ClassVar = ()
    defaults: ClassVar = ("conv-1x256x1048576", "conv-8x1536x2048", "cpu-conv-1x256x8192")
    formula: ClassVar = (
        "a token and channel, s bytes an element: forward max(2s bytes, 2 exp, 2k float32 ops); "
        "backward max(3s bytes, 2 exp, 6k float32 ops)"
    )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": (self.b, self.l, self.width), "weight": (self.width, self.k), "bias": (self.width,)}

    def operator(self, inputs: Mapping[str, Any], backend: str) -> Tensor:
        return causal_conv1d(**inputs, backend=backend)[0]

    def part(self, name: str, x: Tensor, size: int) -> Tensor:
        return x[..., :size] if name == "x" else x[:size]

    @property
    def peers(self) -> tuple[str, ...]:
        return ("causal_conv1d", "torch") if self.device == "cuda" else ("torch",)

    def peer(self, name: str, inputs: Mapping[str, Tensor]) -> tuple[Callable[[], Tensor], Mapping[str, Tensor]]:
        leaves = {**inputs, "x": inputs["x"].detach().transpose(1, 2).contiguous().requires_grad_()}  # (b, d, l)
        if name == "causal_conv1d":
            from causal_conv1d import causal_conv1d_fn

            return lambda: causal_conv1d_fn(**leaves, activation="silu"), leaves

        def conv() -> Tensor:
            weight, x = leaves["weight"].unsqueeze(1), leaves["x"]
            y = F.conv1d(x, weight, leaves["bias"], padding=self.k - 1, groups=self.width)
            return F.silu(y[..., : self.l])

        return conv, leaves

    def work(self, pass_name: str) -> list[Work]:
        s, k = self.dtype.itemsize, self.k
        count = self.tokens * self.width
        forward = Work(bytes=count * 2 * s, exps=count * 2, lanes=count * 2 * k)
        backward = Work(bytes=count * 3 * s, exps=count * 2, lanes=count * 6 * k)
        return [forward, backward] if pass_name == BOTH else [forward]


KERNEL_CASES = (ScanCase, SSDCase, ConvCase)
