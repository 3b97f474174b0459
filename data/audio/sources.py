"""What users have, whatever its layout, as one list of clips."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Clip:
    """A recording or a part of one.

    labels: names, sorted. group: what it was cut from, kept on one side of a split. fold: the data set's own.
    """

    path: Path
    labels: tuple[str, ...]
    start_s: float = 0.0
    end_s: float | None = None
    group: str = ""
    fold: str = ""


def list_clips(path: Path) -> list[Clip]:
    with open(path, newline="") as file:
        return [
            Clip(path.parent / row["path"], (row["label"],), group=row.get("source", row["path"]))
            for row in csv.DictReader(file)
        ]
