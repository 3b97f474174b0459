"""Audio tagging: scores that padding and neighbours leave alone, training, thresholds, distillation."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch.utils.data import DataLoader

from seqssm import hub
from seqssm.backbone import BackboneConfig
from seqssm.data.audio.batches import AudioBatch
from seqssm.data.features import FeatureConfig
from seqssm.errors import UserError
from seqssm.tasks.audio_layers import FrameStem, MaskedBatchNorm
from seqssm.tasks.averaging import RunningAverage
from seqssm.tasks.base import OptimizerConfig, load_task, read_checkpoint
from seqssm.tasks.distillation import StoredTeacher, TeacherNetworks, find_teacher
from seqssm.tasks.tagging import AudioTagging
from seqssm.tasks.tagging_metrics import TaggingScores, best_thresholds, class_scores

MELS = 16
FEATURES = FeatureConfig(sample_rate=8000, n_mels=MELS, mean=-6.0, std=4.0)
LENGTHS = [37, 5, 96, 1, 64]


def make_task(pooling: str = "mean", bidirectional: str = "none", seed: int = 0, **changes) -> AudioTagging:
    torch.manual_seed(seed)
    settings = {"labels": ["a", "b", "c"], "multi_label": True, "features": FEATURES, "stem_channels": [4, 6, 6]}
    config = BackboneConfig(d_model=16, n_layers=2, bidirectional=bidirectional)
    task = AudioTagging(backbone=config, pooling=pooling, **{**settings, **changes})
    if pooling == "attention":
        torch.nn.init.normal_(task.pooling.attention.weight)
    for norm in task.stem.norms:  # as if trained
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    return task.eval()


def clips(lengths: list[int], seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, MELS, generator=generator) for length in lengths]


def batch_of(parts: list[torch.Tensor], extra: int = 0, fill: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, parts)) + extra
    padded = [F.pad(part, (0, 0, 0, longest - len(part)), value=fill) for part in parts]
    return torch.stack(padded), torch.tensor([len(part) for part in parts])


# ---- padding and neighbours -----------------------------------------------------------------------------------------


STEMS = [
    {"stem_downsampling": "stride"},
    {"stem_downsampling": "max"},
    {"stem_downsampling": "stride", "stem_depth": 2},
    {"stem_downsampling": "max", "stem_depth": 2},
]


@pytest.mark.parametrize("pooling", ["mean", "mean_max", "attention", "last"])
@pytest.mark.parametrize("bidirectional", ["none", "tied", "untied"])
@pytest.mark.parametrize("stem", STEMS)
@torch.no_grad()
def test_padding_and_neighbours_never_change_a_clip(pooling: str, bidirectional: str, stem: dict[str, Any]) -> None:
    task = make_task(pooling, bidirectional, **stem)
    parts = clips(LENGTHS)
    alone = torch.cat([task(part[None], torch.tensor([len(part)])) for part in parts])
    assert (alone[0] - alone[2]).abs().max() > 1e-3  # the clips do differ
    for extra, fill in ((0, 0.0), (7, 0.0), (33, 1e4), (2, float("nan"))):
        together = task(*batch_of(parts, extra, fill))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        turned = task(*batch_of(parts[::-1], extra, fill)).flip(0)
        torch.testing.assert_close(turned, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bidirectional", ["none", "tied"])
@torch.no_grad()
def test_frame_scores_of_a_padded_clip_are_its_own(bidirectional: str) -> None:
    task = make_task("attention", bidirectional)
    parts = clips(LENGTHS)
    together = task.frame_logits(*batch_of(parts, 9))
    assert together.shape == (5, -(-(96 + 9) // 4), 3)
    for row, part in zip(together, parts, strict=True):
        alone = task.frame_logits(part[None], torch.tensor([len(part)]))[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_mean_of_the_frame_scores_is_the_clip_score() -> None:
    task = make_task("mean")
    features, lengths = batch_of(clips([32]))
    torch.testing.assert_close(task(features, lengths), task.frame_logits(features, lengths).mean(1))


@torch.no_grad()
def test_a_causal_model_hears_the_past_alone_and_a_two_way_model_both() -> None:
    features = clips([64])[0][None]
    changed = features.clone()
    changed[:, 40:] += 1.0
    lengths = torch.tensor([64])
    for bidirectional, expected in (("none", True), ("tied", False)):
        task = make_task("mean", bidirectional)
        before, after = (task.frame_logits(x, lengths)[:, :10] for x in (features, changed))
        assert torch.equal(before, after) == expected


def test_batch_norm_leaves_padding_out_in_training() -> None:
    norm, plain = MaskedBatchNorm(3).train(), torch.nn.BatchNorm1d(3).train()
    x = torch.randn(2, 3, 5, 4)
    real = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    y = norm(x.masked_fill(~real[:, None, :, None], 99.0), real)
    positions = x.transpose(1, 2)[real]  # (7, 3, 4)
    torch.testing.assert_close(y.transpose(1, 2)[real], plain(positions))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_downsampling_by_maxima_is_a_dense_convolution_and_a_pool(causal: bool) -> None:
    stem = FrameStem(6, 8, 4, [3, 5], causal, "max").eval()
    features = torch.randn(1, 12, 6)
    x = features[:, None]
    for convolution in stem.convolutions:
        x = convolution(F.pad(x, (1, 1, 2, 0) if causal else (1, 1, 1, 1)))
        x = F.max_pool2d(F.pad(F.relu(x / (1 + 1e-5) ** 0.5), (0, x.shape[3] % 2)), 2)
    expected = stem.projection(x.transpose(1, 2).flatten(2))
    torch.testing.assert_close(stem(features, torch.tensor([12]))[0], expected)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_layer_of_several_convolutions(causal: bool) -> None:
    stem = FrameStem(6, 8, 4, [3, 5], causal, "max", depth=2).eval()
    features = torch.randn(1, 13, 6)  # the last group is not whole
    x = features[:, None]
    for i, convolution in enumerate(stem.convolutions):
        x = F.relu(convolution(F.pad(x, (1, 1, 2, 0) if causal else (1, 1, 1, 1))) / (1 + 1e-5) ** 0.5)
        x = F.max_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2) if i % 2 else x
    expected = stem.projection(x.transpose(1, 2).flatten(2))
    torch.testing.assert_close(stem(features, torch.tensor([13]))[0], expected)
    torch.testing.assert_close(stem(features, None)[0], expected)


def test_a_frame_group_of_too_many_strides_is_refused() -> None:
    with pytest.raises(UserError, match="stem_depth is 0"):
        FrameStem(16, 8, 4, [4, 4], causal=True, depth=0)
    with pytest.raises(UserError, match="frame_group 8 takes 3 layers"):
        FrameStem(16, 8, 8, [4, 4], causal=True)
    stem = FrameStem(16, 8, 6, [4, 4], causal=True)
    assert stem(torch.randn(1, 13, 16), torch.tensor([13]))[0].shape == (1, 3, 8)


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_scores_follow_scikit_learn_and_leave_out_classes_without_clips() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((60, 4)) < 0.3).astype(int)
    targets[:, 3] = 0
    scores = np.clip(targets * 0.2 + rng.random((60, 4)), 0, 1)
    metric = TaggingScores(4, multi_label=True)
    for part in np.array_split(np.arange(60), 3):
        metric.update(torch.tensor(scores[part]), torch.tensor(targets[part]))
    values = metric.compute()
    single = scores.astype(np.float32)
    expected = [average_precision_score(targets[:, c], single[:, c]) for c in range(3)]
    areas = [roc_auc_score(targets[:, c], single[:, c]) for c in range(3)]
    assert values["mAP"].item() == pytest.approx(np.mean(expected), abs=1e-6)
    assert values["mAUC"].item() == pytest.approx(np.mean(areas), abs=1e-6)
    normal = torch.distributions.Normal(0.0, 1.0)
    assert values["d_prime"].item() == pytest.approx(
        2**0.5 * normal.icdf(torch.tensor(np.mean(areas))).item(), abs=1e-4
    )
    table = class_scores(*metric.table())
    np.testing.assert_allclose(table.average_precision[:3], expected, atol=1e-6)
    assert table.average_precision[3].isnan()
    assert table.auroc[3].isnan()


def test_accuracy_of_one_label_a_clip() -> None:
    metric = TaggingScores(3, multi_label=False)
    metric.update(torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 0]))
    assert metric.compute()["accuracy"].item() == 0.75


def test_thresholds_have_the_best_f1() -> None:
    rng = np.random.default_rng(1)
    targets = (rng.random((40, 3)) < 0.4).astype(int)
    targets[:, 2] = 0
    scores = np.round(targets * 0.3 + rng.random((40, 3)) * 0.7, 1)  # with ties
    chosen = best_thresholds(torch.tensor(scores), torch.tensor(targets))
    for c in range(2):
        best = max(f1_score(targets[:, c], scores[:, c] >= t) for t in np.arange(-0.05, 1.05, 0.1))
        assert f1_score(targets[:, c], scores[:, c] >= chosen[c]) == pytest.approx(best)
    assert chosen[2] == 0.5


# ---- training -------------------------------------------------------------------------------------------------------


def tones(size: int, seed: int, multi_label: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Clips of noise with a louder band for each of their labels."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for i in range(size):
        features = torch.randn(24 + i % 9, MELS, generator=generator) * 0.5
        present = torch.rand(3, generator=generator) < 0.4 if multi_label else F.one_hot(torch.tensor(i % 3), 3).bool()
        for c in range(3):
            features[:, 5 * c : 5 * c + 4] += 1.0 * present[c]
        items.append((features, present.float() if multi_label else torch.tensor(i % 3)))
    return items


def collate(items) -> AudioBatch:
    features, lengths = batch_of([x for x, _ in items])
    return AudioBatch(features, lengths, torch.stack([label for _, label in items]))


def fit(task: AudioTagging, folder: Path, epochs: int = 4, callbacks: tuple = ()) -> pl.Trainer:
    train, val = (tones(n, seed, task.multi_label) for n, seed in ((48, 0), (24, 1)))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(folder, name=None, version=""),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loaders = [DataLoader(x, batch_size=8, collate_fn=collate, shuffle=i == 0) for i, x in enumerate((train, val))]
    pl.seed_everything(0, verbose=False)
    trainer.fit(task.train(), *loaders)
    return trainer


@pytest.mark.parametrize("multi_label", [True, False])
def test_learns_tones_and_keeps_thresholds_and_features_with_the_weights(multi_label: bool, tmp_path: Path) -> None:
    task = make_task("attention", multi_label=multi_label, optimizer=OptimizerConfig(lr=1e-2))
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_mAP", mode="max", filename="best")
    average = RunningAverage(decay=0.8)
    trainer = fit(task, tmp_path, epochs=6, callbacks=(checkpoint, average))
    assert trainer.callback_metrics["val_mAP"] > 0.97
    again = load_task(tmp_path / "best.ckpt", AudioTagging)
    assert again.features == FEATURES
    assert again.multi_label == multi_label
    # Thresholds are those of the averaged weights, which the checkpoint holds.
    batch = collate(tones(24, 1, multi_label))
    with torch.no_grad():
        probabilities = again.probabilities(again(batch.features, batch.lengths))
    targets = batch.labels.long() if multi_label else F.one_hot(batch.labels, 3)
    expected = best_thresholds(probabilities, targets)
    assert again.thresholds == pytest.approx(expected, abs=1e-4)
    assert again.thresholds != [0.5] * 3
    lightning = AudioTagging.load_from_checkpoint(tmp_path / "best.ckpt", map_location="cpu").eval()
    assert lightning.thresholds == again.thresholds
    table = (tmp_path / "per_class_val.csv").read_text().splitlines()
    assert table[0] == "label,clips,average_precision,auroc,threshold"
    assert [row.split(",")[0] for row in table[1:]] == ["a", "b", "c"]
    assert not (tmp_path / "confusion_val.png").exists()
    loader = DataLoader(tones(24, 1, multi_label), batch_size=8, collate_fn=collate)
    trainer.validate(again, loader, verbose=False)
    assert (tmp_path / "confusion_val.png").is_file() != multi_label


def test_two_way_attention_learns_one_label(tmp_path: Path) -> None:
    task = make_task("mean", "tied", multi_label=False, optimizer=OptimizerConfig(lr=1e-2))
    assert fit(task, tmp_path, epochs=5).callback_metrics["val_accuracy"] > 0.9


def test_mixed_targets_weigh_the_loss() -> None:
    task = make_task(multi_label=False)
    logits = torch.randn(4, 3)
    one, other = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    mixed = 0.7 * F.one_hot(one, 3) + 0.3 * F.one_hot(other, 3)
    expected = 0.7 * F.cross_entropy(logits, one) + 0.3 * F.cross_entropy(logits, other)
    torch.testing.assert_close(task.loss(logits, mixed), expected)
    torch.testing.assert_close(task.loss(logits, one), F.cross_entropy(logits, one))


# ---- distillation ---------------------------------------------------------------------------------------------------


class Clip:
    def __init__(self, path: str, start_s: float = 0.0) -> None:
        self.path, self.start_s = Path(path), start_s


def test_teacher_files(tmp_path: Path) -> None:
    training = [Clip("/data/set/audio/x.wav"), Clip("/data/set/audio/y.wav", 1.5)]
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "t.npy", table)
    (tmp_path / "t.csv").write_text("path,start,c,a,b\naudio/y.wav,1.5,5,3,4\naudio/x.wav,,2,0,1\nother.wav,0,9,9,9\n")
    for name in ("t.npy", "t.csv"):
        np.testing.assert_array_equal(StoredTeacher.read(tmp_path / name, training, ["a", "b", "c"]).logits, table)
    np.save(tmp_path / "short.npy", table[:1])
    for name, message in (("short.npy", r"has the shape \(1, 3\)"), ("none.csv", "does not exist")):
        with pytest.raises(UserError, match=message):
            StoredTeacher.read(tmp_path / name, training, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"no row for the training clip /data/set/audio/z\.wav"):
        StoredTeacher.read(tmp_path / "t.csv", [Clip("/data/set/audio/z.wav")], ["a", "b", "c"])
    with pytest.raises(UserError, match="has no column d"):
        StoredTeacher.read(tmp_path / "t.csv", training, ["a", "b", "d"])


@pytest.mark.parametrize("multi_label", [True, False])
def test_distillation_mixes_the_teacher_as_the_sounds_are_mixed(multi_label: bool) -> None:
    logits, teacher = torch.randn(2, 3), torch.randn(4, 3)
    batch = AudioBatch(
        torch.zeros(2, 4, MELS),
        torch.tensor([4, 4]),
        torch.zeros(2, 3),
        sources=torch.tensor([[0, 3], [2, -1]]),
        weights=torch.tensor([[0.6, 0.4], [1.0, 0.0]]),
    )
    loss = StoredTeacher(teacher).loss(logits, batch, 2.0, multi_label)
    soft = (teacher / 2).sigmoid() if multi_label else (teacher / 2).softmax(-1)
    targets = torch.stack([0.6 * soft[0] + 0.4 * soft[3], soft[2]])
    if multi_label:
        p = (logits / 2).sigmoid()
        expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    else:
        expected = -(targets * (logits / 2).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, 4 * expected)


@pytest.mark.parametrize("multi_label", [False, True])
def test_trained_taggers_teach_what_they_hear_in_the_batch(tmp_path: Path, multi_label: bool) -> None:
    names = []
    for seed, way in enumerate(("tied", "none")):
        taught = make_task(bidirectional=way, seed=seed, multi_label=multi_label)
        hub.save(tmp_path / way, taught.describe(), taught.state_dict())
        names.append(str(tmp_path / way))
    about = {"clips": list, "labels": ["a", "b", "c"], "features": FEATURES, "multi_label": multi_label}
    teacher = find_teacher(names, **about)
    assert isinstance(teacher, TeacherNetworks)
    features, lengths = batch_of(clips(LENGTHS))
    batch = AudioBatch(features, lengths, torch.zeros(5, 3))
    logits = torch.randn(5, 3, requires_grad=True)
    loss = teacher.loss(logits, batch, 2.0, multi_label)
    loss.backward()
    scored = [network(features, lengths) / 2 for network in teacher.networks]
    soft = sum(one.sigmoid() if multi_label else one.softmax(-1) for one in scored) / 2
    assert (soft[0] - soft[2]).abs().max() > 1e-3
    p = (logits / 2).sigmoid() if multi_label else (logits / 2).softmax(-1)
    # the gradient of a cross-entropy, times the squared temperature, halved by the inner derivative
    torch.testing.assert_close(logits.grad, 2 * (p - soft).detach() / (15 if multi_label else 5))
    with pytest.raises(UserError, match=r"none has the classes \['a', 'b', 'c'\], the model has \['a', 'b', 'd'\]"):
        find_teacher(names[1], **{**about, "labels": ["a", "b", "d"]})
    rounded = FeatureConfig(sample_rate=8000, n_mels=MELS, mean=-6.0 + 1e-7, std=4.0)
    assert find_teacher(names, **{**about, "features": rounded})
    with pytest.raises(UserError, match="has the features"):
        find_teacher(names, **{**about, "features": FeatureConfig(sample_rate=8000, n_mels=MELS, mean=-5.0, std=4.0)})
    with pytest.raises(UserError, match="empty list"):
        find_teacher([], **about)


def test_a_teacher_is_no_part_of_what_it_teaches(tmp_path: Path) -> None:
    teacher = make_task(multi_label=False, seed=3)
    hub.save(tmp_path / "teacher", teacher.describe(), teacher.state_dict())
    task = make_task(multi_label=False, teacher=[str(tmp_path / "teacher")], teacher_weight=1.0)
    before = set(task.state_dict())
    fit(task, tmp_path, epochs=1, callbacks=(pl.callbacks.ModelCheckpoint(tmp_path, filename="last"),))
    assert set(task.state_dict()) == before
    assert str(tmp_path) not in str(read_checkpoint(tmp_path / "last.ckpt").description)
    assert load_task(tmp_path / "last.ckpt", AudioTagging).teacher is None


def test_checkpoint_names_the_task(tmp_path: Path) -> None:
    task = make_task(multi_label=True)
    fit(task, tmp_path, epochs=1, callbacks=(pl.callbacks.ModelCheckpoint(tmp_path, filename="last"),))
    assert read_checkpoint(tmp_path / "last.ckpt").description["task"] == "seqssm.tasks.tagging.AudioTagging"
