"""What users have, whatever its layout, as one list of clips.

Layouts, recognised by their files or header line:
- `folder`: class folders of recordings, or train/val/test folders of class folders;
- `csv`: a table (CSV, TSV) with a column `path` and `label` or `labels`, and optionally `start` and `end` in seconds, a
  source, `fold` and `split`; or a folder with one such table. Rows of the same clip are merged;
- `esc50`: `meta/esc50.csv` and `audio`;
- `audioset`: `*_segments.csv` (YTID, start, end, "mid,mid") with `class_labels_indices.csv`; recordings are named by
  their YTID, with or without a leading `Y` and trailing times, anywhere below the folder;
- `fsd50k`: `FSD50K.ground_truth` with `FSD50K.dev_audio` and `FSD50K.eval_audio`;
- `urbansound8k`: `metadata/UrbanSound8K.csv` and `audio/fold1` to `fold10`;
- `speech_commands`: class folders with `validation_list.txt` and `testing_list.txt`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from seqssm.data.audio.folders import list_folder
from seqssm.data.audio.layouts import (
    MAX_NAMED,
    TABLE_SUFFIXES,
    AudioLayout,
    Clip,
    ClipList,
    column,
    inside,
    listed,
    open_text,
    seconds,
    table_rows,
)
from seqssm.data.audio.published import (
    list_audioset,
    list_esc50,
    list_fsd50k,
    list_speech_commands,
    list_urbansound8k,
)
from seqssm.data.splitting import split_name
from seqssm.errors import UserError

FORMATS = ("folder", "csv", "esc50", "audioset", "fsd50k", "urbansound8k", "speech_commands")
TABLE_NAMES = ("clips", "metadata", "labels", "index")  # of the one table in a folder
SOURCE_COLUMNS = ("source", "group", "src_file", "speaker", "recording", "session")
START_COLUMNS, END_COLUMNS = ("start", "start_s", "onset"), ("end", "end_s", "offset")
SEPARATORS = (";", "|", ",")


def list_clips(layout: AudioLayout) -> ClipList:
    """Recognise the layout and list its clips, without opening any.

    Raises:
        UserError: the layout is none of those above, a table lacks a column or a label, a path leads out of the root,
            or a label is unknown to the vocabulary.
    """
    if not layout.path.exists():
        raise UserError(f"{layout.path} does not exist: set path to a folder of recordings or a table of clips")
    name = recognise(layout.path) if layout.format == "auto" else layout.format
    if name not in _READERS:
        raise UserError(f"format is {name!r}: choose auto, {', '.join(FORMATS)}")
    listing = _READERS[name](layout)
    if not listing.clips:
        raise UserError(f"{layout.path} holds no clips (read as {name}): set format, or correct path")
    if layout.group_pattern is not None:
        listing.clips = _grouped(listing.clips, layout.group_pattern)
    if layout.vocabulary is not None and name != "audioset":
        listing.vocabulary = read_vocabulary(layout.vocabulary)
    _check_labels(listing, layout)
    return listing


def recognise(path: Path) -> str:
    """The name of the layout of a folder or table."""
    if path.is_file():
        return _recognise_table(path)
    if (path / "meta" / "esc50.csv").exists():
        return "esc50"
    if (path / "metadata" / "UrbanSound8K.csv").exists():
        return "urbansound8k"
    if (path / "FSD50K.ground_truth").is_dir():
        return "fsd50k"
    if (path / "validation_list.txt").exists() and (path / "testing_list.txt").exists():
        return "speech_commands"
    if any(path.glob("*_segments.csv")):
        return "audioset"
    if _table_in(path) is not None:
        return "csv"
    return "folder"


def _recognise_table(path: Path) -> str:
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(f"{path} is neither a folder nor a table (.csv, .tsv): set path to one of these")
    try:
        with open_text(path) as file:
            first = [line for _, line in zip(range(3), file, strict=False)]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a readable table ({error}): save it as CSV in UTF-8") from error
    header = first[0] if first else ""
    if header.startswith("#") and any("YTID" in line for line in first):
        return "audioset"
    if {"filename", "fold", "category"} <= set(re.split(r"[,\t\r\n]", header)):
        return "esc50"
    return "urbansound8k" if "slice_file_name" in header else "csv"


def _table_in(folder: Path) -> Path | None:
    tables = sorted(f for f in folder.iterdir() if f.suffix.lower() in TABLE_SUFFIXES and not f.name.startswith("."))
    named = [table for table in tables if table.stem.lower() in TABLE_NAMES]
    return named[0] if named else tables[0] if len(tables) == 1 else None


def _list_csv(layout: AudioLayout) -> ClipList:
    table = layout.path if layout.path.is_file() else _table_in(layout.path)
    if table is None:
        raise UserError(f"{layout.path} has no single table of clips (clips.csv): set path to the table itself")
    rows = list(table_rows(table))
    if not rows:
        raise UserError(f"{table} has no rows: give a header line and a row a clip")
    columns = list(rows[0][1])
    label_column = layout.label_column or next((c for c in ("labels", "label") if c in columns), None)
    if layout.path_column not in columns or label_column is None or label_column not in columns:
        wanted = f"{layout.path_column!r} and {layout.label_column or 'label'!r} (or 'labels')"
        found = ", ".join(columns)
        raise UserError(f"{table} needs columns {wanted}, it has {found}: set path_column or label_column")
    if layout.group_column is not None and layout.group_column not in columns:
        raise UserError(f"{table} has no column {layout.group_column!r} (group_column), only {', '.join(columns)}")
    group_columns = SOURCE_COLUMNS if layout.group_column is None else (layout.group_column,)
    separator = layout.label_separator
    if separator is None and label_column == "labels":
        separator = next((s for s in SEPARATORS if any(s in row[label_column] for _, row in rows)), None)
    root = layout.root or table.parent
    clips = []
    for line, row in rows:
        where = f"{table} line {line}"
        cell = row[label_column]
        labels = {part.strip() for part in cell.split(separator)} if separator else {cell}
        start_s, end_s = seconds(column(row, START_COLUMNS), where), seconds(column(row, END_COLUMNS), where)
        if end_s is not None and end_s <= (start_s or 0.0):
            raise UserError(f"{where}: the clip ends at {end_s:g} s, before it starts: correct start and end")
        clips.append(
            Clip(
                path=inside(root, row[layout.path_column], layout.root or table.parent, where),
                labels=tuple(sorted(labels - {""})),
                start_s=start_s or 0.0,
                end_s=end_s,
                group=column(row, group_columns) or row[layout.path_column],
                fold=row.get("fold", ""),
                split=split_name(row["split"], where) if row.get("split") else "",
            )
        )
    return ClipList("csv", _merged(clips), several=label_column == "labels" and separator is not None)


def _merged(clips: list[Clip]) -> list[Clip]:
    """One clip where several rows speak of the same part of a file, with all their labels."""
    found: dict[tuple[Path, float, float | None], Clip] = {}
    for clip in clips:
        key = (clip.path, clip.start_s, clip.end_s)
        before = found.get(key, clip)
        found[key] = replace(before, labels=tuple(sorted({*before.labels, *clip.labels})))
    return list(found.values())


_READERS: dict[str, Callable[[AudioLayout], ClipList]] = {
    "folder": list_folder,
    "csv": _list_csv,
    "esc50": list_esc50,
    "audioset": list_audioset,
    "fsd50k": list_fsd50k,
    "urbansound8k": list_urbansound8k,
    "speech_commands": list_speech_commands,
}

# ---- labels and groups -----------------------------------------------------------------------------------------------


def read_vocabulary(path: Path) -> list[str]:
    """Class names from a text file with one a line, or a table with a column `display_name`, `name` or `label`."""
    if not path.exists():
        raise UserError(f"{path} does not exist: set vocabulary to a file of class names")
    if path.suffix.lower() not in TABLE_SUFFIXES:
        with open_text(path) as file:
            return [line.strip() for line in file if line.strip()]
    names = [column(row, ("display_name", "name", "label", "category")) for _, row in table_rows(path)]
    if not all(names):
        raise UserError(f"{path} has no column display_name, name or label: give one class name a row")
    return names


def _check_labels(listing: ClipList, layout: AudioLayout) -> None:
    if not listing.several:
        bare = [clip for clip in listing.clips if not clip.labels]
        if bare:
            raise UserError(
                f"{bare[0].name} has no label ({len(bare)} such in {layout.path}): add it, or remove the row "
                "(clips without any label need a column `labels` in which others have several)"
            )
    if listing.vocabulary is not None:
        known = set(listing.vocabulary)
        unknown = Counter(label for clip in listing.clips for label in clip.labels if label not in known)
        if unknown:
            raise UserError(f"{layout.path}: unknown labels {listed(unknown)}: correct them or the vocabulary")


def _grouped(clips: list[Clip], pattern: str) -> list[Clip]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"group_pattern {pattern!r} is not a regular expression: {error}") from error
    grouped = []
    for clip in clips:
        match = compiled.search(clip.path.name)
        if match is None:
            raise UserError(f"group_pattern {pattern!r} does not match {clip.path.name!r}")
        grouped.append(replace(clip, group=match[1] if match.groups() else match[0]))
    return grouped


def missing_files_error(missing: list[Clip], where: Path) -> UserError:
    """One line that names them all (up to a thousand)."""
    names = sorted({str(clip.path) for clip in missing})
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return UserError(
        f"{where}: {len(names)} files are missing (skip_bad leaves them out): {', '.join(names[:MAX_NAMED])}{more}"
    )
