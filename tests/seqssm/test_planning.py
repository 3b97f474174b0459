"""Plans: lines through measured steps, and the command against a real step on the CPU."""

import pytest
import torch

from seqssm.cli import main
from seqssm.errors import UserError
from seqssm.longcontext.planning import Plan, Sample, make_plan

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
    assert "--length must be positive" in capsys.readouterr().err
    assert main(["plan", "--config", "dna/quickstart", "--", "--model.backbone.d_modell", "3"]) == 2
    assert "d_modell" in capsys.readouterr().err
