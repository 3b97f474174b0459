import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from seqssm.data.audio import AudioBatch, AudioTaggingDataModule
from seqssm.data.audio.augment import AugmentConfig
from seqssm.data.audio.batches import SampleBatch
from seqssm.data.features import FeatureConfig, fbank
from seqssm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning on loaders without workers and on checkpoint folders
FEATURES = FeatureConfig(n_mels=16)
Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def one(name: str, seed: int = 0, seconds: float = 0.1, rate: int = 16000) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
        soundfile.write(path, data, rate, subtype="FLOAT")
        return path

    return one


@pytest.fixture
def table(tmp_path: Path, write: Writer) -> Path:
    """Sixty clips of three classes, two from each source."""
    rows = ["path,label,source"]
    for i in range(60):
        write(f"audio/{i}.wav", i, seconds=0.05 + 0.002 * i)
        rows.append(f"audio/{i}.wav,{'abc'[i // 2 % 3]},s{i // 2}")
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "clips.csv"


def module(path: Path, **changes: Any) -> AudioTaggingDataModule:
    return AudioTaggingDataModule(str(path), **{"features": FEATURES, "batch_size": 8, "augment": None, **changes})


def test_from_files_to_batches(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = module(table)
    assert data.labels == ["a", "b", "c"]
    assert data.multi_label is False
    data.prepare_data()
    data.setup("fit")
    assert {name: len(data.clips(name)) for name in ("train", "val", "test")} == {"train": 42, "val": 12, "test": 6}
    groups = {name: {clip.group for clip in data.clips(name)} for name in ("train", "val", "test")}
    assert not groups["train"] & (groups["val"] | groups["test"])
    mean, std = data.statistics
    raw = [fbank(torch.from_numpy(np.array(data.samples("train", i))), FEATURES) for i in range(42)]
    assert mean == pytest.approx(float(torch.cat(raw).mean()), abs=1e-4)
    assert std == pytest.approx(float(torch.cat(raw).std()), abs=1e-3)
    for split in ("val", "test"):
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
        at = 0
        for batch in loader:
            assert isinstance(batch, AudioBatch)
            for row, length, label in zip(batch.features, batch.lengths, batch.labels, strict=True):
                expected = (fbank(torch.from_numpy(np.array(data.samples(split, at))), FEATURES) - mean) / (2 * std)
                assert torch.allclose(row[:length], expected, atol=1e-5)
                assert not row[length:].any()
                assert data.labels[int(label)] == data.clips(split)[at].labels[0]
                at += 1
        assert at == len(data.clips(split))
    assert data.describe() == {
        "labels": ["a", "b", "c"],
        "multi_label": False,
        "features": {**FEATURES.to_dict(), "mean": mean, "std": std},
    }
    assert data.report is not None
    assert data.report.counts["train"] == {"a": 14, "b": 14, "c": 14}
    assert data.report.shared_sources == data.report.identical == {"val": 0, "test": 0}
    assert data.report.seconds["train"] == pytest.approx(sum(len(data.samples("train", i)) for i in range(42)) / 16000)
    json.dumps(data.report.to_dict())
    printed = capsys.readouterr().out
    assert "clips by class and split" in printed
    assert "split by sources at random, class by class" in printed
    data.setup("fit")
    assert not capsys.readouterr().out


def test_training_batches_and_the_ordered_train_loader(table: Path) -> None:
    data = module(table)
    (first, *rest) = list(data.train_dataloader())
    assert len(rest) == 4
    assert first.labels.dtype == torch.int64
    ordered = torch.cat([batch.labels for batch in data.ordered_loader("train")])
    assert [data.labels[i] for i in ordered] == [clip.labels[0] for clip in data.clips("train")]
    for labels, sources in ((b.labels, b.sources) for b in (first, *rest)):
        assert labels.tolist() == ordered[sources[:, 0]].tolist()
    mixed = next(iter(module(table, augment=AugmentConfig(mixup=1.0)).train_dataloader()))
    assert mixed.labels.shape == (8, 3)
    assert torch.allclose(mixed.labels.sum(1), torch.ones(8))


def test_features_on_the_device_are_those_of_the_loader(table: Path) -> None:
    settings = {"augment": AugmentConfig(), "seed": 3}
    here, there = module(table, **settings), module(table, features_on="device", **settings)
    for left, samples in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert isinstance(samples, SampleBatch)
        right = there.on_after_batch_transfer(samples, 0)
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert here.on_after_batch_transfer(left, 0) is left


def test_mixtures_are_a_multi_label_task(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = module(table, mix_clips=(1, 2))
    assert data.multi_label
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch.labels.sum(1).tolist() == [len(clip.labels) for clip in data.clips("val")[:8]]
    again = next(iter(module(table, mix_clips=(1, 2)).val_dataloader()))
    assert torch.equal(again.features, batch.features)
    assert "every item is a mixture of 1 to 2 clips of its split" in capsys.readouterr().out
    assert next(iter(data.train_dataloader())).labels.shape == (8, 3)


def test_labels_can_be_mapped_and_chosen(table: Path) -> None:
    assert module(table, label_map={"b": "a"}).labels == ["a", "c"]
    data = module(table, classes=["a", "c"])
    data.setup()
    assert data.labels == ["a", "c"]
    assert sum(len(data.clips(s)) for s in ("train", "val", "test")) == 40
    assert data.report is not None
    assert data.report.left_out["clips of other classes"] == 20
    assert sum(len(module(table, label_map={"b": None}).clips(s)) for s in ("train", "val", "test")) == 40


def test_labels_and_multi_label_need_no_audio(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("path,labels\na.wav,x;y\nb.wav,z\nc.wav,\n")
    data = module(tmp_path)
    assert data.labels == ["x", "y", "z"]
    assert data.multi_label


def test_train_clips_that_stand_in_test_are_left_out(tmp_path: Path, write: Writer) -> None:
    rows = ["path,label,split"]
    for i in range(12):
        write(f"{i}.wav", seed=i % 8 if i >= 8 else i)
        rows.append(f"{i}.wav,{'ab'[i % 2]},{'test' if i >= 10 else 'val' if i >= 8 else 'train'}")
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    data = module(tmp_path)
    data.setup("fit")
    assert data.report is not None
    assert [clip.path.name for clip in data.clips("train")] == ["4.wav", "5.wav", "6.wav", "7.wav"]
    assert data.report.left_out["train clips that also stand in validation or test"] == 4
    kept = module(tmp_path, drop_shared=False)
    kept.setup("fit")
    assert kept.report is not None
    assert kept.report.identical == {"val": 2, "test": 2}


class Recorder(LightningModule):
    """Learns nothing; writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[bytes] = []

    def training_step(self, batch: AudioBatch, _: int) -> torch.Tensor:
        self.seen.append(batch.features.numpy().tobytes() + batch.labels.numpy().tobytes())
        return (self.weight * batch.lengths.float().mean()).sum()

    def predict_step(self, batch: AudioBatch, _: int) -> torch.Tensor:
        return batch.labels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path: Path, **changes: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=tmp_path, max_epochs=2, num_sanity_val_steps=0, **quiet, **changes)


@pytest.mark.parametrize("features_on", ["loader", "device"])
def test_resumed_training_sees_what_an_uninterrupted_run_sees(table: Path, tmp_path: Path, features_on: str) -> None:
    def data() -> AudioTaggingDataModule:
        return module(table, augment=AugmentConfig(), balance=True, features_on=features_on)

    whole = Recorder()
    saver = ModelCheckpoint(tmp_path / "steps", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    trainer(tmp_path, callbacks=[saver]).fit(whole, datamodule=data())
    assert len(set(whole.seen)) == len(whole.seen) == 10
    for done in (3, 5, 7):
        rest = Recorder()
        trainer(tmp_path).fit(rest, datamodule=data(), ckpt_path=tmp_path / f"steps/step={done}.ckpt")
        assert rest.seen == whole.seen[done:]


def test_the_checkpoint_holds_plain_arguments_labels_and_features(table: Path, tmp_path: Path) -> None:
    fitter = trainer(tmp_path, limit_train_batches=1)
    data = module(table, augment=AugmentConfig(), mix_clips=(1, 2))
    fitter.fit(Recorder(), datamodule=data)
    fitter.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    stored = checkpoint["AudioTaggingDataModule"]
    assert stored["labels"] == ["a", "b", "c"]
    assert stored["features"] == data.features.to_dict()
    again = AudioTaggingDataModule(**checkpoint["datamodule_hyper_parameters"])
    assert again.settings == data.settings
    assert again.hparams["features"] == asdict(FEATURES)
    stored["features"]["mean"] += 0.5
    again.load_state_dict(stored)  # the statistics that the weights know
    assert again.features.mean == stored["features"]["mean"]
    with pytest.raises(UserError, match=r"trained on the classes \['a', 'z'\]"):
        again.load_state_dict({**stored, "labels": ["a", "z"]})
    with pytest.raises(UserError, match="trained with features"):
        again.load_state_dict({**stored, "features": {**stored["features"], "n_mels": 32}})


def test_the_command_line_builds_it_from_plain_settings(table: Path) -> None:
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    settings = {
        "path": str(table),
        "features": {"n_mels": 16, "sample_rate": 8000},
        "augment": {"mixup": 0.25, "noise_snr_db": [5, 10]},
        "mix_clips": [1, 2],
        "test_folds": [1],
        "label_map": {"b": None},
    }
    section = {"class_path": "seqssm.data.audio.datamodule.AudioTaggingDataModule", "init_args": settings}
    data = parser.instantiate_classes(parser.parse_object({"data": section})).data
    assert data.settings["features"] == FeatureConfig(n_mels=16, sample_rate=8000)
    assert data.settings["augment"] == AugmentConfig(mixup=0.25, noise_snr_db=(5, 10))
    assert data.settings["mix_clips"] == (1, 2)
    settings["augment"] = None
    plain = parser.instantiate_classes(parser.parse_object({"data": section})).data
    assert plain.settings["augment"] is None


def test_prediction_goes_over_the_test_clips_in_order(table: Path, tmp_path: Path) -> None:
    data = module(table)
    labels = torch.cat(trainer(tmp_path).predict(Recorder(), datamodule=data))  # type: ignore[arg-type]
    assert [data.labels[i] for i in labels] == [clip.labels[0] for clip in data.clips("test")]


def test_given_statistics_are_used_as_they_are(table: Path) -> None:
    given = FeatureConfig(n_mels=16, mean=-3.0, std=2.0)
    assert module(table, features=given).features == given


def test_skipped_clips_are_counted(table: Path, write: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    (table.parent / "audio" / "0.wav").write_text("broken")
    (table.parent / "audio" / "1.wav").unlink()
    with pytest.raises(UserError, match=r"1 files are missing .*1\.wav"):
        module(table).setup()
    data = module(table, skip_bad=True)
    data.setup("fit")
    assert sum(len(data.clips(s)) for s in ("train", "val", "test")) == 58
    printed = capsys.readouterr().out
    assert "left out: 2 unreadable clips" in printed
    assert "left out 2 unreadable clips; the first: " in printed


def test_bad_input_is_one_clear_line(table: Path, tmp_path: Path, write: Writer) -> None:
    def fails(message: str, path: Path, **changes: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            module(path, **changes).setup("fit")
        assert "\n" not in str(caught.value)

    def csv(name: str, *rows: str) -> Path:
        (tmp_path / name).write_text("\n".join(rows) + "\n")
        return tmp_path / name

    fails("has no clips of the classes zebra", table, classes=["a", "zebra"])
    fails("two classes or more, found .'a'.", table, classes=["a"])
    fails("label_map names 'zebra'", table, label_map={"zebra": "a"})
    fails("batch_size is 0", table, batch_size=0)
    fails("crop_s is -1", table, crop_s=-1)
    fails("mix_clips is .3, 2.", table, mix_clips=(3, 2))
    fails("nothing does not exist", table, noise_path=str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    fails("noise_path .*empty has no recordings", table, noise_path=str(tmp_path / "empty"))
    fails("has no fold", table, test_folds=[1])
    fails("must be positive and sum to 1", table, split_fractions={"train": 0.5, "test": 0.1})
    fails("'c' has 2 in test", table, min_class_clips=3)
    fails("does not exist", tmp_path / "gone")
    for i in range(4):
        write(f"{i}.wav", i)
    one_split = ["0.wav,a,train", "1.wav,b,train", "2.wav,a,test", "3.wav,a,test"]
    fails("'b' has 0 in test", csv("t.csv", "path,label,split", *one_split), val_fraction=0)
    all_test = [f"{i}.wav,{'ab'[i % 2]},test" for i in range(4)]
    fails(
        "has nothing to train on: change the split",
        csv("u.csv", "path,label,split", *all_test),
        features=FeatureConfig(mean=0, std=1),
    )
    two = csv("v.csv", "path,labels", "0.wav,a;b", "1.wav,a")
    fails("has 2 labels .1 such clips., but multi_label is false", two, multi_label=False)
    with pytest.raises(UserError, match="has no val split"):
        module(csv("w.csv", "path,label,split", *one_split), val_fraction=0, min_class_clips=0).clips("val")
