import json
from pathlib import Path

import pytest

from seqssm.data.speech.manifests import SpeechLayout, Utterance, extra_utterances, list_utterances
from seqssm.data.speech.splits import SpeechSplitPlan, split_utterances
from seqssm.errors import UserError


def rows(path: Path, **settings: object) -> list[tuple]:
    """Name, text, speaker, split, start and end of each utterance."""
    found = list_utterances(SpeechLayout(path, **settings)).utterances  # type: ignore[arg-type]
    assert all(one.written == one.text and one.where for one in found)
    return [(one.path.name, one.text, one.speaker, one.split, one.start_s, one.end_s) for one in found]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    path = write(
        tmp_path / "manifest.tsv",
        'path\tsplit\tspeaker\tseconds\ttext\na/1.ogg\ttrain\tann\t1.0\t"Go," he said\na/2.ogg\tdev\tbob\t1.0\tNO\n',
    )
    expected = [
        ("1.ogg", '"Go," he said', "ann", "train", 0.0, None),
        ("2.ogg", "NO", "bob", "val", 0.0, None),
    ]
    assert rows(path) == rows(tmp_path) == expected
    assert list_utterances(SpeechLayout(path)).utterances[1].where == f"{path} line 3"


def test_csv_with_parts_of_recordings(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'file,sentence,start,end\nlong.wav,"one, two",0.5,2\nlong.wav,three,2,\n')
    assert rows(path) == [("long.wav", "one, two", "", "", 0.5, 2.0), ("long.wav", "three", "", "", 2.0, None)]
    path = write(tmp_path / "y.csv", "clip,said,who\na.wav,one,me\n")
    columns = {"path_column": "clip", "text_column": "said", "speaker_column": "who"}
    assert rows(path, **columns) == [("a.wav", "one", "me", "", 0.0, None)]


def test_jsonl_with_offset_and_duration(tmp_path: Path) -> None:
    lines = [
        {"audio_filepath": "a.wav", "duration": 2.5, "text": "one"},
        {"audio_filepath": "b.wav", "duration": 2.5, "offset": 1.0, "text": "two", "speaker_id": 7, "lang": None},
    ]
    path = write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert rows(path) == [("a.wav", "one", "", "", 0.0, None), ("b.wav", "two", "7", "", 1.0, 3.5)]


def test_librispeech(tmp_path: Path) -> None:
    root = tmp_path / "LibriSpeech"
    for subset, name in (("train-clean-100", "19-198"), ("dev-other", "84-1"), ("test-clean", "61-70")):
        folder = root / subset / name.replace("-", "/")
        write(folder / f"{name}.trans.txt", f"{name}-0000 HELLO THERE\n{name}-0001 IT'S\n")
        write(folder / f"{name}-0000.flac", "")
    found = rows(root)
    assert [row[:4] for row in found] == [
        ("84-1-0000.flac", "HELLO THERE", "84", "val"),
        ("84-1-0001.flac", "IT'S", "84", "val"),
        ("61-70-0000.flac", "HELLO THERE", "61", "test"),
        ("61-70-0001.flac", "IT'S", "61", "test"),
        ("19-198-0000.flac", "HELLO THERE", "19", "train"),
        ("19-198-0001.flac", "IT'S", "19", "train"),
    ]
    assert [row[3] for row in rows(root, subsets=("test-clean",))] == ["test", "test"]
    assert [row[3] for row in rows(root / "dev-other")] == ["val", "val"]
    with pytest.raises(UserError, match="none of the subsets test-other"):
        rows(root, subsets=("test-other",))


def test_common_voice(tmp_path: Path) -> None:
    header = "client_id\tpath\tsentence\tup_votes\n"
    (tmp_path / "clips").mkdir()
    for split in ("train", "dev", "test"):
        write(tmp_path / f"{split}.tsv", f'{header}s-{split}\tcommon_voice_{split}.mp3\tIt\'s "{split}".\t2\n')
    write(tmp_path / "validated.tsv", f"{header}s\tcommon_voice_9\tMore.\t2\n")
    expected = [
        (f"common_voice_{name}.mp3", f'It\'s "{name}".', f"s-{name}", split, 0.0, None)
        for name, split in (("train", "train"), ("dev", "val"), ("test", "test"))
    ]
    assert rows(tmp_path) == expected
    assert rows(tmp_path / "dev.tsv") == expected[1:2]
    assert rows(tmp_path, subsets=("validated",)) == [("common_voice_9.mp3", "More.", "s", "", 0.0, None)]


def test_speech_commands(tmp_path: Path) -> None:
    for word in ("yes", "no", "_background_noise_"):
        write(tmp_path / word / "a1_nohash_0.wav", "")
    write(tmp_path / "validation_list.txt", "no/a1_nohash_0.wav\n")
    write(tmp_path / "testing_list.txt", "")
    assert [row[1:4] for row in rows(tmp_path)] == [("no", "a1", "val"), ("yes", "a1", "train")]


