import math

import pytest
import torch
from torch import nn

from seqssm.backbone import BackboneConfig, LanguageModel, MixerSpec
from seqssm.optim import parameter_groups, rate_at, remember_shapes, warmup_cosine


def model() -> LanguageModel:
    mixers = {
        "m": MixerSpec(class_path="Mamba", init_args={"bias": True}),
        "2": MixerSpec(class_path="Mamba2", init_args={"headdim": 8}),
        "s": MixerSpec(class_path="S4D"),
        "a": MixerSpec(class_path="Attention"),
    }
    return LanguageModel(11, BackboneConfig(d_model=16, n_layers=4, mixers=mixers, pattern="m2sa", mlp_ratio=2))


def names_of(groups: list, model: nn.Module) -> list[set[str]]:
    name = {id(p): n for n, p in model.named_parameters()}
    return [{name[id(p)] for p in group["params"]} for group in groups]


def test_which_parameters_decay():
    net = model()
    groups = parameter_groups(net, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decay, keep = names_of(groups, net)
    assert decay | keep == {name for name, _ in net.named_parameters()}
    assert not decay & keep
    weights = (
        "in_proj.weight",
        "out_proj.weight",
        "x_proj.weight",
        "dt_proj.weight",
        "conv1d.weight",
        "embedding.weight",
    )
    assert all(name.endswith((*weights, "mixer.C")) for name in decay)
    for suffix in ("A_log", ".D", "dt_bias", "A_imag", "log_dt", "norm.weight", "bias"):
        assert any(name.endswith(suffix) for name in keep)
        assert not any(name.endswith(suffix) for name in decay)


def test_embeddings_are_spared_on_request():
    net = model()
    _, keep = names_of(parameter_groups(net, 0.1, decay_embeddings=False), net)
    assert "embedding.weight" in keep


def test_frozen_and_shared_parameters():
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    net["b"].weight = net["a"].weight
    groups = parameter_groups(net, 0.1)
    assert [len(group["params"]) for group in groups] == [1]
    net["a"].weight.requires_grad_(False)
    assert parameter_groups(net, 0.1) == []


def test_rate_rises_then_follows_a_cosine():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = warmup_cosine(optimizer, 4, 12, 0.1)
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[5] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 7))))
    assert rates[11:] == pytest.approx([0.2, 0.2, 0.2])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_schedules_at_their_limits():
    assert rate_at(0, 0, 1) == 1.0
    assert rate_at(0, 0, 10, 0.5) == 1.0
    assert rate_at(9, 0, 10, 0.5) == 0.5
    assert rate_at(3, 8, 4) == 0.5


def test_groups_are_those_from_before_sharding() -> None:
    module = model()
    before = {name: parameter.ndim for name, parameter in module.named_parameters()}
    sizes = [sum(p.numel() for p in group["params"]) for group in parameter_groups(module, 0.1)]
    remember_shapes(module)
    for submodule in module.modules():
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            setattr(submodule, name, nn.Parameter(parameter.detach().flatten()))  # as FSDP leaves its shards
    assert any(ndim > 1 for ndim in before.values())
    assert all(parameter.ndim == 1 for parameter in module.parameters())
    assert [sum(p.numel() for p in group["params"]) for group in parameter_groups(module, 0.1)] == sizes
