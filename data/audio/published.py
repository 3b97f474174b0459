"""Layouts of published data sets: ESC-50, UrbanSound8K, FSD50K, AudioSet, Speech Commands."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from seqssm.data.audio.folders import class_folders
from seqssm.data.audio.layouts import AudioLayout, Clip, ClipList, inside, listed, need, open_text, seconds, table_rows
from seqssm.data.audio.reading import AUDIO_SUFFIXES, open_audio
from seqssm.data.progress import progress_bar
from seqssm.data.splitting import split_name
from seqssm.errors import UserError


def list_speech_commands(layout: AudioLayout) -> ClipList:
    split_of = {}
    for split, name in (("val", "validation_list.txt"), ("test", "testing_list.txt")):
        with open_text(layout.path / name) as file:
            split_of.update({line.strip(): split for line in file if line.strip()})
    clips = []
    for clip in class_folders(layout.path, [e for e in sorted(layout.path.iterdir()) if e.is_dir()], ""):
        name = clip.path.relative_to(layout.path).as_posix()
        speaker = clip.path.name.partition("_nohash_")[0]  # one speaker a hash, in all classes
        clips.append(replace(clip, group=speaker, split=split_of.pop(name, "train")))
    clips += [Clip(layout.path / name, (name.partition("/")[0],), split=split) for name, split in split_of.items()]
    return ClipList("speech_commands", clips)


def list_esc50(layout: AudioLayout) -> ClipList:
    table = layout.path if layout.path.is_file() else layout.path / "meta" / "esc50.csv"
    base = table.parent.parent if table.parent.name == "meta" else table.parent
    root = layout.root or (base / "audio" if (base / "audio").is_dir() else base)
    clips = []
    for line, row in table_rows(table):
        need(row, ("filename", "fold", "category"), table)
        file = inside(root, row["filename"], root, f"{table} line {line}")
        clips.append(Clip(file, (row["category"],), group=row.get("src_file") or row["filename"], fold=row["fold"]))
    return ClipList("esc50", clips)


def list_urbansound8k(layout: AudioLayout) -> ClipList:
    table = layout.path if layout.path.is_file() else layout.path / "metadata" / "UrbanSound8K.csv"
    root = layout.root or table.parent.parent / "audio"
    clips = []
    for line, row in table_rows(table):
        # start and end say where in the Freesound recording the slice was; the files are cut already
        need(row, ("slice_file_name", "fsID", "fold", "class"), table)
        file = inside(root, f"fold{row['fold']}/{row['slice_file_name']}", root, f"{table} line {line}")
        clips.append(Clip(file, (row["class"],), group=row["fsID"], fold=row["fold"]))
    return ClipList("urbansound8k", clips)


def list_fsd50k(layout: AudioLayout) -> ClipList:
    clips = []
    truth = layout.path / "FSD50K.ground_truth"
    for name in ("dev", "eval"):
        table = truth / f"{name}.csv"
        if not table.exists():
            continue
        root = (layout.root or layout.path) / f"FSD50K.{name}_audio"
        for line, row in table_rows(table):
            need(row, ("fname", "labels"), table)
            file = inside(root, f"{row['fname']}.wav", root, f"{table} line {line}")
            split = "test" if name == "eval" else split_name(row.get("split") or "train", f"{table} line {line}")
            labels = tuple(sorted({label.strip() for label in row["labels"].split(",")} - {""}))
            clips.append(Clip(file, labels, group=row["fname"], split=split))
    return ClipList("fsd50k", clips, several=True)


def list_audioset(layout: AudioLayout) -> ClipList:
    folder = layout.path if layout.path.is_dir() else layout.path.parent
    tables = [layout.path] if layout.path.is_file() else sorted(layout.path.glob("*_segments.csv"))
    names = _audioset_names(layout.vocabulary or folder / "class_labels_indices.csv")
    files: dict[str, Path] = {}
    for file in sorted((layout.root or folder).rglob("*")):
        if file.suffix.lower() in AUDIO_SUFFIXES:
            files.setdefault(file.stem, file)
    clips, unknown, ids = [], Counter[str](), _by_id(files)
    with progress_bar("listing AudioSet", None) as advance:
        for table in tables:
            stem = table.stem.lower()
            split = "" if len(tables) == 1 else "test" if "eval" in stem else "train"
            for line, row in _audioset_rows(table):
                where = f"{table} line {line}"
                start_s, end_s = seconds(row[1], where), seconds(row[2], where)
                mids = [mid.strip() for mid in row[3].split(",") if mid.strip()]
                unknown.update(mid for mid in mids if mid not in names)
                labels = tuple(sorted({names[mid] for mid in mids if mid in names}))
                path, cut = ids.get(row[0], ((layout.root or folder) / f"{row[0]}.wav", True))
                if start_s is None or end_s is None or cut or not _is_whole(path, end_s - start_s):
                    start_s, end_s = 0.0, None
                clips.append(Clip(path, labels, start_s, end_s, group=row[0], split=split))
                advance(1)
    if unknown:
        raise UserError(f"{layout.path}: unknown labels {listed(unknown)}: add them to class_labels_indices.csv")
    return ClipList("audioset", clips, list(names.values()), several=True)


def _by_id(files: dict[str, Path]) -> dict[str, tuple[Path, bool]]:
    """File by YTID (11 characters), and whether its name has times: then it is the segment, cut already."""
    found: dict[str, tuple[Path, bool]] = {}
    for stem, file in files.items():
        match = re.fullmatch(r"Y?([\w-]{11})((?:_[\d.]+)*)", stem)
        if match:
            found.setdefault(match[1], (file, bool(match[2])))
    return found


def _is_whole(path: Path, seconds: float) -> bool:
    """Whether a file is the whole video, not the segment alone. An unreadable one is for the scan to name."""
    try:
        with open_audio(path) as file:
            return file.frames / file.samplerate > seconds + 1.0
    except UserError:
        return False


def _audioset_rows(table: Path) -> Iterator[tuple[int, list[str]]]:
    with open_text(table) as file:
        for line, row in enumerate(csv.reader(file, skipinitialspace=True), 1):
            if not row or row[0].startswith("#"):
                continue
            if len(row) != 4:
                raise UserError(f'{table} line {line} is not `YTID, start, end, "mid,mid"`: correct it')
            yield line, [cell.strip() for cell in row]


def _audioset_names(path: Path) -> dict[str, str]:
    if not path.exists():
        raise UserError(f"{path} does not exist: AudioSet needs class_labels_indices.csv; set vocabulary to it")
    names = {}
    for _, row in table_rows(path):
        need(row, ("mid", "display_name"), path)
        names[row["mid"]] = row["display_name"]
    return names
