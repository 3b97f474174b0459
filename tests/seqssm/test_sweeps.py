"""A sequence in sweeps of chunks: the same as in one pass, from any interruption."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqssm.backbone import Backbone, BackboneConfig, MixerSpec
from seqssm.errors import UserError
from seqssm.sweeps import FolderStore, MemoryStore, Sweep, Sweeper

MIXERS = {
    "m": MixerSpec(class_path="Mamba", init_args={"d_state": 4}),
    "d": MixerSpec(class_path="Mamba2", init_args={"d_state": 4, "headdim": 8}),
    "s": MixerSpec(class_path="S4D", init_args={"d_state": 4}),
    "a": MixerSpec(class_path="Attention", init_args={"heads": 2, "window": 5}),
}
BACKBONES = {
    "causal": {"pattern": "mds", "mlp_ratio": 1.0},
    "causal with attention": {"pattern": "ma"},
    "two-way": {"pattern": "md", "bidirectional": "tied", "mlp_ratio": 1.0},
    "two-way untied": {"pattern": "ms", "bidirectional": "untied"},
    "strands": {"pattern": "md", "reverse_complement": True, "mlp_ratio": 1.0},
    "strands two-way": {"pattern": "m", "bidirectional": "tied", "reverse_complement": True},
}


def make(n_layers: int = 3, **settings) -> Backbone:
    torch.manual_seed(0)
    backbone = (
        Backbone(BackboneConfig(d_model=8, n_layers=n_layers, mixers=MIXERS, backend="torch", **settings))
        .double()
        .eval()
    )
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.mul_(4)  # so that layers matter to each other
    return backbone


def run(backbone: Backbone, x: Tensor, chunk: int, store=None, **options) -> Tensor:
    y = torch.full_like(x, torch.nan)

    def emit(start: int, end: int, part: Tensor) -> None:
        y[:, start:end] = part

    sweeper = Sweeper(backbone, x.shape[1], chunk, reverse=options.pop("reverse", False))
    sweeper.run(lambda a, b: x[:, a:b], emit, store or MemoryStore(), **options)
    return y


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("settings", BACKBONES.values(), ids=BACKBONES)
def test_sweeps_equal_one_pass(settings: dict, length: int, reverse: bool) -> None:
    backbone = make(**settings)
    x = torch.randn(1, length, backbone.d_out, dtype=torch.float64)
    with torch.no_grad():
        # Reading the other way round: flip, one pass, flip.
        expected = backbone(x.flip(1))[0].flip(1) if reverse else backbone(x)[0]
    for chunk in (8, 16, 64):
        y = run(backbone, x, chunk, reverse=reverse)
        torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("layers", "sweeps"), [(1, 2), (2, 3), (5, 6)])
def test_one_sweep_more_than_two_way_layers(layers: int, sweeps: int) -> None:
    assert len(Sweeper(make(layers, bidirectional="tied"), 10).sweeps) == sweeps
    assert Sweeper(make(layers), 10).sweeps == [Sweep(False, 0, layers)]
    assert Sweeper(make(layers), 10, reverse=True).sweeps == [Sweep(True, 0, layers)]


class Killed(Exception):
    pass


@pytest.mark.parametrize("settings", [BACKBONES["causal"], BACKBONES["two-way"], BACKBONES["strands two-way"]])
def test_interrupted_anywhere_gives_the_same_bytes(settings: dict, tmp_path: Path) -> None:
    backbone = make(**settings)
    x = torch.randn(1, 37, backbone.d_out, dtype=torch.float64)
    whole = run(backbone, x, 8)
    steps = 5 * len(Sweeper(backbone, 37, 8).sweeps)
    for stop in range(0, steps, 2):
        # A snapshot at every chunk, or only between sweeps: what was done since is done again.
        for snapshot_s in (0.0, 1e9):
            folder = tmp_path / f"{stop}-{snapshot_s}"
            y = torch.full_like(x, torch.nan)
            counter = itertools.count()

            def emit(start: int, end: int, part: Tensor, y: Tensor = y) -> None:
                y[:, start:end] = part

            def advance(positions: int, counter=counter, stop: int = stop) -> None:
                if next(counter) == stop:
                    raise Killed

            sweeper = Sweeper(backbone, 37, 8)
            with pytest.raises(Killed):
                sweeper.run(lambda a, b: x[:, a:b], emit, FolderStore(folder), advance, snapshot_s)
            done: list[int] = []
            Sweeper(backbone, 37, 8).run(lambda a, b: x[:, a:b], emit, FolderStore(folder), done.append, snapshot_s)
            assert torch.equal(y, whole)
            assert sum(done) == 37 * len(sweeper.sweeps)
            assert sorted(p.name for p in folder.iterdir()) == ["progress.safetensors"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="attention sees the whole sequence"):
        Sweeper(make(pattern="ma", bidirectional="tied"), 10)
    with pytest.raises(ValueError, match="evaluation mode"):
        Sweeper(make().train(), 10)
    store = FolderStore(tmp_path)
    (tmp_path / "progress.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="is damaged"):
        store.saved()
