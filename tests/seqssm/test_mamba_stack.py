"""A stack of Mamba blocks as one autograd function against the same blocks one by one."""

import pytest
import torch
from interpreter import assert_passes_interpreted, interpreted
from torch import Tensor, nn

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.mixers import mamba_layer, mamba_stack


def make(backend: str = "torch", dtype: torch.dtype = torch.float64, **settings: object) -> Backbone:
    torch.manual_seed(0)
    mixers = {"m": {"class_path": "Mamba", "init_args": {"d_state": 3, "dt_rank": 2, **settings}}}
    return Backbone(BackboneConfig(d_model=8, n_layers=3, mixers=mixers, backend=backend)).to(dtype)


def results(backbone: Backbone, stacked: bool, state: bool, packed: bool, length: int = 21) -> dict[str, Tensor]:
    """Outputs, and the gradients of the input, the states and all parameters."""
    backbone.zero_grad()
    dtype = backbone.norm.weight.dtype
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, length, 8, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    seq_idx = (torch.arange(length) // 8).expand(2, length) if packed else None
    given = {}
    if state:
        given = {
            key: torch.randn(value.shape, dtype=dtype, generator=generator).requires_grad_()
            for key, value in backbone.init_state(2).items()
        }
    if stacked:
        layers = [mamba_stack.Layer(block.norm, block.mixer) for block in backbone.blocks]
        split = [{k: given[f"layers.{i}.{k}"] for k in ("conv", "scan")} if state else None for i in range(3)]
        total, after = mamba_stack.run(layers, x, split, seq_idx)
        y = backbone.norm(total)[1]
        new = {f"layers.{i}.{key}": value for i, own in enumerate(after) for key, value in own.items()}
    else:
        y, new = backbone(x, given or None, seq_idx=seq_idx)
    outputs = {"y": y, **new}
    torch.autograd.backward(
        list(outputs.values()), [torch.cos(torch.arange(o.numel()).to(o.dtype)).view_as(o) for o in outputs.values()]
    )
    leaves = {"x": x, **given, **dict(backbone.named_parameters())}
    return {**outputs, **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("state", "packed", "settings"),
    [(False, False, {}), (True, True, {"bias": True}), (True, False, {"conv_bias": False})],
)
def test_equals_the_blocks(state, packed, settings):
    backbone = make(**settings)
    check(results(backbone, True, state, packed), results(backbone, False, state, packed), 1e-9, 1e-11)


def test_loss_of_the_state_alone():
    """A chunk that no loss sees but through its state."""
    gradients = []
    for stacked in (False, True):
        backbone, x = make(), torch.linspace(-1, 1, 72, dtype=torch.float64).view(1, 9, 8)
        layers = [mamba_stack.Layer(block.norm, block.mixer) for block in backbone.blocks]
        if stacked:
            last = mamba_stack.run(layers, x, [None] * 3, None)[1][1]["scan"]
        else:
            last = backbone(x)[1]["layers.1.scan"]
        last.square().sum().backward()
        gradients.append([p.grad for p in backbone.layers[1].parameters() if p.grad is not None and p.grad.any()])
    assert len(gradients[0]) > 5
    for actual, value in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-11)


def test_the_stream_is_gone_back_in_float32():
    """Over many blocks, each of which adds as much as it finds."""
    backbone = Backbone(BackboneConfig(d_model=8, n_layers=12, backend="torch"))
    exact = Backbone(BackboneConfig(d_model=8, n_layers=12, backend="torch")).double()
    exact.load_state_dict(backbone.state_dict())
    x = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(0))
    exact(x.double())[0].sum().backward()
    errors = []
    for stacked in (False, True):
        backbone.zero_grad()
        if stacked:
            layers = [mamba_stack.Layer(block.norm, block.mixer) for block in backbone.blocks]
            y = backbone.norm(mamba_stack.run(layers, x, [None] * 12, None)[0])[1]
        else:
            y = backbone(x)[0]
        y.sum().backward()
        pairs = zip(backbone.parameters(), exact.parameters(), strict=True)
        errors.append(max(((p.grad - e.grad).norm() / e.grad.norm()).item() for p, e in pairs))
    assert errors[1] < 2 * errors[0]


def test_is_what_a_tight_backbone_runs(monkeypatch):
    monkeypatch.setattr(mamba_layer, "available", lambda mixer, x: True)
    runs = []
    monkeypatch.setattr(mamba_stack, "run", lambda *given, run=mamba_stack.run: runs.append(1) or run(*given))
    backbone = make(dtype=torch.float32)
    x = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    expected = backbone(x)[0]
    checkpointed = Backbone(BackboneConfig(**{**backbone.config.to_dict(), "checkpoint_activations": "tight"}))
    checkpointed.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(checkpointed(x)[0], expected)
    assert len(runs) == 1
    hook = checkpointed.layers[1].mixer.register_forward_hook(lambda module, given, output: None)
    torch.testing.assert_close(checkpointed(x)[0], expected)  # block by block: the hook is called
    hook.remove()
    checkpointed.layers[1].dropout = nn.Dropout(0.5)
    checkpointed(x)
    assert len(runs) == 1
    with torch.no_grad():
        checkpointed(x)
    assert len(runs) == 1


def test_frozen_weights_get_no_gradient():
    backbone = make()
    frozen = backbone.layers[1].mixer.in_proj.weight.requires_grad_(False)
    layers = [mamba_stack.Layer(block.norm, block.mixer) for block in backbone.blocks]
    mamba_stack.run(layers, torch.ones(1, 5, 8, dtype=torch.float64), [None] * 3, None)[0].sum().backward()
    assert frozen.grad is None
    assert backbone.layers[0].mixer.in_proj.weight.grad.any()


def test_in_the_interpreter():
    assert_passes_interpreted(__file__, "-k", "triton")


@interpreted
def test_triton_kernels_agree():
    backbone = make(dtype=torch.float32)
    expected = results(backbone, False, True, False)
    for block in backbone.blocks:
        block.mixer.backend = block.norm.backend = "triton"
    check(results(backbone, True, True, False), expected, 1e-3, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_blocks_on_gpu(dtype, monkeypatch):
    gradients = {}
    for stacked in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(
            BackboneConfig(d_model=64, n_layers=4, checkpoint_activations="tight" if stacked else False)
        ).cuda()
        x = torch.randn(2, 3000, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, state = backbone(x)
        (y.square().sum() + sum(value.float().square().sum() for value in state.values())).backward()
        gradients[stacked] = {name: p.grad for name, p in backbone.named_parameters()}
    for name, value in gradients[False].items():
        error = (gradients[True][name] - value).norm() / value.norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.02), (name, error.item())
