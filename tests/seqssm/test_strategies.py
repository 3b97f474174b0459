"""Training over several processes through the command line: data parallel, context parallel, a process lost."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from seqssm.cli import main
from seqssm.errors import UserError
from seqssm.longcontext.parallel import LengthSplit, split_mixers
from seqssm.longcontext.strategy import STARTED_BY, ContextParallelStrategy
from seqssm.mixers import Attention

CONFIG = """
seed_everything: 3
trainer:
  accelerator: cpu
  precision: 64-true
  max_epochs: 1
  limit_val_batches: 2
  num_sanity_val_steps: 0
  gradient_clip_val: 1.0
  enable_progress_bar: false
  logger: {{class_path: CSVLogger, init_args: {{save_dir: {folder}, name: null, version: ""}}}}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {{dirpath: {folder}, every_n_train_steps: 1, save_top_k: 0, save_last: true}}
model:
  class_path: DNAClassification
  init_args:
    backbone: {{d_model: 8, n_layers: 2, bidirectional: tied}}
    kmer: 3
data:
  class_path: SimulatedGenomes
  init_args: {{chromosome_bp: 4000, window_bp: 101, windows_per_epoch: 20, batch_size: {batch}}}
"""


def fit(folder: Path, *options: str, batch: int = 4, timeout: float = 400) -> subprocess.CompletedProcess:
    """Run ``seqssm fit`` in a process of its own; a strategy starts the others."""
    folder.mkdir()
    (folder / "own.yaml").write_text(CONFIG.format(folder=folder, batch=batch))
    command = [sys.executable, "-m", "seqssm", "fit", "--config", str(folder / "own.yaml"), *options]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), "."]),
    }
    root = Path(__file__).parents[2]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=timeout)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "last.ckpt", weights_only=True)
    assert content["global_step"] == 5
    return content["state_dict"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parallel_training_equals_one_process(tmp_path: Path) -> None:
    """Five steps in float64: one process with a batch of 4, two that share each sequence, two that share the batch."""
    runs = {
        "one": fit(tmp_path / "one", "--trainer.devices", "1"),
        "context": fit(tmp_path / "context", "--config", "trainer/context_parallel", "--trainer.devices", "2"),
        "ddp": fit(tmp_path / "ddp", "--config", "trainer/ddp", "--trainer.devices", "2", batch=2),
    }
    for name, result in runs.items():
        assert result.returncode == 0, f"{name}: {result.stderr[-3000:]}"
    one = weights(tmp_path / "one")
    for name in ("context", "ddp"):
        torch.testing.assert_close(weights(tmp_path / name), one, rtol=1e-7, atol=1e-9)
    # What the validation has measured over all processes is what one measures.
    last = {name: (tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "context")}
    assert last["one"][0] == last["context"][0]
    scores = {
        name: [float(x) for x in next(line for line in reversed(lines) if line.split(",")[2]).split(",") if x]
        for name, lines in last.items()
    }
    assert scores["context"] == pytest.approx(scores["one"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_process_stops_all_and_leaves_the_checkpoint_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lose = ["--trainer.callbacks+=lost_rank.LoseRank", "--trainer.callbacks.rank=1", "--trainer.callbacks.batch=3"]
    context = ["--config", "trainer/context_parallel", "--trainer.devices", "2"]
    result = fit(folder, *context, *lose)
    assert result.returncode != 0
    assert "the device fell off the bus" in result.stderr
    content = torch.load(folder / "last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    assert content["state_dict"]
    assert not [path for path in folder.iterdir() if path.suffix == ".ckpt" and path.name != "last.ckpt"]


@pytest.mark.parametrize("over", [False, True])
def test_a_process_ends_with_the_one_that_started_it(over: bool, tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(
        "import time\n"
        "from seqssm.longcontext.strategy import stop_with_parent\n"
        "event = stop_with_parent(0.1)\n"
        f"{'event.set()' if over else ''}\n"
        "print('up', flush=True)\n"
        f"time.sleep({2 if over else 300})\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, {str(tmp_path / 'child.py')!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", parent]
    # Standard error is read to its end, which is the child's.
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=200)
    assert result.returncode == -9
    message = "the first one has gone); all have stopped: start them again, from the last checkpoint"
    assert (message in result.stderr) is not over


def test_the_others_know_who_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(STARTED_BY, "")
    pl.Trainer(accelerator="cpu", devices=2, strategy=ContextParallelStrategy(), logger=False)
    assert os.environ[STARTED_BY] == str(os.getpid())
    monkeypatch.setenv(STARTED_BY, "")
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # undoes what the next line has Lightning set, which silences rank 0
    monkeypatch.setenv("LOCAL_RANK", "1")  # started by something else
    pl.Trainer(accelerator="cpu", devices=2, strategy=ContextParallelStrategy(), logger=False)
    assert not os.environ[STARTED_BY]


@pytest.mark.parametrize("name", ["bf16", "ddp", "fsdp", "context_parallel"])
def test_trainer_configs_parse(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "dna/quickstart", "--config", f"trainer/{name}", "--print_config"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    expected = {"bf16": "bf16-mixed", "ddp": "DDPStrategy", "fsdp": "FSDPStrategy"}
    assert expected.get(name, "ContextParallelStrategy") in out


def test_devices_that_do_not_group_are_refused() -> None:
    strategy = ContextParallelStrategy(context=2, parallel_devices=[torch.device("cpu")] * 3)
    with pytest.raises(UserError, match="a multiple of 2 devices on each machine, there are 3"):
        strategy.setup_environment()


@pytest.fixture
def alone(tmp_path: Path) -> LengthSplit:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1, timeout=timedelta(seconds=20)
    )
    yield LengthSplit()
    torch.distributed.destroy_process_group()


def test_what_cannot_be_split_is_refused(alone: LengthSplit) -> None:
    with pytest.raises(UserError, match="an attention layer looks at all tokens"):
        split_mixers(Attention(8, heads=2), alone)
    alone.size, alone.shortest = 4, 3
    assert alone.bounds(14) == (0, 3)
    with pytest.raises(UserError, match="a length of 11 cannot be split over 4 processes: each needs 3"):
        alone.bounds(11)
