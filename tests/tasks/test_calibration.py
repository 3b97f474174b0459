"""Scale and bias of the logits: what is fitted, that a network then says it, and the command."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.cli import main
from seqssm.data import DNADataModule
from seqssm.tasks.calibration import fit_scaling, rescale
from seqssm.tasks.dna import DNAClassification
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.exporting import export_loaded
from seqssm.tasks.network import Loaded, load_network


def test_scale_and_bias_are_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
    scale, bias = fit_scaling((true - torch.tensor([0.5, 0.0, -0.5])) / 3, labels)
    assert scale == pytest.approx(3, rel=0.05)
    torch.testing.assert_close(bias, torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64), atol=0.06, rtol=0)
    weights = torch.where(labels == 2, 0.0, 1.0)  # a class without weight is never right
    _, bias = fit_scaling(true, labels, weights)
    assert bias[2] < -3


def make_task(**changes) -> DNAClassification:
    torch.manual_seed(0)
    mixers = {"m": MixerSpec(class_path="Mamba", init_args={"d_state": 4})}
    task = DNAClassification(
        ["a", "b"], BackboneConfig(d_model=8, n_layers=1, mixers=mixers, backend="torch"), **changes
    )
    torch.nn.init.normal_(task.head[-1].weight)
    if task.composition is not None:
        torch.nn.init.normal_(task.composition.table[:-1])
        torch.nn.init.normal_(task.composition.bias)
        task.composition.fitted.fill_(True)
    return task.eval()


@pytest.mark.parametrize("composition", [0, 3])
def test_a_rescaled_network_says_scaled_logits(composition: int) -> None:
    task = make_task(composition=composition)
    tokens, lengths = torch.randint(4, (3, 50), dtype=torch.uint8), torch.tensor([50, 30, 8])
    with torch.no_grad():
        before = task(tokens, lengths)
        rescale(task, 1.7, torch.tensor([0.4, -0.4], dtype=torch.float64))
        torch.testing.assert_close(task(tokens, lengths), 1.7 * before + torch.tensor([0.4, -0.4]))


def test_command_calibrates_on_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(400):
        label = i % 2
        sequence = "".join(rng.choice(list("ACGT"), 60, p=[0.3, 0.2, 0.2, 0.3] if label else [0.2, 0.3, 0.3, 0.2]))
        rows.append(f"{sequence},{'ab'[label]},{('train', 'val')[i // 2 % 2]}")
    (tmp_path / "data.csv").write_text("sequence,label,split\n" + "\n".join(rows) + "\n")
    data = DNADataModule(str(tmp_path / "data.csv"), index_dir=str(tmp_path), batch_size=32)
    task = make_task(composition=1)
    settings = {"class_path": "DNADataModule", "init_args": {"path": str(tmp_path / "data.csv")}}
    export_loaded(Loaded(task.describe(), task.state_dict(), {}), tmp_path / "before", "before")
    config = tmp_path / "data.yaml"
    config.write_text(f"data: {settings}")
    assert main(["calibrate", str(tmp_path / "before"), str(tmp_path / "after"), "--data", str(config)]) == 0
    said = re.search(r"log loss on 200 validation windows ([0-9.]+) -> ([0-9.]+)", capsys.readouterr().out)
    assert said is not None
    first, second = map(float, said.groups())
    data.setup()
    losses = []
    for name in ("before", "after"):
        network = load_network(tmp_path / name, DNANetwork)
        with torch.no_grad():
            parts = [(network.predict_proba(b.tokens, b.lengths), b.labels) for b in data.val_dataloader()]
        p, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        losses.append(float(torch.nn.functional.nll_loss(p.log(), labels)))
    assert losses[0] == pytest.approx(first, abs=1e-4)
    assert losses[1] == pytest.approx(second, abs=1e-3)  # strands are averaged behind the softmax
    assert losses[1] < losses[0] - 0.05
    longer = [str(tmp_path / "before"), str(tmp_path / "parts"), "--data", str(config), "--window-bp", "30"]
    assert main(["calibrate", *longer]) == 0
    assert "log loss on 400 validation windows" in capsys.readouterr().out  # two of 30 bp in each of 60
