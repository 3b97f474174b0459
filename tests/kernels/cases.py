"""Cases and the yardstick for the kernel tests; pytest puts this folder on the path: ``from cases import ...``.

A backend is judged against the reference in float64 on the same inputs, in every output and every gradient. Its error
may be at most twice that of the reference run in the dtype of the inputs (plus a few roundings of float32).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqssm.kernels import causal_conv1d, selective_scan, ssd

Results = dict[str, Tensor]


@dataclass(frozen=True)
class ScanCase:
    """A selective scan; ``packed`` is the mean length of packed sequences, ``strided`` makes every input a view."""

    l: int
    b: int = 1
    d: int = 8
    n: int = 4
    g: int = 1
    optional: bool = True  # D, z, delta_bias and softplus
    state: bool = True
    packed: int = 0
    reverse: bool | tuple[bool, ...] = False
    strided: bool = False

    @property
    def options(self) -> dict:
        return {
            "delta_softplus": self.optional,
            "seq_idx": packed(self.b, self.l, self.packed),
            "reverse": self.reverse,
        }

    def tensors(self) -> Results:
        """Inputs in float64, contiguous."""
        generator = torch.Generator().manual_seed(self.l * 31 + self.d * 7 + self.n)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        b, l, d, n, g = self.b, self.l, self.d, self.n, self.g
        tensors = {"u": randn(b, l, d), "B": randn(b, l, g, n), "C": randn(b, l, g, n)}
        # Decays a token from almost none to almost all, as a trained model has them.
        tensors["A"] = -torch.exp(randn(d, n))
        tensors["delta"] = randn(b, l, d) - 2 if self.optional else 0.3 * randn(b, l, d).exp()
        if self.optional:
            tensors |= {"D": randn(d), "z": randn(b, l, d), "delta_bias": randn(d)}
        if self.state:
            tensors["initial_state"] = randn(b, d, n)
        return tensors


@dataclass(frozen=True)
class ConvCase:
    """A causal convolution; fields as in ``ScanCase``."""

    l: int
    b: int = 1
    d: int = 8
    k: int = 4
    bias: bool = True
    activation: str | None = "silu"
    state: bool = True
    packed: int = 0
    reverse: bool | tuple[bool, ...] = False
    strided: bool = False

    @property
    def options(self) -> dict:
        return {"activation": self.activation, "seq_idx": packed(self.b, self.l, self.packed), "reverse": self.reverse}

    def tensors(self) -> Results:
        """Inputs in float64, contiguous."""
        generator = torch.Generator().manual_seed(self.l * 31 + self.d * 7 + self.k)
        shapes = {"x": (self.b, self.l, self.d), "weight": (self.d, self.k)}
        if self.bias:
            shapes["bias"] = (self.d,)
        if self.state:
            shapes["initial_state"] = (self.b, self.d, self.k - 1)
        return {k: torch.randn(*v, generator=generator, dtype=torch.float64) for k, v in shapes.items()}


@dataclass(frozen=True)
class SSDCase:
    """A state-space duality scan; ``D_p`` gives D a value a channel, the other fields are as in ``ScanCase``."""

    l: int
    b: int = 1
    h: int = 2
    p: int = 8
    n: int = 8
    g: int = 1
    optional: bool = True  # D, z, dt_bias and softplus
    D_p: bool = False
    state: bool = True
    packed: int = 0
    reverse: bool | tuple[bool, ...] = False
    chunk: int | None = None
    strided: bool = False

    @property
    def options(self) -> dict:
        return {
            "dt_softplus": self.optional,
            "seq_idx": packed(self.b, self.l, self.packed),
            "reverse": self.reverse,
            "chunk": self.chunk,
        }

    def tensors(self) -> Results:
        """Inputs in float64, contiguous."""
        generator = torch.Generator().manual_seed(self.l * 31 + self.p * 7 + self.n)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        b, l, h, p, n, g = self.b, self.l, self.h, self.p, self.n, self.g
        tensors = {"x": randn(b, l, h, p), "B": randn(b, l, g, n), "C": randn(b, l, g, n), "A": -torch.exp(randn(h))}
        tensors["dt"] = randn(b, l, h) - 2 if self.optional else 0.3 * randn(b, l, h).exp()
        if self.optional:
            tensors |= {"D": randn(h, p) if self.D_p else randn(h), "z": randn(b, l, h, p), "dt_bias": randn(h)}
        if self.state:
            tensors["initial_state"] = randn(b, h, p, n)
        return tensors


Case = ScanCase | ConvCase | SSDCase

SCAN_CASES = {
    "one-token": ScanCase(l=1, b=2),
    "one-token-reverse": ScanCase(l=1, reverse=True),
    "plain": ScanCase(l=63, b=2, optional=False, state=False),
    "odd-shapes": ScanCase(l=63, b=2, d=7, n=3),
    "one-state": ScanCase(l=70, d=5, n=1),
    "chunk-1": ScanCase(l=255, n=16),
    "chunk": ScanCase(l=256, packed=40),
    "chunk+1": ScanCase(l=257, d=33, n=2),
    "chunk+1-reverse": ScanCase(l=257, reverse=True, packed=40),
    "long": ScanCase(l=1000, d=4),
    "groups": ScanCase(l=100, b=2, d=12, g=3, packed=9),
    "both-directions": ScanCase(l=300, b=2, d=12, g=2, reverse=(False, True), packed=100),
    "three-directions": ScanCase(l=65, d=6, g=3, reverse=(True, False, True)),
    "packed-every-token": ScanCase(l=33, packed=1),
    "strided": ScanCase(l=80, b=2, d=10, g=2, packed=11, strided=True),
    "strided-reverse": ScanCase(l=80, b=2, d=10, g=2, packed=11, strided=True, reverse=True),
    "wide": ScanCase(l=40, b=2, d=150, n=5),
    "whole": ScanCase(l=512, b=3, d=64, n=16),
    "whole-both-directions": ScanCase(l=264, b=2, d=128, n=3, g=2, reverse=(False, True)),
    "whole-narrow": ScanCase(l=64, b=3, d=32, optional=False, state=False),
    "many-states": ScanCase(l=20, d=3, n=256),
}
CONV_CASES = {
    "one-token": ConvCase(l=1, b=2),
    "shorter-than-kernel": ConvCase(l=2, reverse=True, packed=1),
    "plain": ConvCase(l=63, b=2, bias=False, activation=None, state=False),
    "one-tap": ConvCase(l=9, k=1),
    "two-taps": ConvCase(l=9, k=2, packed=2),
    "three-taps": ConvCase(l=300, d=7, k=3, packed=50),
    "seven-taps": ConvCase(l=64, k=7, packed=4, reverse=True),
    "long": ConvCase(l=1025, b=2, d=5),
    "packed-every-token": ConvCase(l=33, packed=1),
    "both-directions": ConvCase(l=130, b=2, d=12, reverse=(False, True), packed=30),
    "three-directions": ConvCase(l=65, d=6, reverse=(True, False, True)),
    "strided": ConvCase(l=80, b=2, d=10, packed=11, strided=True),
    "strided-reverse": ConvCase(l=80, b=2, d=10, packed=11, strided=True, reverse=True),
    "wide": ConvCase(l=40, b=2, d=150),
}
SSD_CASES = {
    "one-token": SSDCase(l=1, b=2),
    "one-token-reverse": SSDCase(l=1, reverse=True),
    "plain": SSDCase(l=63, b=2, optional=False, state=False),
    "odd-shapes": SSDCase(l=63, b=2, h=3, p=5, n=7, D_p=True),
    "one-state": SSDCase(l=70, h=3, p=1, n=1),
    "chunk-1": SSDCase(l=63, p=64, n=16),
    "chunk": SSDCase(l=64, packed=40),
    "chunk+1": SSDCase(l=65, h=4, n=64),
    "chunk+1-reverse": SSDCase(l=65, reverse=True, packed=40),
    "long": SSDCase(l=1000, p=4, packed=300),
    "long-chunks": SSDCase(l=520, h=3, p=4, chunk=256, packed=97, reverse=True),
    "short-chunks": SSDCase(l=100, b=2, chunk=17, packed=23),
    "groups": SSDCase(l=100, b=2, h=6, g=3, packed=9),
    "both-directions": SSDCase(l=300, b=2, h=4, g=2, reverse=(False, True), packed=100),
    "three-directions": SSDCase(l=65, h=6, g=3, reverse=(True, False, True), D_p=True),
    "packed-every-token": SSDCase(l=33, packed=1),
    "strided": SSDCase(l=80, b=2, h=4, g=2, packed=11, strided=True),
    "strided-reverse": SSDCase(l=80, b=2, h=4, g=2, packed=11, strided=True, reverse=True),
    "many-sequences": SSDCase(l=40, b=9, h=2, p=5),
    "many-states": SSDCase(l=40, h=2, p=4, n=256),
}


def packed(b: int, l: int, mean: int) -> Tensor | None:
    """Packed-sequence indices (b, l) int32 with boundaries that differ between rows; any values, some used again."""
    if not mean:
        return None
    position = torch.arange(l) + 3 * torch.arange(b).unsqueeze(1)
    return (position // mean % 3 * 7 - 5).int()


def strided_view(x: Tensor) -> Tensor:
    """The values of ``x`` as a view with gaps in every dimension, as a slice of a fused projection has."""
    if x.dim() < 3:
        return x
    buffer = x.new_full([2 * s + 1 for s in x.shape[:-1]] + [x.shape[-1] + 5], float("nan"))
    view = buffer[tuple(slice(1, 2 * s + 1, 2) for s in x.shape[:-1])][..., 2 : 2 + x.shape[-1]]
    return view.copy_(x)


def far_view(x: Tensor) -> Tensor:
    """The same numbers with the last dimension outermost, as far apart as in a channel-major view of a long sequence:
    the last of it begins 2^31 elements after the first. The memory between is not touched, so it is never there."""
    last = x.shape[-1] - 1
    inner, apart = x[..., 0].contiguous(), -(-(2**31) // last)
    memory = torch.empty(last * apart + inner.numel(), dtype=x.dtype)
    return memory.as_strided(x.shape, (*inner.stride(), apart)).copy_(x)


def assert_same_from_afar(case: Case, timed: Sequence[str], operator: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Fail unless the results, float16, are the same bits when ``timed`` inputs and the output's gradient are far."""
    results = []
    for view in (torch.clone, far_view):
        inputs = {k: (view(x) if k in timed else x).requires_grad_() for k, x in inputs_in(case, torch.float16).items()}
        y, final_state = operator(**inputs)
        seeds = [view(fixed_randn(y)), fixed_randn(final_state)]
        results.append([y, final_state, *torch.autograd.grad([y, final_state], list(inputs.values()), seeds)])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def run(case: Case, inputs: Results, **options: object) -> Results:
    """Outputs of the case's operator and the gradients of its inputs, for fixed random gradients of both outputs."""
    operator = {ScanCase: selective_scan, ConvCase: causal_conv1d, SSDCase: ssd}[type(case)]
    return outputs_and_gradients(functools.partial(operator, **{**case.options, **options}), inputs)  # type: ignore


