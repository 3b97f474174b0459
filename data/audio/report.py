"""What the splits hold and what leaks between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from seqssm.data.splitting import SPLITS


@dataclass
class AudioReport:
    """Counts and leakage, plain data.

    counts: clips by class and split (a clip counts for each of its classes). clips, sources, seconds: by split.
    shared_sources: sources of validation and test that also have clips in train. identical: clips of validation and
    test whose samples equal those of a train clip, or None where clips were not decoded. left_out: clips not used, by
    reason. remarks: what a user should know of the recordings, and how they were split.
    """

    labels: list[str]
    counts: dict[str, dict[str, int]]
    clips: dict[str, int]
    sources: dict[str, int]
    seconds: dict[str, float]
    clips_per_epoch: int
    shared_sources: dict[str, int] = field(default_factory=dict)
    identical: dict[str, int] | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def print(self) -> None:
        """Print two compact tables to standard output."""
        from rich.console import Console
        from rich.table import Table

        splits = [split for split in SPLITS if split in self.counts]
        table = Table(title="clips by class and split", title_justify="left")
        table.add_column("class")
        for split in splits:
            table.add_column(split, justify="right")
        for label in self.labels:
            table.add_row(label, *(f"{self.counts[split][label]:,}" for split in splits))
        table.add_section()
        table.add_row("all clips", *(f"{self.clips[split]:,}" for split in splits))
        table.add_row("sources", *(f"{self.sources[split]:,}" for split in splits))
        table.add_row("minutes", *(f"{self.seconds[split] / 60:,.1f}" for split in splits))
        console = Console()
        console.print(table)
        console.print(f"an epoch draws {self.clips_per_epoch:,} train clips")
        if self.shared_sources:
            leaks = Table(title="leakage into train", title_justify="left")
            leaks.add_column("")
            for split in self.shared_sources:
                leaks.add_column(split, justify="right")
            leaks.add_row("shared sources", *(f"{count:,}" for count in self.shared_sources.values()))
            if self.identical is not None:
                leaks.add_row("identical clips", *(f"{self.identical[split]:,}" for split in self.shared_sources))
            console.print(leaks)
        for reason, count in self.left_out.items():
            if count:
                console.print(f"left out: {count:,} {reason}")
        for remark in self.remarks:
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
