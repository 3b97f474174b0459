"""The DNA task chunk by chunk: the answers, gradients and training of one pass, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.utils.data import DataLoader

from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.data import DNABatch
from seqssm.errors import UserError
from seqssm.tasks.base import OptimizerConfig
from seqssm.tasks.dna import DNAClassification

MIXERS = {
    "m": MixerSpec(class_path="seqssm.mixers.Mamba", init_args={"d_state": 4}),
    "s": MixerSpec(class_path="seqssm.mixers.S4D", init_args={"d_state": 8}),
    "a": MixerSpec(class_path="seqssm.mixers.Attention", init_args={"heads": 2}),
}


def make_task(backbone: dict | None = None, **changes) -> DNAClassification:
    config = {"d_model": 16, "n_layers": 2, "mixers": MIXERS, "pattern": "ms", "backend": "torch", **(backbone or {})}
    torch.manual_seed(0)
    task = DNAClassification(labels=["a", "b", "c"], backbone=BackboneConfig(**config), **changes)
    if task.embedding.kmer > 1:
        torch.nn.init.normal_(task.embedding.kmers.weight[:-1])
    return task


def random_batch(lengths: list[int], seed: int = 0) -> DNABatch:
    rng = np.random.default_rng(seed)
    tokens = torch.full((len(lengths), max(lengths)), 5, dtype=torch.uint8)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.from_numpy(rng.integers(0, 5, length))
    return DNABatch(tokens, torch.tensor(lengths), torch.arange(len(lengths)) % 3)


@pytest.mark.parametrize("chunk", [8, 16, 64])
@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "mean"},
        {"pooling": "max", "kmer": 3},
        {"pooling": "last", "motif": 7, "motif_layers": 2},
        {"pooling": "mean_max", "pool_bins": 3, "kmer": 9, "motif": 3},
        {"pooling": "mean_max", "patch": 2, "kmer": 4},
    ],
    ids=["mean", "max", "last", "bins", "patches"],
)
@pytest.mark.parametrize("lengths", [[77, 41, 3, 16, 1], [77, 77]], ids=["padded", "whole"])
def test_answers_and_gradients_equal_one_pass(settings: dict, chunk: int, lengths: list[int]) -> None:
    whole = make_task(**settings).double().train()
    chunked = make_task(**settings, chunk_length=chunk).double().train()
    chunked.load_state_dict(whole.state_dict())
    batch = random_batch(lengths)
    for task in (whole, chunked):
        task.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        torch.nn.functional.cross_entropy(task(batch.tokens, batch.lengths), batch.labels).backward()
    with torch.no_grad():
        for name in ("__call__", "predict_proba"):
            expected = getattr(whole, name)(batch.tokens, batch.lengths)
            torch.testing.assert_close(getattr(chunked, name)(batch.tokens, batch.lengths), expected, rtol=1e-6, atol=0)
    for (name, p), q in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


def train(task: DNAClassification, folder: Path, **settings) -> list[float]:
    pl.seed_everything(0, verbose=False)
    losses = Losses()
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=4,
        accelerator="cpu",
        logger=False,
        callbacks=[losses],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        **settings,
    )
    trainer.fit(task, DataLoader([random_batch([96, 70], seed) for seed in range(8)], batch_size=None))
    return losses.values


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trains_in_lightning_as_one_pass_does(tmp_path: Path, precision: str) -> None:
    optimizer = OptimizerConfig(lr=1e-2)
    whole = train(make_task(optimizer=optimizer), tmp_path, precision=precision)
    chunked = train(make_task(optimizer=optimizer, chunk_length=32), tmp_path, precision=precision)
    assert len(whole) == 8
    assert abs(whole[-1] - whole[1]) > 1e-2  # it moves
    np.testing.assert_allclose(chunked, whole, rtol=2e-5 if precision == "32-true" else 2e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_length": 3}, r"model\.chunk_length gives chunks of 3 positions, shorter than the convolution window"),
        ({"chunk_length": 12, "patch": 4}, "gives chunks of 3 positions"),
        ({"chunk_length": 9, "patch": 2}, r"give a multiple of model\.patch \(2\)"),
        ({"chunk_length": -8}, "is -8"),
        ({"chunk_length": 8, "chunk_kept": -1}, r"model\.chunk_kept is -1"),
        ({"chunk_length": 8, "positions": 64}, r"cannot go with model\.positions"),
        ({"chunk_length": 8, "standardize": True}, r"nor with model\.standardize"),
        (
            {"chunk_length": 8, "backbone": {"bidirectional": "tied"}},
            r"model\.chunk_length needs a backbone that reads",
        ),
        ({"chunk_length": 8, "backbone": {"pattern": "ma"}}, r"model\.chunk_length: layer 1 .* is Attention"),
    ],
)
def test_what_cannot_be_chunked_is_refused_when_the_task_is_built(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(**settings)


def test_a_sharded_strategy_is_refused_before_the_first_step() -> None:
    task = make_task(chunk_length=8)
    task._trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(UserError, match="a sharded strategy has given the weights back"):
        task.setup("fit")
