"""What users have, whatever its layout, as one list of utterances.

Layouts, recognised by their files or header line:
- `tsv`, `csv`, `jsonl`: a manifest with a path and a text a row, and optionally speaker, split, start and end in
  seconds (or offset and duration); or a folder with one such table. Columns may have the usual other names
  (`audio_filepath`, `transcript`, `speaker_id`, ...). Cells of a TSV are taken as they are, quotes included;
- `librispeech`: folders subset/speaker/chapter with `*.trans.txt`; train-*, dev-* and test-* are the splits;
- `common_voice`: `clips` with train.tsv, dev.tsv and test.tsv, or one of those tables;
- `speech_commands`: a folder of recordings a word, with `validation_list.txt` and `testing_list.txt`.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from seqssm.data.audio.layouts import AudioLayout, Clip, check_header, inside, open_text, seconds
from seqssm.data.audio.published import list_speech_commands
from seqssm.data.splitting import split_name
from seqssm.errors import UserError

FORMATS = ("tsv", "csv", "jsonl", "librispeech", "common_voice", "speech_commands")
SUFFIXES = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
TABLE_NAMES = ("manifest", "metadata", "utterances", "index")  # of the one table in a folder
MAX_NAMED = 20  # in one message

PATH_COLUMNS = ("path", "audio_filepath", "audio_path", "audio", "file", "filename", "file_name", "wav")
TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "normalized_text")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "spk", "client_id")
START_COLUMNS, END_COLUMNS = ("start", "start_s", "offset", "begin"), ("end", "end_s")


@dataclass(frozen=True)
class Utterance:
    """A recording or a part of one, and what is said in it.

    text: normalised once a DataModule has it. written: as it was read. start_s, end_s: the part, to the end where None.
    speaker, split: empty where unknown. where: the line it was read from, for messages.
    """

    path: Path
    text: str
    speaker: str = ""
    start_s: float = 0.0
    end_s: float | None = None
    split: str = ""
    written: str = ""
    where: str = ""

    @property
    def clip(self) -> Clip:
        """The recording alone."""
        return Clip(self.path, (), self.start_s, self.end_s)

    @property
    def name(self) -> str:
        """For messages."""
        return self.clip.name


@dataclass(frozen=True)
class SpeechLayout:
    """Where the utterances lie and how columns are called; `SpeechDataModule` says what each field does."""

    path: Path
    format: str = "auto"
    root: Path | None = None
    path_column: str | None = None
    text_column: str | None = None
    speaker_column: str | None = None
    subsets: tuple[str, ...] | None = None


@dataclass
class UtteranceList:
    """Every utterance in the order of the files, and what was left out, by reason."""

    format: str
    utterances: list[Utterance]
    left_out: Counter[str] = field(default_factory=Counter)


def list_utterances(layout: SpeechLayout) -> UtteranceList:
    """Recognise the layout and list its utterances, without opening a recording.

    Raises:
        UserError: the layout is none of those above, a manifest lacks a column or has a broken row, a path leads out of
            the root, or the same part of a recording has two texts.
    """
    if not layout.path.exists():
        raise UserError(f"{layout.path} does not exist: set path to a manifest or a folder of transcribed speech")
    name = recognise(layout.path) if layout.format == "auto" else layout.format
    if name not in _READERS:
        raise UserError(f"format is {name!r}: choose auto, {', '.join(FORMATS)}")
    listing = _READERS[name](layout)
    listing.format = name
    if not listing.utterances:
        raise UserError(f"{layout.path} holds no utterances (read as {name}): set format, or correct path")
    listing.utterances = _unique(listing)
    return listing


def recognise(path: Path) -> str:
    """The name of the layout of a folder or manifest."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is neither a folder nor a manifest (.tsv, .csv, .jsonl): set path to one of these")
        return SUFFIXES[path.suffix.lower()] if not _is_common_voice(path) else "common_voice"
    if (path / "validation_list.txt").exists() and (path / "testing_list.txt").exists():
        return "speech_commands"
    if (path / "clips").is_dir() and any(path.glob("*.tsv")):
        return "common_voice"
    table = _table_in(path)
    if table is not None:
        return SUFFIXES[table.suffix.lower()]
    if next(path.rglob("*.trans.txt"), None) is not None:
        return "librispeech"
    raise UserError(
        f"{path} is no known layout of transcribed speech: give a manifest (manifest.tsv with the columns path and "
        f"text), or set format to one of {', '.join(FORMATS)}"
    )


