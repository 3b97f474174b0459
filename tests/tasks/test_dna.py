"""The DNA task: what may not change an answer, what must, and that training resumes exactly."""

import gzip
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from seqssm import hub
from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.data import DNABatch, DNADataModule
from seqssm.data.dna.alphabet import encode, reverse_complement
from seqssm.errors import UserError
from seqssm.tasks.base import OptimizerConfig, Task, load_task, read_checkpoint
from seqssm.tasks.dna import DNAClassification
from seqssm.tasks.dna_layers import Pooling, kmer_ids

MAMBA = {"m": MixerSpec(class_path="seqssm.mixers.Mamba", init_args={"d_state": 4})}


def make_task(**changes) -> DNAClassification:
    backbone = {"d_model": 16, "n_layers": 2, "mixers": MAMBA, "pattern": "m", **changes.pop("backbone", {})}
    torch.manual_seed(0)
    return DNAClassification(labels=["a", "b", "c"], backbone=BackboneConfig(**backbone), **changes).eval()


def random_batch(lengths: list[int], seed: int = 0) -> DNABatch:
    rng = np.random.default_rng(seed)
    tokens = torch.full((len(lengths), max(lengths)), 5, dtype=torch.uint8)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.from_numpy(rng.integers(0, 5, length))
    return DNABatch(tokens, torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.long))


BACKBONES = {
    "causal": {},
    "two-way": {"bidirectional": "tied"},
    "two-way untied": {"bidirectional": "untied"},
    "strands": {"bidirectional": "tied", "reverse_complement": True},
    "hybrid": {
        "mixers": {**MAMBA, "a": MixerSpec(class_path="seqssm.mixers.Attention", init_args={"heads": 2})},
        "pattern": "ma",
        "bidirectional": "tied",
    },
}


POOLINGS = {
    "mean": {"pooling": "mean"},
    "last": {"pooling": "last"},
    "bins": {"pooling": "mean_max", "pool_bins": 3, "motif": 5, "positions": 64},
    "motif layers": {"pooling": "mean_max", "motif": 6, "motif_layers": 2},
}


