"""The LightningDataModule for DNA without labels."""

from typing import Any, Literal

import numpy as np

from seqssm.data.dna.datamodule import DNADataModule
from seqssm.data.dna.library import Library, Regions

EVERYTHING = "windows"


class UnlabelledDNA(DNADataModule):
    """DNA to batches of `UnlabelledBatch`, for pretraining: windows of a FASTA file, or of the intervals of a BED file.

    A BED file has lines of chrom, start, end and split (`train`, `valid`, `test`), as those of Enformer, Basenji and
    HyenaDNA; its windows lie within the intervals. Without a split column, `split_rules`, `split_positions` or random
    records divide the data, as for `DNADataModule`, which says what the arguments are. Labels, where there are any,
    are not looked at.

    Soft-masked genomes keep their case: the batch says which bases are in lower case.
    """

    case = True

    def __init__(
        self,
        path: str,
        *,
        fasta: str | None = None,
        split_column: str = "split",
        sequence_column: str = "sequence",
        path_column: str = "path",
        bed_columns: list[str] | None = None,
        record_pattern: str | None = None,
        window_bp: int | None = 1024,
        stride_bp: int | None = None,
        min_window_bp: int | None = None,
        max_n_fraction: float = 0.5,
        sampling: Literal["random", "grid"] = "random",
        windows_per_epoch: int | None = None,
        rc_probability: float = 0.5,
        warmup_from_bp: int | None = None,
        warmup_epochs: int = 1,
        eval_windows: int | None = None,
        split_rules: list[dict[str, str | int]] | None = None,
        split_positions: dict[str, list[float]] | None = None,
        split_group: str | None = None,
        split_fractions: dict[str, float] | None = None,
        guard_bp: int | None = None,
        val_fraction: float = 0.1,
        drop_shared: bool = True,
        leakage_report: bool = True,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        index_dir: str | None = None,
    ) -> None:
        arguments: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(**arguments, label_column="-", group_column="record")

    @property
    def labels(self) -> list[str]:
        """One class for all."""
        return [EVERYTHING]

    def _load(self) -> tuple[Library, Regions]:
        if self._loaded is None:
            library, regions = super()._load()
            regions.columns[self.layout.label_column] = np.full(len(regions), EVERYTHING, dtype=object)
            self._loaded = library, regions
        return self._loaded
