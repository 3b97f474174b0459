"""The k-mer regression inside a DNA classifier: the answers of the baseline it is made of, and it stays as it is."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.data import DNADataModule
from seqssm.data.dna.alphabet import PAD
from seqssm.errors import UserError
from seqssm.tasks import composition as module
from seqssm.tasks.averaging import RunningAverage
from seqssm.tasks.base import OptimizerConfig, load_task
from seqssm.tasks.baselines import CompositionRegression, Windows
from seqssm.tasks.composition import Composition
from seqssm.tasks.dna import DNAClassification


def windows(n: int, classes: int, seed: int) -> Windows:
    """Sequences of 60 to 90 bases, some of them N, whose bases are drawn by class."""
    rng = np.random.default_rng(seed)
    shares = np.random.default_rng(0).dirichlet([3.0] * 4, classes)
    labels = np.arange(n) % classes
    sequences = [rng.choice(4, rng.integers(60, 91), p=shares[label]).astype(np.uint8) for label in labels]
    for sequence in sequences:
        sequence[rng.random(len(sequence)) < 0.03] = 4
    return Windows(sequences, labels)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("k", [2, 3])
def test_its_probabilities_are_those_of_the_regression(classes: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    regression = CompositionRegression("k-mers", [(k,)], classes)
    regression.fit(windows(90, classes, 1), windows(30, classes, 2))
    _, mean, scale, fitted = regression.chosen
    composition = Composition(k, classes)
    assert not composition.fitted
    composition.take(mean, scale, fitted)
    assert composition.fitted
    test = windows(20, classes, 3)
    expected = regression.predict_proba(test)
    assert expected.std(axis=0).max() > 0.05  # there is something to compare
    lengths = torch.from_numpy(test.lengths)
    tokens = torch.randint(0, 4, (20, 100)).to(torch.uint8)  # what stands behind the end must not count
    for row, sequence in zip(tokens, test.sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence)
    for piece in (1 << 22, 16):
        monkeypatch.setattr(module, "PIECE_BP", piece)
        found = composition(tokens, lengths).softmax(-1)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    nothing = composition(torch.full((1, 9), PAD, dtype=torch.uint8), torch.tensor([1]))
    torch.testing.assert_close(nothing, composition.bias[None])


def table(path: Path) -> Path:
    parts = {"train": windows(120, 2, 4), "val": windows(40, 2, 5), "test": windows(40, 2, 6)}
    rows = [
        f"{''.join('ACGTN'[token] for token in sequence)},{'ab'[label]},{split}"
        for split, part in parts.items()
        for sequence, label in zip(part.sequences, part.labels, strict=True)
    ]
    path.write_text("sequence,label,split\n" + "\n".join(rows) + "\n")
    return path


def make_task(**changes) -> DNAClassification:
    torch.manual_seed(0)
    mixers = {"m": MixerSpec(class_path="Mamba", init_args={"d_state": 4})}
    backbone = BackboneConfig(d_model=8, n_layers=1, mixers=mixers, bidirectional="tied", backend="torch")
    return DNAClassification(["a", "b"], backbone, composition=3, optimizer=OptimizerConfig(lr=1e-2), **changes)


def trainer(folder: Path, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_it_is_fitted_before_the_first_step_and_not_again(tmp_path: Path) -> None:
    data = DNADataModule(str(table(tmp_path / "data.csv")), batch_size=16, index_dir=str(tmp_path))
    task = make_task()
    training = trainer(tmp_path, 1)
    training.fit(task, data)
    alone = CompositionRegression("k-mers", [(3,)], 2).fit(
        Windows.read(data.grid("train")), Windows.read(data.grid("val"))
    )
    expected = Composition(3, 2)
    expected.take(*alone.chosen[1:])
    assert task.composition is not None
    torch.testing.assert_close(task.composition.table, expected.table)
    torch.testing.assert_close(task.composition.bias, expected.bias)
    assert not {name for name, _ in task.named_parameters() if name.startswith("composition")}

    path = tmp_path / "one.ckpt"
    training.save_checkpoint(path)
    loaded = load_task(path, DNAClassification)
    torch.testing.assert_close(loaded.composition.table, expected.table)
    marked = torch.load(path, weights_only=True)
    marked["state_dict"]["composition.bias"] += 1.0  # what is resumed is not fitted anew
    torch.save(marked, path)
    resumed = make_task()
    trainer(tmp_path, 2).fit(resumed, data, ckpt_path=path, weights_only=True)
    torch.testing.assert_close(resumed.composition.bias, expected.bias + 1.0)


def test_alone_it_needs_no_network(tmp_path: Path) -> None:
    data = DNADataModule(str(table(tmp_path / "data.csv")), batch_size=16, index_dir=str(tmp_path))
    task = make_task(composition_only=True)
    untouched = {name: weight.clone() for name, weight in task.named_parameters()}
    saving = ModelCheckpoint(tmp_path, monitor="val_mcc", mode="max", filename="best")
    training = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=1,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[saving, RunningAverage(0.9)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    training.fit(task, data)
    loaded = load_task(tmp_path / "best.ckpt", DNAClassification)  # of the running average, which has the table, too
    regression = CompositionRegression("k-mers", [(3,)], 2).fit(
        Windows.read(data.grid("train")), Windows.read(data.grid("val"))
    )
    test = Windows.read(data.grid("test"))
    batch = next(iter(data.test_dataloader()))
    torch.nn.init.normal_(loaded.head[1].weight)  # not asked
    with torch.no_grad():
        found = loaded.predict_proba(batch.tokens, batch.lengths)
    np.testing.assert_allclose(found, regression.predict_proba(test)[: len(found)], atol=1e-5)
    torch.testing.assert_close(loaded.score(torch.ones(2, 8)), torch.zeros(2, 2))  # tracks and variants ask this
    for name, weight in task.named_parameters():
        assert torch.equal(weight, untouched[name]), name


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.composition_only needs model\.composition"):
        DNAClassification(["a", "b"], composition_only=True)
    with pytest.raises(UserError, match=r"model\.composition is 9: it must be 1 to 8"):
        DNAClassification(["a", "b"], composition=9)
    (tmp_path / "data.csv").write_text(table(tmp_path / "all.csv").read_text().replace(",val", ",test"))
    data = DNADataModule(str(tmp_path / "data.csv"), val_fraction=0, index_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"model\.composition chooses its penalty on validation windows"):
        trainer(tmp_path, 1).fit(make_task(), data)