def _is_common_voice(path: Path) -> bool:
    if path.suffix.lower() != ".tsv" or not (path.parent / "clips").is_dir():
        return False
    with open_text(path) as file:
        return {"client_id", "sentence"} <= set(file.readline().strip().split("\t"))


def _table_in(folder: Path) -> Path | None:
    tables = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    named = [table for table in tables if table.stem.lower() in TABLE_NAMES]
    return named[0] if named else tables[0] if len(tables) == 1 else None


# ---- manifests -------------------------------------------------------------------------------------------------------


def manifest_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Place (for messages) and cells of every row of a TSV, CSV or JSONL file."""
    suffix = SUFFIXES.get(path.suffix.lower())
    if suffix is None:
        raise UserError(f"{path} is not a manifest: give .tsv, .csv or .jsonl")
    try:
        yield from _json_rows(path) if suffix == "jsonl" else _table_rows(path, suffix)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable manifest ({error}): save it in UTF-8") from error


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON ({error}): correct it") from error
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object: correct it")
            yield where, {key: "" if value is None else str(value).strip() for key, value in row.items()}


def _table_rows(path: Path, suffix: str) -> Iterator[tuple[str, dict[str, str]]]:
    with open_text(path) as file:
        if suffix == "tsv":  # transcripts hold quotation marks, which mean nothing here
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(file, strict=True)
        check_header(path, reader.fieldnames)
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where} has another number of columns than the header: correct it"
                    + ("" if suffix == "tsv" else " (quote cells that contain commas)")
                )
            yield where, {key.strip(): value.strip() for key, value in row.items()}


def _list_manifest(layout: SpeechLayout) -> UtteranceList:
    table = layout.path if layout.path.is_file() else _table_in(layout.path)
    if table is None:
        raise UserError(f"{layout.path} has no single manifest (manifest.tsv): set path to the manifest itself")
    root = layout.root or table.parent
    utterances = []
    header: list[str] = []
    for where, row in manifest_rows(table):
        if list(row) != header:  # that of a JSONL file may change from line to line
            header = list(row)
            path, text, speaker = _columns(row, layout, where)
        start_s, end_s = _part(row, where)
        utterances.append(
            Utterance(
                path=inside(root, _filled(row[path], path, where), root, where),
                text=row[text],
                speaker=row.get(speaker, ""),
                start_s=start_s,
                end_s=end_s,
                split=split_name(row["split"], where) if row.get("split") else "",
                written=row[text],
                where=where,
            )
        )
    return UtteranceList("", utterances)


def _columns(row: dict[str, str], layout: SpeechLayout, where: str) -> tuple[str, str, str]:
    """The columns of path, text and speaker."""
    found = []
    for what, asked, usual in (
        ("path", layout.path_column, PATH_COLUMNS),
        ("text", layout.text_column, TEXT_COLUMNS),
        ("speaker", layout.speaker_column, SPEAKER_COLUMNS),
    ):
        name = asked or next((one for one in usual if one in row), None)
        if (name is None or name not in row) and (what != "speaker" or asked):
            raise UserError(
                f"{where}: no column {name or usual[0]!r} for the {what}, only {', '.join(row)}: set {what}_column"
            )
        found.append(name or "")
    return found[0], found[1], found[2]


def _filled(cell: str, column: str, where: str) -> str:
    if not cell:
        raise UserError(f"{where}: the column {column!r} is empty: fill it in, or remove the row")
    return cell


def _part(row: dict[str, str], where: str) -> tuple[float, float | None]:
    """Start and end in seconds. A duration counts only beside a start: alone it is the whole file's."""
    start_s = seconds(next((row[name] for name in START_COLUMNS if name in row), ""), where)
    end_s = seconds(next((row[name] for name in END_COLUMNS if name in row), ""), where)
    if start_s is not None and end_s is None and row.get("duration"):
        lasting = seconds(row["duration"], where)
        end_s = None if lasting is None else start_s + lasting
    if end_s is not None and end_s <= (start_s or 0.0):
        raise UserError(f"{where}: the utterance ends at {end_s:g} s, before it starts: correct start and end")
    return start_s or 0.0, end_s


# ---- published data sets ---------------------------------------------------------------------------------------------