def outputs_and_gradients(operator: Callable[..., tuple[Tensor, Tensor]], inputs: Results) -> Results:
    """``operator(**inputs)``, with gradients flowing back from both results."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, final_state = operator(**leaves)
    torch.autograd.backward([y, final_state], [fixed_randn(y), fixed_randn(final_state)])
    gradients = {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    assert gradients.keys() == {f"d{name}" for name in inputs}
    return {"y": y.detach(), "final_state": final_state.detach(), **gradients}


def fixed_randn(like: Tensor) -> Tensor:
    """Random values that depend on the shape alone, representable in bfloat16."""
    generator = torch.Generator().manual_seed(like.numel())
    return torch.randn(like.shape, generator=generator).bfloat16().to(like.device, like.dtype)


def inputs_in(case: Case, dtype: torch.dtype, device: str = "cpu") -> Results:
    """Inputs as a model in ``dtype`` has them: parameters and state of a scan stay float32 in 16 bits."""
    wide = set() if isinstance(case, ConvCase) else {"A", "D", "delta_bias", "dt_bias", "initial_state"}
    kept = torch.promote_types(dtype, torch.float32)
    result = {k: x.to(device, kept if k in wide else dtype) for k, x in case.tensors().items()}
    return {k: strided_view(x) for k, x in result.items()} if case.strided else result


@functools.cache
def yardstick(case: Case, dtype: torch.dtype) -> tuple[Results, Results]:
    """The reference in float64, and in ``dtype``, on the inputs rounded to ``dtype``."""
    inputs = inputs_in(case, dtype)
    exact = run(case, {k: x.double() for k, x in inputs.items()}, backend="reference")
    return exact, exact if dtype == torch.float64 else run(case, inputs, backend="reference")


def assert_accurate(case: Case, actual: Results, dtype: torch.dtype, roundings: int = 16) -> None:
    """Fail unless every result is as close to float64 as twice the reference in ``dtype`` is."""
    exact, plain = yardstick(case, dtype)
    assert actual.keys() == exact.keys()
    for name, x in actual.items():
        assert x.dtype == plain[name].dtype, f"{name} has dtype {x.dtype}, expected {plain[name].dtype}"
        error, limit = distances(x, exact[name]), distances(plain[name], exact[name])
        floor = roundings * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        for e, bound, norm in zip(error, limit, ("mean square", "largest"), strict=True):
            assert e <= 2 * bound + floor, f"{name}: {norm} error {e:.2e}, reference in {dtype} {bound:.2e}"


def distances(x: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square and largest difference, relative to those of ``exact``."""
    if x.numel() == 0:
        return 0.0, 0.0
    difference = x.detach().cpu().double() - exact
    rms, largest = exact.square().mean().sqrt().item(), exact.abs().max().item()
    return difference.square().mean().sqrt().item() / (rms or 1.0), difference.abs().max().item() / (largest or 1.0)


def flip_inputs(inputs: Results, names: Sequence[str]) -> Results:
    """``inputs`` with time turned round in those that have it."""
    return {k: x.flip(1) if k in names else x for k, x in inputs.items()}
