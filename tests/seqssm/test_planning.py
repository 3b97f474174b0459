"""Plans: lines through measured steps, and the command against a real step on the CPU."""

import lightning.pytorch as pl
import pytest
import torch

from seqssm.backbone import BackboneConfig
from seqssm.cli import main
from seqssm.commands.plan import make_batch, make_step
from seqssm.data.features import FeatureConfig
from seqssm.errors import UserError
from seqssm.longcontext.planning import Plan, Sample, make_plan
from seqssm.tasks.dna import DNAClassification
from seqssm.tasks.tagging import AudioTagging

MIB = 2**20


def test_a_plan_follows_its_line() -> None:
    # What kernels work with has stopped growing at the second length: the first one does not count.
    samples = (Sample(100, 110 * MIB, 0.3), Sample(200, 300 * MIB, 0.5), Sample(300, 400 * MIB, 0.7))
    plan = Plan(samples, 1100 * MIB)
    assert plan.peak_bytes(1000) == pytest.approx(1100 * MIB)
    assert plan.seconds(1000) == pytest.approx(2.1)
    assert plan.longest == 1000
    flat = Plan((Sample(1, MIB, 0.1), Sample(2, MIB, 0.2)), 2 * MIB)
    assert flat.longest is None


def test_measured_memory_of_a_known_step() -> None:
    """A step that holds length MiB, written to, must be planned as one MiB a token, on top of what the process has."""

    def step(length: int) -> None:
        torch.ones(length, MIB // 4)

    plan = make_plan(step, [64, 128, 192], torch.device("cpu"))
    assert plan.peak_bytes(512) - plan.peak_bytes(0) == pytest.approx(512 * MIB, rel=0.05)
    assert 0 < plan.longest * MIB < plan.capacity_bytes


def test_too_few_lengths() -> None:
    with pytest.raises(UserError, match="two lengths to measure at"):
        make_plan(lambda length: None, [8, 8], torch.device("cpu"))


@pytest.mark.parametrize("multi_label", [False, True])
def test_steps_train_the_task_they_are_for(multi_label: bool) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, precision="bf16-mixed", gradient_clip_val=1.0)
    config = BackboneConfig(d_model=8, n_layers=1)
    tasks = [AudioTagging(["a", "b", "c"], multi_label, FeatureConfig(n_mels=16), config)]
    tasks += [DNAClassification(["a", "b", "c"], config, patch=2)]
    for task in tasks:
        seen = []
        task.register_forward_hook(lambda module, inputs, logits, seen=seen: seen.append((inputs[0].shape, logits)))
        make_step(trainer, task, lambda length, task=task: make_batch(task, 4, length, torch.device("cpu")))(32)
        (shape, logits) = seen[0]
        assert shape[:2] == (4, 32)
        assert logits.shape == (4, 3)
        assert logits.requires_grad


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_plan_command_checks_itself(capsys: pytest.CaptureFixture) -> None:
    args = ["plan", "--config", "dna/quickstart", "--length", "4096", "--check", "--", "--trainer.accelerator", "cpu"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert [word for word in ("measured", "predicted", "real") if word in out] == ["measured", "predicted", "real"]
    assert "4,096" in out
    assert "Predicted memory is off by" in out


def test_plan_command_refuses(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", "dna/quickstart", "--length", "0"]) == 2
    assert "--length: '0' is not a whole number from 1 on" in capsys.readouterr().err
    assert main(["plan", "--config", "dna/quickstart", "--", "--model.backbone.d_modell", "3"]) == 2
    assert "d_modell" in capsys.readouterr().err
