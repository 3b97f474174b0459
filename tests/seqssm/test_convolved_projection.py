"""The fused projection and convolution of Mamba-2 against the same step by step."""

import pytest
import torch
from torch import Tensor

from seqssm.mixers import Mamba2, convolved_projection


def results(mixer: Mamba2, x: Tensor, packed: bool, reverse: bool) -> list[Tensor]:
    mixer.zero_grad()
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    state = {key: torch.randn_like(value).requires_grad_() for key, value in mixer.init_state(2).items()}
    seq_idx = (torch.arange(x.shape[1]) // 8).expand(2, -1) if packed else None
    y, after = mixer(x, state, seq_idx=seq_idx, reverse=reverse)
    outputs = [y, *after.values()]
    torch.autograd.backward(outputs, [torch.cos(torch.arange(o.numel()).to(o.dtype)).view_as(o) for o in outputs])
    return [*outputs, x.grad, *(s.grad for s in state.values()), *(p.grad for p in mixer.parameters())]


@pytest.mark.parametrize(
    ("packed", "reverse", "settings"),
    [(True, False, {"bias": True}), (False, True, {"conv_bias": False, "ngroups": 2})],
)
def test_equals_the_steps(packed, reverse, settings, monkeypatch):
    torch.manual_seed(0)
    mixer = Mamba2(8, d_state=3, headdim=4, **settings).double()
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    expected = results(mixer, x, packed, reverse)
    run = convolved_projection.run
    monkeypatch.setattr(convolved_projection, "available", lambda backend, x: True)
    monkeypatch.setattr(convolved_projection, "run", lambda *arguments: run(*arguments, backend="torch"))
    for actual, value in zip(results(mixer, x, packed, reverse), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_steps_on_gpu(dtype, monkeypatch):
    torch.manual_seed(0)
    mixer = Mamba2(64, d_state=16, headdim=32).cuda()
    x = torch.randn(2, 1500, 64, device="cuda")
    gradients = []
    for step_by_step in (False, True):
        if step_by_step:
            monkeypatch.setattr(convolved_projection, "available", lambda backend, x: False)
        mixer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = mixer(x)
        y.square().mean().backward()
        gradients.append([y, *(p.grad for p in mixer.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        limit = (2e-2 if dtype == torch.bfloat16 else 1e-4) * expected.abs().max()
        assert (actual - expected).abs().max() <= limit