@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_padding_and_neighbours_change_nothing(backbone: dict, pooling: dict) -> None:
    task = make_task(backbone=backbone, **pooling).double()
    batch = random_batch([37, 64, 5, 2])
    together = task.predict_proba(batch.tokens, batch.lengths)
    for i, length in enumerate(batch.lengths):
        alone = task.predict_proba(batch.tokens[i : i + 1, :length], batch.lengths[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("patch", "kmer"), [(8, 1), (8, 3)])
def test_patches_are_the_means_of_their_embeddings(patch: int, kmer: int) -> None:
    task = make_task(backbone=BACKBONES["two-way"], patch=patch, kmer=kmer).double()
    if kmer > 1:
        torch.nn.init.normal_(task.embedding.kmers.weight[:-1])
    batch = random_batch([37, 64, 5])
    embedded = task.embedding(batch.tokens, batch.lengths)
    for row, tokens, length in zip(embedded, batch.tokens, batch.lengths.tolist(), strict=True):
        single = task.embedding.bases(tokens[:length].long())
        if kmer > 1:
            single = single + task.embedding.kmers(kmer_ids(tokens[None, :length], kmer))[0]
        expected = torch.stack([piece.mean(0) for piece in single.split(patch)])
        torch.testing.assert_close(row[: len(expected)], expected)
    together = task(batch.tokens, batch.lengths)
    for i, length in enumerate(batch.lengths):
        alone = task(batch.tokens[i : i + 1, :length], batch.lengths[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


def test_standardized_patches_have_mean_0_and_variance_1_over_real_positions() -> None:
    task = make_task(backbone=BACKBONES["two-way"], patch=8, standardize=True).train()
    batch = random_batch([37, 64, 5])
    embedded = task.embedding(batch.tokens, batch.lengths)
    real = torch.arange(8) < torch.tensor([5, 8, 1])[:, None]
    torch.testing.assert_close(embedded[real].mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(embedded[real].var(0, unbiased=False), torch.ones(16), atol=1e-2, rtol=0)
    assert not embedded[~real].any()
    task.eval()
    together = task(batch.tokens, batch.lengths)
    alone = task(batch.tokens[:1, :37], batch.lengths[:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
@pytest.mark.parametrize("kmer", [1, 3])
def test_strand_equivariant_backbone_gives_both_strands_one_answer(pooling: dict, kmer: int) -> None:
    task = make_task(backbone=BACKBONES["strands"], kmer=kmer, **pooling)
    for name, parameter in task.embedding.named_parameters():
        if name in ("kmers.weight", "places"):
            torch.nn.init.normal_(parameter)
    batch = random_batch([37, 64])
    other = reverse_complement(batch.tokens, batch.lengths)
    torch.testing.assert_close(task(batch.tokens, batch.lengths), task(other, batch.lengths), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backbone", ["causal", "two-way"])
def test_motifs_are_a_convolution_over_bases(backbone: str) -> None:
    task = make_task(backbone=BACKBONES[backbone], motif=4)
    batch = random_batch([20])
    with torch.no_grad():
        motifs = task.embedding(batch.tokens, batch.lengths)[0] - task.embedding.bases(batch.tokens[0].long())
    weight = task.embedding.motifs.weight  # (d, 4, 4)
    before = 3 if backbone == "causal" else 2
    for t in range(20):
        expected = torch.zeros(16)
        for j in range(4):
            at = t - before + j
            if 0 <= at < 20 and batch.tokens[0, at] < 4:
                expected += weight[:, int(batch.tokens[0, at]), j].detach()
        torch.testing.assert_close(motifs[t], expected)


def test_positions_are_told_apart_and_longer_windows_refused() -> None:
    task = make_task(positions=20)
    batch = random_batch([20])
    plain = task.embedding(batch.tokens, batch.lengths)
    torch.nn.init.normal_(task.embedding.places)
    torch.testing.assert_close(task.embedding(batch.tokens, batch.lengths) - plain, task.embedding.places[None])
    batch = random_batch([21])
    with pytest.raises(UserError, match="21 bp is longer than the model's 20 positions"):
        task(batch.tokens, batch.lengths)
    message = r"sequence 2: 21 bp, and this model answers for aligned windows of up to 20 bp .* --window-bp 20"
    with pytest.raises(UserError, match=message):
        task.predict(["A" * 20, "A" * 21])


def test_bins_are_pooled_each_by_itself() -> None:
    y = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(0))
    parts = [y[0, :3], y[0, 3:5], y[0, 5:7]]  # 7 positions in 3 bins: where floor(3 t / 7) changes
    means, peaks = [p.mean(0) for p in parts], [p.amax(0) for p in parts]
    pooled = Pooling("mean_max", bins=3)(y, torch.tensor([7]))
    torch.testing.assert_close(pooled[0], torch.cat(means + peaks))
    whole = Pooling("mean_max")(y, torch.tensor([7]))
    torch.testing.assert_close(whole[0], torch.cat([y[0].mean(0), y[0].amax(0)]))


def test_members_answer_with_their_mean_and_learn_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"backbone": BACKBONES["two-way"], "pooling": "mean_max", "pool_bins": 3, "average_strands": False}
    task = make_task(**settings, members=3)
    singles = [make_task(**settings) for _ in range(3)]
    for i, single in enumerate(singles):
        prefix = f"others.{i - 1}." if i else ""
        single.load_state_dict({key: task.state_dict()[prefix + key] for key in single.state_dict()})
    assert not torch.equal(singles[0].head[1].weight, singles[1].head[1].weight)
    batch = random_batch([37, 64, 5])
    batch = batch._replace(labels=torch.tensor([0, 2, 1]))
    apart = [single.predict_proba(batch.tokens, batch.lengths) for single in singles]
    torch.testing.assert_close(task.predict_proba(batch.tokens, batch.lengths), sum(apart) / 3)  # type: ignore[arg-type]
    monkeypatch.setattr(task, "log", lambda *args, **settings: None)
    loss = task.training_step(batch, 0)
    assert loss is not None
    loss.backward()
    losses = [
        torch.nn.functional.cross_entropy(single(batch.tokens, batch.lengths), batch.labels) for single in singles
    ]
    torch.testing.assert_close(loss, sum(losses) / 3)  # type: ignore[arg-type]
    losses[2].backward()
    gradients = zip(task.others[1].named_parameters(), singles[2].parameters(), strict=True)
    for (name, one), other in gradients:
        torch.testing.assert_close(one.grad, other.grad / 3, msg=lambda text, name=name: f"{name}: {text}")
    with pytest.raises(UserError, match=r"this model has several \(model\.members\)"):
        task.check_unaligned()
    with pytest.raises(UserError, match=r"model\.members is 2: it must be .* 1 with model\.composition"):
        make_task(members=2, composition=3)


def test_members_start_from_a_checkpoint_but_for_their_heads(tmp_path: Path) -> None:
    old = make_task(members=2)
    hub.save(tmp_path / "old", old.describe(), old.state_dict())
    torch.manual_seed(1)
    new = DNAClassification(["x", "y"], old.backbone_config, members=2, init_from=str(tmp_path / "old"))
    for key, weight in new.state_dict().items():
        assert torch.equal(weight, old.state_dict()[key]) != ("head" in key), key


def test_kmer_ids_against_string_slices() -> None:
    text = "ACGTNACCA"
    tokens = torch.from_numpy(encode(text).copy())[None]
    value = {"A": 0, "C": 1, "G": 2, "T": 3}
    for k in (1, 2, 4, 12):
        for reverse in (False, True):
            expected = []
            for t in range(len(text)):
                kmer = text[t : t + k] if reverse else text[max(t - k + 1, 0) : t + 1][::-1]
                whole = len(kmer) == k and "N" not in kmer
                expected.append(sum(value[c] * 4**i for i, c in enumerate(kmer)) if whole else 4**k)
            assert kmer_ids(tokens, k, reverse)[0].tolist() == expected


def test_strand_average_is_the_mean_of_both_strands() -> None:
    task, batch = make_task(), random_batch([37, 64])
    other = reverse_complement(batch.tokens, batch.lengths)
    one, two = (task(tokens, batch.lengths).softmax(-1) for tokens in (batch.tokens, other))
    assert (one - two).abs().max() > 1e-4  # the strands disagree by themselves
    torch.testing.assert_close(task.predict_proba(batch.tokens, batch.lengths), (one + two) / 2)
    torch.testing.assert_close(task.predict_proba(other, batch.lengths), (one + two) / 2)


# ---- training on a small table --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, dev and test tables: class 1 holds TATAAA somewhere, class 0 does not."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    for name, size in (("train", 96), ("dev", 32), ("test", 32)):
        lines = ["sequence,label"]
        for i in range(size):
            bases = rng.choice(list("ACG"), 40)
            if i % 2:
                bases[10:16] = list("TATAAA")
            lines.append(f"{''.join(bases)},{i % 2}")
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def make_data(table: Path, **changes) -> DNADataModule:
    return DNADataModule(path=str(table), batch_size=16, index_dir=str(table / "index"), **changes)


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


def fit(task: Task, data: DNADataModule, folder: Path, epochs: int, ckpt: str | None = None, stop: int = -1) -> Losses:
    pl.seed_everything(0, verbose=False)
    losses = Losses()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[losses, ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=3)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=data, ckpt_path=ckpt)
    return losses


def small_task() -> DNAClassification:
    torch.manual_seed(0)
    config = BackboneConfig(d_model=16, n_layers=2, mixers=MAMBA, pattern="m", bidirectional="tied", dropout=0.1)
    return DNAClassification(
        labels=["0", "1"], backbone=config, class_weights="balanced", optimizer=OptimizerConfig(lr=1e-2)
    )


def test_learns_a_motif_and_loads_again(table: Path, tmp_path: Path) -> None:
    task, data = small_task(), make_data(table, rc_probability=0.0)
    losses = fit(task, data, tmp_path, epochs=16)
    assert np.mean(losses.values[-6:]) < 0.35 < 0.6 < losses.values[0]
    checkpoint = max(tmp_path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    again = load_task(checkpoint, DNAClassification)
    batch = random_batch([40, 40])
    step = int(checkpoint.stem.split("step=")[1])
    assert step == 96
    torch.testing.assert_close(again.predict_proba(batch.tokens, batch.lengths), task.eval().predict_proba(*batch[:2]))
    assert read_checkpoint(checkpoint).data["class_path"] == "seqssm.data.dna.datamodule.DNADataModule"
    lightning = DNAClassification.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    torch.testing.assert_close(lightning(*batch[:2]), again(*batch[:2]))


@pytest.mark.parametrize("step", [6, 9], ids=["at the end of an epoch", "inside an epoch"])
def test_resumed_run_equals_an_uninterrupted_one(table: Path, tmp_path: Path, step: int) -> None:
    whole = fit(small_task(), make_data(table), tmp_path / "whole", epochs=3)
    assert len(whole.values) == 18
    checkpoint = next((tmp_path / "whole").glob(f"*step={step}.ckpt"))
    resumed = fit(small_task(), make_data(table), tmp_path / "resumed", epochs=3, ckpt=str(checkpoint))
    assert resumed.values == whole.values[step:]


def test_init_from_loads_the_backbone_and_leaves_a_new_head(table: Path, tmp_path: Path) -> None:
    source = small_task()
    fit(source, make_data(table), tmp_path, epochs=1)
    checkpoint = str(next(tmp_path.glob("*step=6.ckpt")))
    task = DNAClassification(labels=["x", "y", "z"], backbone=source.backbone_config, init_from=checkpoint)
    trained = read_checkpoint(checkpoint).weights
    for name, value in task.state_dict().items():
        if name.startswith(("backbone.", "embedding.")):
            torch.testing.assert_close(value, trained[name])
    with pytest.raises(UserError, match="do not fit this model"):
        DNAClassification(labels=["x", "y"], backbone=BackboneConfig(d_model=32, n_layers=2), init_from=checkpoint)


def test_checkpoint_of_nothing_known(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK not a checkpoint")
    with pytest.raises(UserError, match=r"broken\.ckpt: not a readable checkpoint"):
        read_checkpoint(broken)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of a seqssm task"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "missing")
