from pathlib import Path

import numpy as np
import pytest
import soundfile

from seqssm.data.audio.layouts import AudioLayout, Clip
from seqssm.data.audio.sources import list_clips, missing_files_error, recognise
from seqssm.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def listed(root: Path, **changes: object) -> list[tuple]:
    clips = list_clips(AudioLayout(root, **changes)).clips
    base = root if root.is_dir() else root.parent
    return [
        (str(c.path.relative_to(base)), ";".join(c.labels), c.start_s, c.end_s, c.group, c.fold, c.split) for c in clips
    ]


def test_class_folders_and_split_folders(tmp_path: Path) -> None:
    touch(tmp_path, "dog/a.wav", "dog/deep/b.FLAC", "dog/notes.txt", "cat/c.mp3", ".hidden/d.wav", "cat/._c.mp3")
    assert recognise(tmp_path) == "folder"
    assert listed(tmp_path) == [
        ("cat/c.mp3", "cat", 0.0, None, "cat/c.mp3", "", ""),
        ("dog/a.wav", "dog", 0.0, None, "dog/a.wav", "", ""),
        ("dog/deep/b.FLAC", "dog", 0.0, None, "dog/deep/b.FLAC", "", ""),
    ]
    touch(tmp_path / "s", "train/dog/a.wav", "validation/cat/b.ogg", "test/dog/c.opus")
    assert [(row[1], row[6]) for row in listed(tmp_path / "s")] == [("dog", "test"), ("dog", "train"), ("cat", "val")]
    touch(tmp_path / "g", "a/1-22-x.wav", "b/2-33-y.wav")
    assert [row[4] for row in listed(tmp_path / "g", group_pattern=r"-(\d+)-")] == ["22", "33"]
    with pytest.raises(UserError, match=r"does not match '1-22-x\.wav'"):
        listed(tmp_path / "g", group_pattern="zzz")