def test_extra_manifests_give_their_train_utterances(tmp_path: Path) -> None:
    split = write(tmp_path / "a.tsv", "path\ttext\tsplit\n1.wav\tx\ttrain\n2.wav\ty\ttest\n")
    assert [(one.text, one.split) for one in extra_utterances(split)] == [("x", "train")]
    bare = write(tmp_path / "b.tsv", "path\ttext\n1.wav\tx\n2.wav\ty\n")
    assert [(one.text, one.split) for one in extra_utterances(bare)] == [("x", "train"), ("y", "train")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.tsv", "file_path\ttext\n1.wav\tx\n", r"m.tsv line 2: no column 'path' for the path, only file_path, text"),
        ("m.csv", "path,words\n1.wav,x\n", r"no column 'text' for the text, only path, words: set text_column"),
        ("m.tsv", "path\ttext\n1.wav\n", "m.tsv line 2 has another number of columns"),
        ("m.csv", "path,text\n1.wav,x, y\n", "quote cells that contain commas"),
        ("m.tsv", "path\ttext\n\tx\n", "m.tsv line 2: the column 'path' is empty"),
        ("m.tsv", "path\ttext\tsplit\n1.wav\tx\tholdout\n", "line 2: unknown split 'holdout'"),
        ("m.tsv", "path\ttext\tstart\tend\n1.wav\tx\t2\t1\n", "line 2: the utterance ends at 1 s, before it starts"),
        ("m.tsv", "path\ttext\tstart\n1.wav\tx\tsoon\n", "line 2: 'soon' is not a time"),
        ("m.tsv", "path\ttext\n../1.wav\tx\n", "lies outside of"),
        ("m.tsv", "path\ttext\n1.wav\tx\n1.wav\ty\n", "m.tsv line 3: .*1.wav stands also in .* line 2"),
        ("m.tsv", "path\ttext\n", "holds no utterances"),
        ("m.jsonl", '{"path": "1.wav", "text": "x"}\n{"path": \n', "m.jsonl line 2 is not JSON"),
        ("m.jsonl", "[1]\n", "m.jsonl line 1 is not a JSON object"),
        ("m.txt", "x", "neither a folder nor a manifest"),
    ],
)
def test_bad_manifests_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_utterances(SpeechLayout(write(tmp_path / name, text)))


def test_unknown_layouts(tmp_path: Path) -> None:
    for path, settings, message in (
        (tmp_path / "none", {}, "does not exist"),
        (tmp_path, {}, "no known layout"),
        (tmp_path, {"format": "kaldi"}, "choose auto, tsv"),
    ):
        with pytest.raises(UserError, match=message):
            list_utterances(SpeechLayout(path, **settings))
    (tmp_path / "m.tsv").write_bytes(b"path\ttext\n1.wav\t\xff\n")
    with pytest.raises(UserError, match="save it in UTF-8"):
        list_utterances(SpeechLayout(tmp_path / "m.tsv"))
    write(tmp_path / "m.tsv", "path\ttext\n1.wav\tx\n1.wav\tx\n")
    listing = list_utterances(SpeechLayout(tmp_path / "m.tsv"))
    assert len(listing.utterances) == 1
    assert listing.left_out == {"repeated rows": 1}


# ---- splits ----------------------------------------------------------------------------------------------------------


def utterances(speakers: int, each: int, split: str = "") -> list[Utterance]:
    return [
        Utterance(Path(f"{s}-{n}.wav"), f"text {n}", f"speaker {s}", split=split, where="x")
        for s in range(speakers)
        for n in range(each)
    ]


def test_speakers_and_texts_stay_together() -> None:
    for speakers, method, unit in ((20, "auto", "speaker"), (3, "auto", "text"), (3, "speaker", "speaker")):
        some = utterances(speakers, 20)
        split, said = split_utterances(some, SpeechSplitPlan(method))
        assert said == f"{unit}s at random"
        assert set(split) == {"train", "val", "test"}
        of: dict[str, set[str]] = {}
        for one, name in zip(some, split, strict=True):
            of.setdefault(getattr(one, unit), set()).add(name)
        assert all(len(names) == 1 for names in of.values())


def test_validation_is_held_out_of_train() -> None:
    some = [*utterances(20, 5, "train"), *utterances(2, 5, "test")]
    split, said = split_utterances(some, SpeechSplitPlan(val_fraction=0.2))
    assert [int((split == name).sum()) for name in ("train", "val", "test")] == [80, 20, 10]
    assert said == "the data set's own split, 20% of train's speakers held out for validation"
    with pytest.raises(UserError, match=r"x has no split \(5 such\)"):
        split_utterances([*some, *utterances(1, 5)], SpeechSplitPlan())
    with pytest.raises(UserError, match="no speaker"):
        split_utterances([Utterance(Path("x"), "y", where="z")], SpeechSplitPlan("speaker"))
    with pytest.raises(UserError, match="choose one of auto, column"):
        split_utterances(some, SpeechSplitPlan("fold"))
