"""What the splits of transcribed speech hold and what leaks between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from seqssm.data.splitting import SPLITS


@dataclass
class SpeechReport:
    """Counts and leakage, plain data.

    utterances, speakers, seconds, words, tokens: by split. shared_speakers: speakers of validation and test that train
    has as well. shared_texts: utterances of validation and test whose text train has. identical: those whose samples
    equal a train utterance's, or None where recordings were not decoded. left_out: utterances not used, by reason.
    remarks: what a user should know of the recordings and texts, and how they were split.
    """

    utterances: dict[str, int]
    speakers: dict[str, int]
    seconds: dict[str, float]
    words: dict[str, int]
    tokens: dict[str, int]
    vocabulary: int
    batches_per_epoch: int
    padding: float
    shared_speakers: dict[str, int] = field(default_factory=dict)
    shared_texts: dict[str, int] = field(default_factory=dict)
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

        splits = [split for split in SPLITS if split in self.utterances]
        table = Table("", *splits, title="transcribed speech by split", title_justify="left")
        for name, counts in (
            ("utterances", self.utterances),
            ("speakers", self.speakers),
            ("words", self.words),
            ("tokens", self.tokens),
        ):
            table.add_row(name, *(f"{counts[split]:,}" for split in splits))
        table.add_row("minutes", *(f"{self.seconds[split] / 60:,.1f}" for split in splits))
        console = Console()
        console.print(table)
        if self.batches_per_epoch:
            console.print(
                f"{self.vocabulary} tokens; an epoch has {self.batches_per_epoch:,} batches, of which "
                f"{self.padding:.0%} is padding",
                highlight=False,
            )
        if self.shared_texts:
            leaks = Table("", *self.shared_texts, title="leakage into train", title_justify="left")
            leaks.add_row("shared speakers", *(f"{count:,}" for count in self.shared_speakers.values()))
            leaks.add_row("utterances with a text of train", *(f"{count:,}" for count in self.shared_texts.values()))
            if self.identical is not None:
                leaks.add_row("identical recordings", *(f"{self.identical[split]:,}" for split in self.shared_texts))
            console.print(leaks)
        for reason, count in self.left_out.items():
            if count:
                console.print(f"left out: {count:,} {reason}")
        for remark in self.remarks:
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