def test_a_table_with_parts_labels_sources_folds_and_splits(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text(
        "path,labels,start,end,source,fold,split\n"
        "x/a.wav,dog;cat,0,2.5,s1,1,train\n"
        "x/a.wav,bird,2.5,,s1,1,train\n"
        "x/a.wav,horse,2.5,,s1,1,train\n"
        "b.wav,,,,,2,dev\n"
    )
    expected = [
        ("x/a.wav", "cat;dog", 0.0, 2.5, "s1", "1", "train"),
        ("x/a.wav", "bird;horse", 2.5, None, "s1", "1", "train"),
        ("b.wav", "", 0.0, None, "b.wav", "2", "val"),
    ]
    assert listed(tmp_path) == expected
    assert listed(tmp_path / "clips.csv") == expected
    (tmp_path / "t.tsv").write_text("file\tname\twho\na, b.wav\tdog, small\tann\n")
    changes = {"path_column": "file", "label_column": "name", "group_column": "who"}
    assert listed(tmp_path / "t.tsv", **changes) == [("a, b.wav", "dog, small", 0.0, None, "ann", "", "")]
    assert listed(tmp_path / "t.tsv", **changes, label_separator=",")[0][1] == "dog;small"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n../a.wav,dog\n", r"line 2: \.\./a\.wav lies outside of .*set root"),
        ("path,label\n/etc/a.wav,dog\n", "lies outside of"),
        ("path,label,start,end\na.wav,dog,3,2\n", "ends at 2 s, before it starts"),
        ("path,label,start\na.wav,dog,soon\n", "'soon' is not a time in seconds"),
        ("path,label,start\na.wav,dog,-1\n", "'-1' is not a time"),
        ("path,label,split\na.wav,dog,sometimes\n", "unknown split 'sometimes'"),
        ("path,label\na.wav,dog\nb.wav,\n", r"b\.wav has no label \(1 such"),
        ("path,label\na.wav,dog,extra\n", "line 2 has another number of columns"),
        ("file,label\na.wav,dog\n", "needs columns 'path' and 'label'"),
        ("path,label\n", "has no rows: give a header line and a row a clip"),
        ("", "has no rows"),
        ("path,label,label\na.wav,dog,cat\n", "names the column 'label' twice"),
        ("path,label\n,dog\n", "line 2: '' is no name of a file"),
        ("path,label\na\0.wav,dog\n", r"line 2: 'a\\x00.wav' is no name of a file"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "clips.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        list_clips(AudioLayout(tmp_path / "clips.csv"))


def test_a_link_that_leads_out_of_the_root_is_refused_and_a_root_above_allows(tmp_path: Path) -> None:
    touch(tmp_path, "outside/a.wav", "in/x")
    (tmp_path / "in" / "a.wav").symlink_to(tmp_path / "outside" / "a.wav")
    (tmp_path / "in" / "clips.csv").write_text("path,label\na.wav,dog\n")
    with pytest.raises(UserError, match="lies outside of"):
        list_clips(AudioLayout(tmp_path / "in"))
    (tmp_path / "in" / "clips.csv").write_text("path,label\nin/a.wav,dog\n")
    assert len(list_clips(AudioLayout(tmp_path / "in", root=tmp_path)).clips) == 1


def test_a_vocabulary_names_every_unknown_label(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("path,label\na.wav,dog\nb.wav,dgo\nc.wav,act\nd.wav,act\n")
    (tmp_path / "words.txt").write_text("dog\ncat\n")
    with pytest.raises(UserError, match=r"unknown labels 'act' \(2\), 'dgo' \(1\)"):
        list_clips(AudioLayout(tmp_path / "clips.csv", vocabulary=tmp_path / "words.txt"))


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    touch(tmp_path, "b.wav")
    (tmp_path / "clips.csv").write_text("path,label\na.wav,dog\nb.wav,dog\nc.wav,cat\n")
    missing = list_clips(AudioLayout(tmp_path)).missing()
    error = str(missing_files_error(missing, tmp_path))
    assert "2 files are missing" in error
    assert str(tmp_path / "a.wav") in error
    assert str(tmp_path / "c.wav") in error
    assert "\n" not in error


def test_esc50(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-100032-A-0.wav,1,0,dog,True,100032,A\n2-100038-A-14.wav,2,14,chirping_birds,False,100038,A\n"
    )
    touch(tmp_path, "audio/1-100032-A-0.wav", "audio/2-100038-A-14.wav")
    expected = [
        ("audio/1-100032-A-0.wav", "dog", 0.0, None, "100032", "1", ""),
        ("audio/2-100038-A-14.wav", "chirping_birds", 0.0, None, "100038", "2", ""),
    ]
    assert recognise(tmp_path) == "esc50"
    assert listed(tmp_path) == expected
    assert list_clips(AudioLayout(tmp_path / "meta" / "esc50.csv")).clips == list_clips(AudioLayout(tmp_path)).clips
    assert not list_clips(AudioLayout(tmp_path)).missing()


def test_urbansound8k(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "UrbanSound8K.csv").write_text(
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark\n"
    )
    assert listed(tmp_path) == [("audio/fold5/100032-3-0-0.wav", "dog_bark", 0.0, None, "100032", "5", "")]


def test_fsd50k(tmp_path: Path) -> None:
    truth = tmp_path / "FSD50K.ground_truth"
    truth.mkdir()
    (truth / "dev.csv").write_text(
        'fname,labels,mids,split\n64760,"Electric_guitar,Music","/m/1,/m/2",train\n16399,Music,/m/2,val\n'
    )
    (truth / "eval.csv").write_text('fname,labels,mids\n37199,"Electric_guitar,Music","/m/1,/m/2"\n')
    assert listed(tmp_path) == [
        ("FSD50K.dev_audio/64760.wav", "Electric_guitar;Music", 0.0, None, "64760", "", "train"),
        ("FSD50K.dev_audio/16399.wav", "Music", 0.0, None, "16399", "", "val"),
        ("FSD50K.eval_audio/37199.wav", "Electric_guitar;Music", 0.0, None, "37199", "", "test"),
    ]


def test_speech_commands(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "yes/0a_nohash_0.wav",
        "yes/0b_nohash_0.wav",
        "no/0a_nohash_1.wav",
        "no/0c_nohash_0.wav",
        "_background_noise_/hiss.wav",
    )
    (tmp_path / "validation_list.txt").write_text("yes/0b_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/0c_nohash_0.wav\nno/gone_nohash_0.wav\n")
    rows = {row[0]: (row[1], row[4], row[6]) for row in listed(tmp_path)}
    assert rows == {
        "yes/0a_nohash_0.wav": ("yes", "0a", "train"),
        "yes/0b_nohash_0.wav": ("yes", "0b", "val"),
        "no/0a_nohash_1.wav": ("no", "0a", "train"),
        "no/0c_nohash_0.wav": ("no", "0c", "test"),
        "no/gone_nohash_0.wav": ("no", "", "test"),
    }
    assert [clip.path.name for clip in list_clips(AudioLayout(tmp_path)).missing()] == ["gone_nohash_0.wav"]


def test_audioset(tmp_path: Path) -> None:
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'
    )
    lines = "# Segments csv created\n# num_ytids=3\n# YTID, start_seconds, end_seconds, positive_labels\n"
    (tmp_path / "balanced_train_segments.csv").write_text(
        lines + '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n--ZhevVpy1s, 50.000, 60.000, "/m/09x0r"\n'
    )
    (tmp_path / "eval_segments.csv").write_text(lines + '-0DLPzsiXXE, 0.000, 10.000, "/m/05zppz"\n')
    for name, length_s in (("Y--PJHxphWEs.wav", 10), ("--ZhevVpy1s.wav", 120), ("-0DLPzsiXXE_0_10000.wav", 10)):
        (tmp_path / "audio").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "audio" / name, np.zeros(100 * length_s), 100)
    assert listed(tmp_path) == [
        ("audio/Y--PJHxphWEs.wav", "Male speech, man speaking;Speech", 0.0, None, "--PJHxphWEs", "", "train"),
        ("audio/--ZhevVpy1s.wav", "Speech", 50.0, 60.0, "--ZhevVpy1s", "", "train"),
        ("audio/-0DLPzsiXXE_0_10000.wav", "Male speech, man speaking", 0.0, None, "-0DLPzsiXXE", "", "test"),
    ]
    (tmp_path / "eval_segments.csv").write_text(lines + '-0DLPzsiXXE, 0.000, 10.000, "/m/other"\n')
    with pytest.raises(UserError, match=r"unknown labels '/m/other' \(1\)"):
        listed(tmp_path)
    (tmp_path / "class_labels_indices.csv").unlink()
    with pytest.raises(UserError, match=r"AudioSet needs class_labels_indices\.csv"):
        listed(tmp_path)


def test_what_is_no_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list_clips(AudioLayout(tmp_path / "gone"))
    with pytest.raises(UserError, match="no class folders with recordings"):
        list_clips(AudioLayout(tmp_path))
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(UserError, match="neither a folder nor a table"):
        list_clips(AudioLayout(tmp_path / "a.wav"))
    with pytest.raises(UserError, match="format is 'mp3': choose auto, folder, csv"):
        list_clips(AudioLayout(tmp_path, format="mp3"))


def test_the_name_of_a_clip_tells_the_part() -> None:
    assert Clip(Path("a.wav"), ()).name == "a.wav"
    assert Clip(Path("a.wav"), (), 1.0, 2.5).name == "a.wav (1-2.5 s)"


def test_a_table_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("path,label\na.wav,dog\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"clips\.csv is not a readable table .*: save it as CSV in UTF-8"):
        list_clips(AudioLayout(tmp_path / "clips.csv"))
