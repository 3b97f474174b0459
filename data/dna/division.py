"""From regions and a split to the windows of each split, checked: what every sample is, before anything is drawn."""

from dataclasses import dataclass, field

import numpy as np

from seqssm.data.dna.library import Library, Regions
from seqssm.data.dna.report import Report, overlapping, shared_kmers, shared_sequences
from seqssm.data.dna.sampling import Windows, grid_windows, within_n_cap
from seqssm.data.dna.sources import Layout
from seqssm.data.dna.splits import SplitPlan, split_regions
from seqssm.data.splitting import DROP, SPLITS
from seqssm.errors import UserError


@dataclass(frozen=True)
class WindowPlan:
    """How the regions of a split become windows; `DNADataModule` says what each field does."""

    window_bp: int | None = None
    stride_bp: int | None = None
    min_window_bp: int | None = None
    max_n_fraction: float = 0.5
    eval_windows: int | None = None
    drop_shared: bool = True
    min_class_windows: int = 1
    classes_only: bool = False


@dataclass
class Division:
    """The regions and the grid windows of each split that has any, and what was left out, by reason.

    Raises UserError for a record without a label, a split without windows, windows of N alone, and a class with too
    few windows.
    """

    library: Library
    layout: Layout
    labels: list[str]
    plan: WindowPlan
    regions: dict[str, Windows] = field(default_factory=dict)
    grids: dict[str, Windows] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    _in_train: dict[str, int] = field(default_factory=dict)

    def divide(self, everything: Regions, split_plan: SplitPlan, group_column: str) -> None:
        """Fill in the splits."""
        regions, split = split_regions(self.library, everything, split_plan, self.layout.label_column)
        regions, split = self._labelled(regions[split != DROP], split[split != DROP])
        windows = self._as_windows(regions, group_column)
        self.regions = {name: windows[split == name] for name in SPLITS if (split == name).any()}
        if "train" in self.regions:
            self._drop_shared()
        self.grids = {name: self._grid(name, windows) for name, windows in self.regions.items()}
        for name, grid in self.grids.items():
            self._check_classes(name, grid)
            if name != "train":
                self.grids[name] = self._capped(name, grid)

    def candidates(self) -> Windows:
        """The train regions in which a random window finds room."""
        window_bp, regions = self.plan.window_bp or 0, self.regions["train"]
        return regions[regions.length >= min(self.plan.min_window_bp or window_bp, window_bp)]

    def report(self, windows_per_epoch: int) -> Report:
        """Counts, without leakage."""
        counts = {split: np.bincount(grid.label, minlength=len(self.labels)) for split, grid in self.grids.items()}
        return Report(
            labels=self.labels,
            counts={split: dict(zip(self.labels, row.tolist(), strict=True)) for split, row in counts.items()},
            records={split: len(np.unique(windows.record_id)) for split, windows in self.regions.items()},
            bases={split: int(windows.length.sum()) for split, windows in self.regions.items()},
            windows_per_epoch=windows_per_epoch,
            left_out=self.left_out,
        )

    def add_leakage(self, report: Report) -> None:
        """Complete a report with what validation and test share with train."""
        train = self.regions["train"]
        held_out = {split: windows for split, windows in self.regions.items() if split != "train"}
        report.shared_sequences = self._in_train
        report.overlaps = {split: overlapping(self.grids[split], train) for split in held_out}
        report.shared_kmers = shared_kmers(self.library, train, held_out)

    def _labelled(self, regions: Regions, split: np.ndarray) -> tuple[Regions, np.ndarray]:
        labels = regions.columns[self.layout.label_column].astype(str)
        if self.plan.classes_only:
            keep = np.isin(labels, self.labels)
            self.left_out["records or intervals of other classes"] = int((~keep).sum())
            return regions[keep], split[keep]
        missing = labels == ""
        if missing.any():
            at = int(np.argmax(missing))
            raise UserError(
                f"record {regions.columns['record'][at]!r} of {regions.columns['file'][at]} has no label "
                f"({int(missing.sum())} such): add it to {self.layout.labels_table or self.layout.path}, "
                "or drop it with split_rules"
            )
        return regions, split

    def _as_windows(self, regions: Regions, group_column: str) -> Windows:
        record_names = np.array(self.library.unique_names())
        groups = record_names[regions.record]
        if group_column != "record":
            groups = regions.column(group_column, "group_column").astype(str)
        group_names, group_id = np.unique(groups, return_inverse=True)
        label_id = {label: i for i, label in enumerate(self.labels)}
        return Windows(
            record_id=regions.record,
            start_bp=regions.start_bp,
            length=regions.end_bp - regions.start_bp,
            label=np.array([label_id[label] for label in regions.columns[self.layout.label_column]], np.int64),
            group_id=group_id.astype(np.int64),
            minus=regions.minus,
            record_names=record_names,
            group_names=group_names,
        )

    def _drop_shared(self) -> None:
        shared = shared_sequences(self.library, self.regions)
        held_out = [split for split in ("test", "val") if split in self.regions]
        self._in_train = {split: int(shared[split, "train"].sum()) for split in held_out}
        if not self.plan.drop_shared:
            return
        drop = np.zeros(len(self.regions["train"]), bool)
        for split in held_out:
            self.left_out[f"train sequences that also stand in {split}"] = int(shared["train", split].sum())
            drop |= shared["train", split]
        if drop.all():
            raise UserError(f"{self.layout.path}: every train sequence also stands in validation or test")
        self.regions["train"] = self.regions["train"][~drop]
        self._in_train = dict.fromkeys(held_out, 0)

    def _grid(self, split: str, regions: Windows) -> Windows:
        plan = self.plan
        grid = grid_windows(regions, plan.window_bp, plan.stride_bp, plan.min_window_bp)
        if not len(grid):
            raise UserError(
                f"window_bp {plan.window_bp} is longer than every region of the {split} split (the longest has "
                f"{regions.length.max()} bp): lower window_bp or set min_window_bp"
            )
        keep = within_n_cap(grid, self.library, plan.max_n_fraction)
        if not keep.any():
            raise UserError(
                f"all {len(grid)} windows of the {split} split have more than {plan.max_n_fraction:.0%} N, or nothing "
                "else: give sequences with bases, or raise max_n_fraction"
            )
        self.left_out[f"{split} windows with over {plan.max_n_fraction:.0%} N"] = int((~keep).sum())
        short = int((regions.length < (plan.min_window_bp or plan.window_bp or 0)).sum())
        self.left_out[f"{split} regions shorter than a window"] = short
        return grid[keep]

    def _check_classes(self, split: str, grid: Windows) -> None:
        counts = np.bincount(grid.label, minlength=len(self.labels))
        if counts.min() < self.plan.min_class_windows:
            raise UserError(
                f"class {self.labels[int(counts.argmin())]!r} has {counts.min()} windows in the {split} split, "
                f"{self.plan.min_class_windows} needed: add samples, change the split, leave it out with classes, "
                "or lower min_class_windows"
            )

    def _capped(self, split: str, grid: Windows) -> Windows:
        limit = self.plan.eval_windows
        if limit is None or len(grid) <= limit:
            return grid
        chosen = []
        for label in np.unique(grid.label):
            own = np.flatnonzero(grid.label == label)
            count = min(len(own), max(1, limit // len(self.labels)))
            chosen.append(own[np.linspace(0, len(own) - 1, count).round().astype(int)])
        kept = np.sort(np.concatenate(chosen))
        self.left_out[f"{split} windows beyond eval_windows"] = len(grid) - len(kept)
        return grid[kept]
