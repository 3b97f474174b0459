from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from seqssm.data.features import FeatureConfig, fbank
from seqssm.data.speech import (
    SpeechAugmentConfig,
    SpeechBatch,
    SpeechDataModule,
    TextConfig,
    TokenizerConfig,
    tokenizer_from_dict,
)
from seqssm.data.speech.augment import change_speed, draw_masks, join
from seqssm.data.speech.sampling import cut
from seqssm.errors import UserError

RATE = 16_000
WORDS = ("one", "two", "three", "four")
FEATURES = FeatureConfig(n_mels=20)
KNOWN = replace(FEATURES, mean=-8.0, std=3.0)

Corpus = Callable[..., Path]


def tone(seconds: float, seed: int, rate: int = RATE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * time) + 0.01 * rng.standard_normal(len(time))).astype(
        "f4"
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """24 utterances of 0.5 to 2 s: 16 train, 4 val, 4 test, of 8 speakers."""

    def make(name: str = "corpus", texts: dict[int, str] | None = None, seed: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        lines = ["path\ttext\tspeaker\tsplit"]
        rng = np.random.default_rng(seed)
        for i in range(24):
            soundfile.write(folder / f"{i}.wav", tone(0.5 + 1.5 * rng.random(), 100 * seed + i), RATE)
            text = (texts or {}).get(i, " ".join(rng.choice(WORDS, 2)).capitalize() + ".")
            split = "train" if i < 16 else "val" if i < 20 else "test"
            lines.append(f"{i}.wav\t{text}\tspeaker {i // 3}\t{split}")
        (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
        return folder

    return make


def module(path: Path, **settings: object) -> SpeechDataModule:
    return SpeechDataModule(str(path), **{"features": KNOWN, "batch_seconds": 12.0, "max_utterance_s": 5.0, **settings})  # type: ignore[arg-type]


def same(first: SpeechBatch, second: SpeechBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_ordered_batches_hold_each_utterance_as_it_is(corpus: Corpus) -> None:
    data = module(corpus())
    data.setup("test")
    utterances = data.utterances("test")
    assert [one.path.name for one in utterances] == ["20.wav", "21.wav", "22.wav", "23.wav"]
    assert utterances[0].written[0].isupper()
    at = 0
    for batch in data.test_dataloader():
        assert batch.features.shape[1] == int(batch.lengths.max())
        for row in range(len(batch.lengths)):
            samples = torch.from_numpy(np.array(data.samples("test", at)))
            alone = fbank(samples, KNOWN)
            assert int(batch.lengths[row]) == len(alone)
            torch.testing.assert_close(batch.features[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)
            assert not batch.features[row, len(alone) :].any()
            count = int(batch.token_lengths[row])
            assert data.tokenizer.decode(batch.tokens[row, :count].tolist()) == utterances[at].text
            assert not batch.tokens[row, count:].any()
            at += 1
    assert at == 4
    assert utterances[0].text == utterances[0].written.lower().rstrip(".")


def test_statistics_and_description_rebuild_the_same_data(corpus: Corpus) -> None:
    path = corpus()
    data = module(path, features=FEATURES)
    description = data.describe()
    values = torch.cat([
        fbank(torch.from_numpy(np.array(data.samples("train", i))), FEATURES) for i in range(16)
    ])  # fmt: skip
    assert data.features.mean == pytest.approx(float(values.double().mean()))
    assert data.features.std == pytest.approx(float(values.double().std()), rel=1e-3)
    again = module(
        path,
        features=FeatureConfig(**description["features"]),
        text=TextConfig(**description["text"]),
        tokenizer=TokenizerConfig(stored=description["tokenizer"]),
    )
    assert same(next(iter(again.test_dataloader())), next(iter(data.test_dataloader())))
    again.load_state_dict(data.state_dict())
    with pytest.raises(UserError, match="trained with another tokenizer"):
        module(
            path, tokenizer=TokenizerConfig(stored={"kind": "characters", "characters": " eforhntuw"})
        ).load_state_dict(data.state_dict())
    assert tokenizer_from_dict(description["tokenizer"]).tokens == sorted(set(" onetwothreefour"))


def test_tokens_need_no_recordings(corpus: Corpus) -> None:
    path = corpus()
    for file in path.glob("*.wav"):
        file.unlink()
    data = module(path)
    assert data.tokenizer.size == len(set(" onetwothreefour"))
    with pytest.raises(UserError, match=r"24 recordings are missing .*0.wav"):
        data.setup("fit")


# ---- training --------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_utterance_once(corpus: Corpus) -> None:
    data = module(corpus())
    data.setup("fit")
    train = data.train
    assert train is not None
    shown: Counter[int] = Counter()
    for epoch in range(4):
        plan = train.plan(epoch)
        assert len(plan) == len(train)
        for batch in plan:
            assert max(item.seconds for item in batch) * len(batch) <= 12.0 + 1e-6
        members = Counter(i for batch in plan for item in batch for i in item.members)
        shown += members
        if epoch == 0:
            assert members == dict.fromkeys(range(16), 1)
    assert len(shown) == 16
    assert {item.speed for e in range(4) for batch in train.plan(e) for item in batch} == {0.9, 1.0, 1.1}


def test_training_items_are_what_was_planned(corpus: Corpus) -> None:
    data = module(corpus(), augment=SpeechAugmentConfig(join=0.6, join_s=6.0))
    data.setup("fit")
    train = data.train
    assert train is not None
    joined = 0
    for number, plan in enumerate(train.plan(0)):
        for item, sample in zip(plan, train[number], strict=True):
            assert len(sample.samples) / RATE == pytest.approx(item.seconds, abs=0.01)
            assert sample.samples.dtype == np.float32
            text = " ".join(data.utterances("train")[i].text for i in item.members)
            assert data.tokenizer.decode(sample.tokens.tolist()) == text
            joined += len(item.members) > 1
            assert len(item.gaps_s) in (0, len(item.members) + 1)
            assert len(item.members) == 1 or item.seconds <= 6.0
    assert joined


def test_training_is_seeded_and_resumes_to_the_batch(corpus: Corpus) -> None:
    path = corpus()
    make = lambda **settings: module(path, batch_seconds=6.0, **settings)  # noqa: E731
    first, second = make(), make()
    loader, other = first.train_dataloader(), second.train_dataloader()
    runs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        runs.append(list(loader))
    assert len(runs[0]) == len(loader) > 4
    assert not same(runs[0][0], runs[1][0])
    other.sampler.set_epoch(1)
    seen = list(islice(other, 3))
    assert all(map(same, seen, runs[1]))
    state = other.state_dict()
    third = make(num_workers=1).train_dataloader()
    third.load_state_dict(state)
    rest = list(third)
    assert len(rest) == len(runs[1]) - 3
    assert all(map(same, rest, runs[1][3:]))
    assert not same(next(iter(make(seed=1).train_dataloader())), runs[0][0])


def test_without_augmentation_training_is_plain(corpus: Corpus) -> None:
    data = module(corpus(), augment=None, batch_size=3)
    data.setup("fit")
    train = data.train
    assert train is not None
    for number, plan in enumerate(train.plan(0)):
        assert len(plan) <= 3
        for item, sample in zip(plan, train[number], strict=True):
            assert np.array_equal(sample.samples, data.samples("train", item.members[0]))
            assert sample.masks is not None
            assert sample.masks.time.size == sample.masks.mel.size == 0


def test_features_on_the_device_are_those_of_the_loader(corpus: Corpus) -> None:
    path = corpus()
    loaded = next(iter(module(path).train_dataloader()))
    later = module(path, features_on="device")
    made = later.on_after_batch_transfer(next(iter(later.train_dataloader())), 0)
    assert same(made, loaded)


def test_speed_changes_length_and_pitch() -> None:
    time = np.arange(RATE) / RATE
    samples = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    for speed in (0.9, 1.1):
        made = change_speed(samples, speed, RATE)
        assert len(made) == pytest.approx(RATE / speed, abs=1)
        assert np.abs(np.fft.rfft(made)).argmax() * RATE / len(made) == pytest.approx(440 * speed, abs=1)
    assert change_speed(samples, 1.0, RATE) is samples


def test_joined_utterances_lie_where_the_gaps_put_them() -> None:
    rng = np.random.default_rng(0)
    first, second = tone(0.5, 1), tone(0.25, 2)
    made = join([first, second], [0.1, 0.2, 0.3], RATE, (-40.0, -40.0), rng)
    assert len(made) == round(1.35 * RATE)
    assert np.array_equal(made[1600 : 1600 + 8000], first)
    assert np.array_equal(made[1600 + 8000 + 3200 :][:4000], second)
    gap = made[-4800:]
    level = np.sqrt(np.mean(first**2)) * 0.01
    assert not gap.any() or np.sqrt(np.mean(gap**2)) == pytest.approx(level, rel=0.01)


def test_masks_are_of_the_stated_sizes() -> None:
    config = SpeechAugmentConfig(time_mask_fraction=0.1, time_masks=50, mel_masks=50, mel_mask_bands=8)
    masks = draw_masks(config, KNOWN, 200, np.random.default_rng(0))
    for found, longest, size in ((masks.time, 20, 200), (masks.mel, 8, 20)):
        lengths = found[:, 1] - found[:, 0]
        assert (lengths.min(), lengths.max()) == (0, longest)
        assert found.min() >= 0
        assert found.max() <= size
    assert draw_masks(config, KNOWN, 1, np.random.default_rng(0)).time.max() <= 1


def test_batches_by_seconds() -> None:
    seconds = np.array([1.0, 1.0, 3.0, 1.0, 9.0, 1.0])
    assert cut(seconds, range(6), 6.0, None) == [[0, 1], [2, 3], [4], [5]]
    assert cut(seconds, [0, 1, 3, 5, 2, 4], 4.0, 3) == [[0, 1, 3], [5], [2], [4]]


# ---- what goes in ----------------------------------------------------------------------------------------------------


def test_any_rate_format_and_channels(corpus: Corpus) -> None:
    path = corpus()
    samples = tone(1.0, 7, 44100)
    soundfile.write(path / "20.wav", np.stack([samples, samples], 1), 44100)
    soundfile.write(path / "21.wav", tone(1.0, 8, 8000), 8000)
    data = module(path)
    data.setup("fit")
    assert len(data.samples("test", 0)) == len(data.samples("test", 1)) == RATE
    assert data.report is not None
    assert any("1 of 8,000 Hz, 1 of 44,100 Hz" in remark for remark in data.report.remarks)


def test_synthetic_speech_is_one_more_manifest(corpus: Corpus) -> None:
    path, synthetic = corpus(), corpus("synthetic", {0: "eight"}, seed=1)
    data = module(path, extra=[str(synthetic)])
    data.setup("fit")
    assert data.report is not None
    assert data.report.utterances == {"train": 32, "val": 4, "test": 4}
    assert "g" in data.tokenizer.tokens
    leaky = module(path, extra=[str(path)])  # the same recordings again
    leaky.setup("fit")
    assert leaky.report is not None
    assert leaky.report.utterances == {"train": 32, "val": 4, "test": 4}


def test_leakage_is_reported_and_shared_recordings_leave_train(corpus: Corpus, capsys: pytest.CaptureFixture) -> None:
    path = corpus(texts={3: "One two.", 16: "one two", 21: "two TWO four four"})
    (path / "20.wav").write_bytes((path / "5.wav").read_bytes())
    data = module(path)
    data.setup("fit")
    report = data.report
    assert report is not None
    assert report.left_out["train utterances that also stand in validation or test"] == 1
    assert report.utterances["train"] == 15
    assert report.identical == {"val": 0, "test": 0}
    assert report.shared_speakers == {"val": 1, "test": 0}
    assert report.shared_texts["val"] >= 1
    assert report.words["val"] == 8
    printed = capsys.readouterr().out
    assert "transcribed speech by split" in printed
    assert "left out: 1 train utterances that also stand in validation or test" in printed


def test_utterances_that_cannot_be_trained_on_are_left_out(corpus: Corpus) -> None:
    path = corpus(texts={0: "three " * 30, 1: "one"})
    soundfile.write(path / "2.wav", tone(5.5, 0), RATE)
    soundfile.write(path / "17.wav", tone(5.5, 1), RATE)
    soundfile.write(path / "18.wav", tone(0.01, 1), RATE)  # less than a frame
    data = module(path)
    data.setup("fit")
    assert data.report is not None
    assert data.report.left_out["train utterances longer than 5 s"] == 1
    assert data.report.left_out["train utterances too short for their text"] == 1
    assert data.report.utterances == {"train": 14, "val": 4, "test": 4}
    assert min(int(n) for batch in data.val_dataloader() for n in batch.lengths) == 1


def test_where_nothing_is_left_to_train_on_the_reason_is_told(corpus: Corpus) -> None:
    path = corpus(texts=dict.fromkeys(range(16), "one two three four " * 15))
    for features in (FEATURES, KNOWN):
        data = module(path, features=features)
        with pytest.raises(UserError, match="nothing to train on, 16 train utterances too short for their text being"):
            data.setup("fit")


def test_characters_that_train_lacks(corpus: Corpus) -> None:
    path = corpus(texts={22: "zzz one", 23: "zz x"})
    with pytest.raises(
        UserError, match=r"manifest.tsv line 24 \('zzz one'\).* tokens: 'x' \(1\), 'z' \(2\); set text.un"
    ):
        module(path).setup("fit")
    removed = module(path, text=TextConfig(unknown="remove"), empty_text="keep")
    assert [one.text for one in removed.utterances("test")[2:]] == ["one", ""]
    added = module(path, text=TextConfig(characters="abcdefghijklmnopqrstuvwxyz"))
    assert added.tokenizer.size == 27
    assert added.utterances("test")[3].text == "zz x"
    left_out = module(path, skip_bad=True)
    left_out.setup("fit")
    assert left_out.report is not None
    assert left_out.report.left_out["utterances with unknown characters"] == 2
    assert len(left_out.utterances("test")) == 2


def test_empty_transcripts(corpus: Corpus) -> None:
    path = corpus(texts={4: "...", 21: ""})
    with pytest.raises(UserError, match=r"line 6: the transcript '...' is empty once normalised \(2 such\)"):
        module(path).setup("fit")
    dropped = module(path, empty_text="drop")
    assert (len(dropped.utterances("train")), len(dropped.utterances("test"))) == (15, 3)
    kept = module(path, empty_text="keep", augment=SpeechAugmentConfig(join=1.0))
    assert len(kept.utterances("train")) == 16
    for batch in kept.train_dataloader():
        for row, count in zip(batch.tokens, batch.token_lengths, strict=True):
            text = kept.tokenizer.decode(row[: int(count)].tolist())
            assert text == " ".join(text.split())


def test_bad_recordings_are_named_or_left_out(corpus: Corpus) -> None:
    path = corpus()
    soundfile.write(path / "1.wav", np.array([0.0, np.nan] * 8000, np.float32), RATE, subtype="FLOAT")
    (path / "2.wav").write_bytes(b"not audio")
    (path / "3.wav").unlink()
    with pytest.raises(UserError, match=r"1 recordings are missing .*3.wav"):
        module(path).setup("fit")
    (path / "3.wav").write_bytes((path / "4.wav").read_bytes())
    with pytest.raises(UserError, match=r"1.wav holds NaN .*2 such clips"):
        module(path).setup("fit")
    data = module(path, skip_bad=True)
    data.setup("fit")
    assert data.report is not None
    assert data.report.left_out["unreadable clips"] == 2
    assert [one.path.name for one in data.utterances("train")][:2] == ["0.wav", "3.wav"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_seconds": 0}, "batch_seconds is 0"),
        ({"batch_seconds": 5.0}, "batch_seconds 5 is less than an utterance of max_utterance_s 5 at the slowest"),
        ({"empty_text": "maybe"}, "empty_text is 'maybe'"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"tokenizer": TokenizerConfig(stored={"kind": "x"})}, "unknown kind of stored tokenizer"),
        ({"noise_path": "/nowhere.wav"}, "does not exist"),
    ],
)
def test_bad_settings(corpus: Corpus, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(corpus(), **settings).setup("fit")


@pytest.mark.parametrize(
    "settings",
    [{"join": 2}, {"speeds": ()}, {"speeds": (3.0,)}, {"gap_s": (2, 1)}, {"gap_s": (-1, 1)}, {"time_masks": -1}],
)
def test_bad_augmentation(settings: dict) -> None:
    with pytest.raises(UserError, match=r"augment\."):
        SpeechAugmentConfig(**settings)


AN4 = Path(__file__).parents[3] / "shared" / "data" / "asr" / "an4"


@pytest.mark.skipif(not AN4.is_dir(), reason="needs ../shared/data beside the repository")
def test_an4_reads_as_its_manifest_says() -> None:
    data = module(AN4, cache_gb=0.0, max_utterance_s=20.0, batch_seconds=30.0)
    data.setup()
    assert data.report is not None
    assert data.report.utterances == {"train": 847, "val": 101, "test": 130}
    assert data.report.words["test"] == 773
    assert data.report.shared_speakers == {"val": 0, "test": 0}
    assert data.tokenizer.size == 27