def _list_librispeech(layout: SpeechLayout) -> UtteranceList:
    if not layout.path.is_dir():
        raise UserError(f"{layout.path} is not a folder: set path to LibriSpeech's")
    utterances = []
    for transcript in sorted(layout.path.rglob("*.trans.txt")):
        subset = _subset(transcript.relative_to(layout.path).parts, layout.path)
        if layout.subsets is not None and subset not in layout.subsets:
            continue
        recordings = {f.stem: f for f in transcript.parent.iterdir() if f.suffix.lower() in (".flac", ".wav", ".ogg")}
        with open_text(transcript) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                name, _, text = line.strip().partition(" ")
                path = recordings.get(name, transcript.parent / f"{name}.flac")
                where = f"{transcript} line {number}"
                speaker = name.partition("-")[0]
                split = split_name(subset.partition("-")[0], where) if subset else ""
                utterances.append(Utterance(path, text, speaker, split=split, written=text, where=where))
    _check_subsets(layout, utterances)
    return UtteranceList("", utterances)


def _subset(parts: Sequence[str], folder: Path) -> str:
    """train-clean-100 out of the path of a transcript, or of the folder given; empty for a folder below a subset."""
    for part in (*parts, *reversed(folder.resolve().parts)):
        if part.partition("-")[0] in ("train", "dev", "test"):
            return part
    return ""


def _list_common_voice(layout: SpeechLayout) -> UtteranceList:
    folder = layout.path if layout.path.is_dir() else layout.path.parent
    names = layout.subsets or ("train", "dev", "test")
    tables = [layout.path] if layout.path.is_file() else [folder / f"{name}.tsv" for name in names]
    tables = [table for table in tables if table.exists()]
    if not tables:
        raise UserError(f"{folder} has none of {', '.join(f'{name}.tsv' for name in names)}: set subsets, or path")
    root = layout.root or folder / "clips"
    utterances = []
    for table in tables:
        split = split_name(table.stem, str(table)) if table.stem in ("train", "dev", "test") else ""
        for where, row in manifest_rows(table):
            if not {"path", "sentence"} <= row.keys():
                raise UserError(f"{where}: no columns path and sentence, only {', '.join(row)}: set format")
            path = inside(root, _filled(row["path"], "path", where), root, where)
            path = path if path.suffix else path.with_suffix(".mp3")
            text, speaker = row["sentence"], row.get("client_id", "")
            utterances.append(Utterance(path, text, speaker, split=split, written=text, where=where))
    return UtteranceList("", utterances)


def _list_speech_commands(layout: SpeechLayout) -> UtteranceList:
    clips = list_speech_commands(AudioLayout(layout.path)).clips
    utterances = [
        Utterance(c.path, c.labels[0], c.group, split=c.split, written=c.labels[0], where=str(c.path)) for c in clips
    ]
    return UtteranceList("", utterances)


def _check_subsets(layout: SpeechLayout, utterances: Sequence[Utterance]) -> None:
    if layout.subsets is not None and not utterances:
        raise UserError(f"{layout.path} has none of the subsets {', '.join(layout.subsets)}: correct subsets")


def _unique(listing: UtteranceList) -> list[Utterance]:
    """Each part of a recording once; one with two texts is an error."""
    found: dict[tuple[Path, float, float | None], Utterance] = {}
    for one in listing.utterances:
        before = found.setdefault((one.path, one.start_s, one.end_s), one)
        if before is not one:
            if (before.text, before.split) != (one.text, one.split):
                raise UserError(f"{one.where}: {one.name} stands also in {before.where}, with another text or split")
            listing.left_out["repeated rows"] += 1
    return list(found.values())


_READERS: dict[str, Callable[[SpeechLayout], UtteranceList]] = {
    "tsv": _list_manifest,
    "csv": _list_manifest,
    "jsonl": _list_manifest,
    "librispeech": _list_librispeech,
    "common_voice": _list_common_voice,
    "speech_commands": _list_speech_commands,
}


def extra_utterances(path: Path) -> list[Utterance]:
    """The train utterances of one more data set: those it marks so, or all where it has no split."""
    listing = list_utterances(SpeechLayout(path))
    marked = any(one.split for one in listing.utterances)
    return [replace(one, split="train") for one in listing.utterances if one.split == "train" or not marked]


def missing_recordings(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Those whose file does not exist."""
    exists = {path: path.is_file() for path in {one.path for one in utterances}}
    return [one for one in utterances if not exists[one.path]]


def missing_recordings_error(missing: Sequence[Utterance], where: Path) -> UserError:
    """One line that names some of them."""
    names = sorted({str(one.path) for one in missing})
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return UserError(
        f"{where}: {len(names)} recordings are missing (skip_bad leaves them out): {', '.join(names[:MAX_NAMED])}{more}"
    )
