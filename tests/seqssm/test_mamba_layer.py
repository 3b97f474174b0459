"""The layer as one autograd function against the same layer step by step."""

import pytest
import torch
from interpreter import assert_passes_interpreted, interpreted
from torch import Tensor

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.mixers import Mamba, mamba_layer
from seqssm.mixers.base import Normed


def make(backend: str, dtype: torch.dtype = torch.float64, **settings: object) -> Mamba:
    torch.manual_seed(0)
    mixer = Mamba(8, d_state=3, dt_rank=2, **settings).to(dtype)  # type: ignore[arg-type]
    mixer.backend = backend
    return mixer


def inputs(dtype: torch.dtype, length: int = 21) -> Tensor:
    return torch.randn(2, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def results(mixer: Mamba, x: Tensor, layer: str, state: bool, seq_idx: Tensor | None, reverse: bool) -> list[Tensor]:
    """Outputs, and the gradients of the residual stream, its norm, the states and all parameters."""
    mixer.zero_grad()
    residual = x.clone().requires_grad_()
    weight = torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype).requires_grad_()
    normed = Normed(residual, weight, 1e-5, "torch").compute(x.dtype)
    leaves = [residual, weight]
    given = None
    if state:
        given = {key: torch.randn_like(value).requires_grad_() for key, value in mixer.init_state(2).items()}
        leaves += given.values()
    if layer == "steps":
        mixer_results = mixer(normed, given, seq_idx=seq_idx, reverse=reverse)
    else:
        source = Normed(residual.detach(), weight.detach(), 1e-5, "torch") if layer == "recomputed" else None
        mixer_results = mamba_layer.run(mixer, normed, source, given, seq_idx, reverse)
    y, after = mixer_results
    outputs = [y, *after.values()]
    torch.autograd.backward(outputs, [torch.cos(torch.arange(o.numel()).to(o.dtype)).view_as(o) for o in outputs])
    return [*outputs, *(leaf.grad for leaf in leaves), *(p.grad for p in mixer.parameters())]


@pytest.mark.parametrize("layer", ["kept", "recomputed"])
@pytest.mark.parametrize(
    ("state", "packed", "reverse", "settings"),
    [
        (False, False, False, {}),
        (True, True, False, {"bias": True}),
        (True, False, True, {"conv_bias": False}),
    ],
)
def test_equals_the_steps(layer, state, packed, reverse, settings):
    mixer, x = make("torch", **settings), inputs(torch.float64)
    seq_idx = (torch.arange(21) // 8).expand(2, 21) if packed else None
    torch.manual_seed(2)
    expected = results(mixer, x, "steps", state, seq_idx, reverse)
    torch.manual_seed(2)
    for actual, value in zip(results(mixer, x, layer, state, seq_idx, reverse), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-11)


def test_frozen_weights_get_no_gradient():
    mixer, x = make("torch"), inputs(torch.float64).requires_grad_()
    mixer.in_proj.weight.requires_grad_(False)
    mamba_layer.run(mixer, x, None, None, None, False)[0].sum().backward()
    assert mixer.in_proj.weight.grad is None
    assert x.grad is not None
    assert mixer.out_proj.weight.grad is not None


def test_in_the_interpreter():
    assert_passes_interpreted(__file__, "-k", "triton")


@interpreted
@pytest.mark.parametrize("layer", ["kept", "recomputed"])
def test_triton_kernels_write_where_they_should(layer):
    mixer, x = make("torch", torch.float32), inputs(torch.float32)
    torch.manual_seed(2)
    expected = results(mixer, x, "steps", True, None, False)
    mixer.backend = "triton"
    torch.manual_seed(2)
    for actual, value in zip(results(mixer, x, layer, True, None, False), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_steps_on_gpu(dtype, checkpointed, monkeypatch):
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(d_model=64, n_layers=2, checkpoint_activations=checkpointed)).cuda()
    x = torch.randn(2, 1500, 64, device="cuda")
    gradients = []
    for step_by_step in (False, True):
        if step_by_step:
            monkeypatch.setattr(mamba_layer, "available", lambda mixer, x: False)
        backbone.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = backbone(x)
        y.square().mean().backward()
        gradients.append([y, *(p.grad for p in backbone.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        limit = (2e-2 if dtype == torch.bfloat16 else 1e-4) * expected.abs().max()
        assert (actual - expected).abs().max() <= limit
