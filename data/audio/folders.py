"""Class folders, plain or below train, val and test folders."""

from __future__ import annotations

from pathlib import Path

from seqssm.data.audio.layouts import AudioLayout, Clip, ClipList
from seqssm.data.audio.reading import AUDIO_SUFFIXES
from seqssm.data.splitting import SPLIT_NAMES, split_name
from seqssm.errors import UserError

BACKGROUND_FOLDER = "_background_noise_"  # Speech Commands: minutes of noise, not a class


def list_folder(layout: AudioLayout) -> ClipList:
    if not layout.path.is_dir():
        raise UserError(f"{layout.path} is not a folder: set format to csv, or path to a folder of class folders")
    entries = [e for e in sorted(layout.path.iterdir()) if e.is_dir() and not e.name.startswith(".")]
    clips: list[Clip] = []
    if entries and all(entry.name.lower() in SPLIT_NAMES for entry in entries):
        for entry in entries:
            classes = [e for e in sorted(entry.iterdir()) if e.is_dir()]
            clips += class_folders(layout.path, classes, split_name(entry.name, str(layout.path)))
    else:
        clips = class_folders(layout.path, entries, "")
    if not clips:
        raise UserError(f"{layout.path} has no class folders with recordings ({', '.join(AUDIO_SUFFIXES)})")
    return ClipList("folder", clips)


def class_folders(root: Path, folders: list[Path], split: str) -> list[Clip]:
    return [
        Clip(file, (folder.name,), group=str(file.relative_to(root)), split=split)
        for folder in folders
        if folder.name != BACKGROUND_FOLDER
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in AUDIO_SUFFIXES and not file.name.startswith(".")
    ]
