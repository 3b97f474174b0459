"""The LightningDataModule for labelled DNA."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from seqssm.data.dna.report import Report, overlapping, shared_kmers, shared_sequences
from seqssm.data.dna.sampling import (
    EpochSampler,
    ResumableLoader,
    ShardSampler,
    TrainingDataset,
    WindowDataset,
    Windows,
    collate,
    grid_windows,
    within_n_cap,
)
from seqssm.data.dna.sources import SPLITS, Layout, Library, Listing, Regions, list_sources
from seqssm.data.dna.splits import DROP, SplitPlan, split_regions
from seqssm.errors import UserError


class DNADataModule(LightningDataModule):
    """Labelled DNA from files to batches of `DNABatch`.

    Input (see `seqssm.data.dna.sources` for every layout):
        path: a table with a `sequence` or `path` column, a FASTA/GenBank/EMBL/2bit file, a BED file, a folder of
            train/dev/test files, or a folder of class folders; plain, gzip or bgzip.
        fasta: the sequences a BED file refers to.
        labels_table: columns by record name, for a FASTA or BED file.
        label_column, split_column, sequence_column, path_column, record_column: what the columns are called.
        bed_columns: names of the BED columns after chrom, start and end; without them, a header line's, else a fourth
            column of split names is the split (Enformer's intervals) and any other fourth column the label.
        record_pattern: a regular expression searched in record names, whose named groups become columns.
        classes: the classes to use, records of others being left out; None for all. Ids follow the sorted order.

    Windows:
        window_bp: window length in bases; None takes each record or interval whole.
        stride_bp: grid step, default a window. min_window_bp: take records shorter than a window whole from here on.
        max_n_fraction: windows with a larger share of N are left out; windows of N only always are.
        sampling: `random` trains on windows that begin anywhere in the train regions, `grid` on grid windows in random
            order. Validation and test are grids in file order.
        windows_per_epoch: default the number of train grid windows.
        balance: draw every class equally often in training.
        rc_probability: share of training windows read from the other strand.
        eval_windows: at most so many validation (and test) windows, spread evenly, classes in equal parts.

    Split: by the split column when there is one, else records at random; or one of
        split_rules: `[{split: test, record: 'chr(3|6)', strain: 'A.*'}, ...]`, whole-value regular expressions, first
            match wins, `drop` leaves out.
        split_positions: `{train: [0, 0.7], val: [0.7, 0.78], test: [0.8, 1]}`, fractions of each record, with
            `guard_bp` (default a window) clear between splits.
        split_group: the column whose values stay together, divided by split_fractions class by class.
        val_fraction: held out of train where a column or rules name no validation split.
        group_column: the unit that intervals resample; default split_group, else the file when there are several,
            else the record.
        drop_shared: leave out train sequences that equal one of validation or test, on either strand.

    Other:
        min_class_windows: fewer windows of a class in any split is an error. leakage_report: print it before training.
        index_dir: where sequence indexes live, one byte a base; default `$XDG_CACHE_HOME/seqssm/dna`.

    Raises UserError for bad input, from `labels`, `prepare_data` and `setup`.
    """

    def __init__(
        self,
        path: str,
        *,
        fasta: str | None = None,
        labels_table: str | None = None,
        label_column: str = "label",
        split_column: str = "split",
        sequence_column: str = "sequence",
        path_column: str = "path",
        record_column: str = "record",
        bed_columns: list[str] | None = None,
        record_pattern: str | None = None,
        classes: list[str] | None = None,
        window_bp: int | None = None,
        stride_bp: int | None = None,
        min_window_bp: int | None = None,
        max_n_fraction: float = 0.5,
        sampling: Literal["random", "grid"] = "random",
        windows_per_epoch: int | None = None,
        balance: bool = False,
        rc_probability: float = 0.5,
        eval_windows: int | None = None,
        split_rules: list[dict[str, str | int]] | None = None,
        split_positions: dict[str, list[float]] | None = None,
        split_group: str | None = None,
        split_fractions: dict[str, float] | None = None,
        guard_bp: int | None = None,
        val_fraction: float = 0.1,
        group_column: str | None = None,
        drop_shared: bool = True,
        min_class_windows: int = 1,
        leakage_report: bool = True,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        index_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        _check_arguments(self.hparams)
        self.layout = Layout(
            path=Path(path),
            fasta=Path(fasta) if fasta else None,
            labels_table=Path(labels_table) if labels_table else None,
            label_column=label_column,
            split_column=split_column,
            sequence_column=sequence_column,
            path_column=path_column,
            record_column=record_column,
            bed_columns=None if bed_columns is None else tuple(bed_columns),
            record_pattern=record_pattern,
        )
        self.plan = SplitPlan(
            column=split_column,
            rules=split_rules,
            positions=split_positions,
            group=split_group,
            fractions=split_fractions or {"train": 0.8, "val": 0.1, "test": 0.1},
            guard_bp=(window_bp or 0) if guard_bp is None else guard_bp,
            val_fraction=val_fraction,
            seed=seed,
        )
        self.report: Report | None = None
        self._listing: Listing | None = None
        self._loaded: tuple[Library, Regions] | None = None
        self._labels: list[str] | None = None
        self._regions: dict[str, Windows] = {}
        self._shared: dict[tuple[str, str], np.ndarray] = {}
        self._grids: dict[str, WindowDataset] = {}
        self._reported = False

    @property
    def labels(self) -> list[str]:
        """Class names in the order of their ids: sorted, as numbers when all are. Reads tables, no sequences."""
        if self._labels is None:
            if self.hparams["classes"]:
                values = set(map(str, self.hparams["classes"]))
            else:
                values = self._list().label_values() or self._labels_of_records()
            if len(values) < 2:
                raise UserError(f"{self.layout.path}: a classifier needs two classes or more, found {sorted(values)}")
            self._labels = sorted(values, key=_natural)
        return self._labels

    def _labels_of_records(self) -> set[str]:
        regions = self._load()[1]
        column = self.layout.label_column
        if column not in regions.columns:
            raise UserError(
                f"{self.layout.path} comes without labels: set labels_table, or label_column to one of "
                f"{', '.join(sorted(regions.columns))}"
            )
        return set(regions.columns[column]) - {""}

    def _list(self) -> Listing:
        if self._listing is None:
            self._listing = list_sources(self.layout)
        return self._listing

    def _load(self) -> tuple[Library, Regions]:
        if self._loaded is None:
            index_dir = self.hparams["index_dir"]
            self._loaded = self._list().load(Path(index_dir) if index_dir else None)
        return self._loaded

    def prepare_data(self) -> None:
        """Build the indexes that are missing (Lightning calls this in one process of a machine)."""
        self._load()

    def setup(self, stage: str | None = None) -> None:
        """Divide, window and check the data; before training, print the counts and the leakage report."""
        if not self._grids:
            self._divide()
        if stage == "fit" and not self._reported:
            self._reported = True
            if self.hparams["leakage_report"]:
                self.add_leakage()
            assert self.report is not None
            rank_zero_only(self.report.print)()

    def _divide(self) -> None:
        library, everything = self._load()
        regions, split = split_regions(library, everything, self.plan, self.layout.label_column)
        left_out: dict[str, int] = {}
        regions, split = self._of_known_classes(regions, split, left_out)
        self._regions = self._by_split(library, regions, split)
        if "train" not in self._regions:
            raise UserError(f"{self.layout.path}: the split leaves nothing to train on")
        self._drop_shared(library, left_out)
        grids = {name: self._grid(library, name, windows, left_out) for name, windows in self._regions.items()}
        self._check_classes(grids)
        self._grids = {name: WindowDataset(library, self._capped(name, grid, left_out)) for name, grid in grids.items()}
        self.train = self._training(library, grids["train"])
        self.val = self._grids.get("val")
        self.test = self._grids.get("test")
        self.report = self._counts(left_out)

    def _of_known_classes(
        self, regions: Regions, split: np.ndarray, left_out: dict[str, int]
    ) -> tuple[Regions, np.ndarray]:
        regions, split = regions[split != DROP], split[split != DROP]
        if self.layout.label_column not in regions.columns:
            self._labels_of_records()
        column = regions.columns[self.layout.label_column]
        known = set(self.labels)
        if self.hparams["classes"]:
            keep = np.isin(column.astype(str), sorted(known))
            left_out["records or intervals of other classes"] = int((~keep).sum())
            return regions[keep], split[keep]
        missing = column.astype(str) == ""
        if missing.any():
            at = int(np.argmax(missing))
            raise UserError(
                f"record {regions.columns['record'][at]!r} of {regions.columns['file'][at]} has no label "
                f"({int(missing.sum())} such): add it to {self.layout.labels_table or self.layout.path}, "
                "or drop it with split_rules"
            )
        return regions, split

    def _by_split(self, library: Library, regions: Regions, split: np.ndarray) -> dict[str, Windows]:
        several_files = len(set(library.files)) > 1 and self.layout.sequence_column not in regions.columns
        default = self.hparams["split_group"] or ("file" if several_files else "record")
        group_column = self.hparams["group_column"] or default
        record_names = np.array(library.unique_names())
        groups = record_names[regions.record]
        if group_column != "record":
            groups = regions.column(group_column, "group_column").astype(str)
        group_names, group_id = np.unique(groups, return_inverse=True)
        label_id = {label: i for i, label in enumerate(self.labels)}
        windows = Windows(
            record_id=regions.record,
            start_bp=regions.start_bp,
            length=regions.end_bp - regions.start_bp,
            label=np.array([label_id[label] for label in regions.columns[self.layout.label_column]], np.int64),
            group_id=group_id.astype(np.int64),
            record_names=record_names,
            group_names=group_names,
        )
        return {name: windows[split == name] for name in SPLITS if (split == name).any()}

    def _drop_shared(self, library: Library, left_out: dict[str, int]) -> None:
        self._shared = shared_sequences(library, self._regions)
        if not self.hparams["drop_shared"]:
            return
        drop = np.zeros(len(self._regions["train"]), bool)
        for other in ("test", "val"):
            if other in self._regions:
                shared = self._shared["train", other]
                left_out[f"train sequences that also stand in {other}"] = int(shared.sum())
                drop |= shared
        if drop.all():
            raise UserError(f"{self.layout.path}: every train sequence also stands in validation or test")
        self._regions["train"] = self._regions["train"][~drop]
        if drop.any():
            self._shared = {
                pair: np.zeros(len(mask), bool) if pair[1] == "train" else mask for pair, mask in self._shared.items()
            }

    def _grid(self, library: Library, split: str, regions: Windows, left_out: dict[str, int]) -> Windows:
        window_bp = self.hparams["window_bp"]
        grid = grid_windows(regions, window_bp, self.hparams["stride_bp"], self.hparams["min_window_bp"])
        if not len(grid):
            raise UserError(
                f"window_bp {window_bp} is longer than every region of the {split} split (the longest has "
                f"{regions.length.max()} bp): lower window_bp or set min_window_bp"
            )
        keep = within_n_cap(grid, library, self.hparams["max_n_fraction"])
        if not keep.any():
            raise UserError(
                f"all {len(grid)} windows of the {split} split have more than {self.hparams['max_n_fraction']:.0%} N: "
                "give sequences with bases, or raise max_n_fraction"
            )
        reason = f"{split} windows with over {self.hparams['max_n_fraction']:.0%} N"
        left_out[reason] = int((~keep).sum())
        return grid[keep]

    def _check_classes(self, grids: dict[str, Windows]) -> None:
        needed = self.hparams["min_class_windows"]
        for split, windows in grids.items():
            counts = np.bincount(windows.label, minlength=len(self.labels))
            if counts.min() < needed:
                raise UserError(
                    f"class {self.labels[int(counts.argmin())]!r} has {counts.min()} windows in the {split} split, "
                    f"{needed} needed: add samples, change the split, leave it out with classes, "
                    "or lower min_class_windows"
                )

    def _capped(self, split: str, windows: Windows, left_out: dict[str, int]) -> Windows:
        limit = self.hparams["eval_windows"]
        if split == "train" or limit is None or len(windows) <= limit:
            return windows
        chosen = []
        for label in np.unique(windows.label):
            own = np.flatnonzero(windows.label == label)
            count = min(len(own), max(1, limit // len(self.labels)))
            chosen.append(own[np.linspace(0, len(own) - 1, count).round().astype(int)])
        kept = np.sort(np.concatenate(chosen))
        left_out[f"{split} windows beyond eval_windows"] = len(windows) - len(kept)
        return windows[kept]

    def _training(self, library: Library, grid: Windows) -> TrainingDataset:
        window_bp = self.hparams["window_bp"]
        random_start = self.hparams["sampling"] == "random" and window_bp is not None
        candidates = grid
        if random_start:
            regions = self._regions["train"]
            candidates = regions[regions.length >= min(self.hparams["min_window_bp"] or window_bp, window_bp)]
        return TrainingDataset(
            library,
            candidates,
            windows_per_epoch=self.hparams["windows_per_epoch"] or len(grid),
            seed=self.hparams["seed"],
            window_bp=window_bp,
            random_start=random_start,
            balance=self.hparams["balance"],
            rc_probability=self.hparams["rc_probability"],
            max_n_fraction=self.hparams["max_n_fraction"],
        )

    def _counts(self, left_out: dict[str, int]) -> Report:
        classes = len(self.labels)
        counts = {split: np.bincount(grid.windows.label, minlength=classes) for split, grid in self._grids.items()}
        return Report(
            labels=self.labels,
            counts={split: dict(zip(self.labels, row.tolist(), strict=True)) for split, row in counts.items()},
            records={split: len(np.unique(w.record_id)) for split, w in self._regions.items()},
            bases={split: int(w.length.sum()) for split, w in self._regions.items()},
            windows_per_epoch=len(self.train),
            left_out=left_out,
        )

    def add_leakage(self) -> Report:
        """Complete `report` with what validation and test share with train; a second or two for 100 Mb."""
        self.setup()
        assert self.report is not None
        library, train = self._load()[0], self._regions["train"]
        held_out = {split: windows for split, windows in self._regions.items() if split != "train"}
        self.report.shared_sequences = {split: int(self._shared[split, "train"].sum()) for split in held_out}
        self.report.overlaps = {split: overlapping(self._grids[split].windows, train) for split in held_out}
        self.report.shared_kmers = shared_kmers(library, train, held_out)
        return self.report

    def grid(self, split: str) -> WindowDataset:
        """The grid windows of a split in file order; `grid("train")` is what a baseline is fitted on."""
        self.setup()
        if split not in self._grids:
            raise UserError(f"{self.layout.path} has no {split} split: change the split")
        return self._grids[split]

    def train_dataloader(self) -> DataLoader:
        """Resumable to the batch; item order depends on seed and epoch alone."""
        rank, ranks = self._rank()
        sampler = EpochSampler(self.train, self.hparams["batch_size"], ranks, rank)
        if self.trainer is not None:
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return ResumableLoader(
            self.train, batch_size=self.hparams["batch_size"], sampler=sampler, **self._loader_arguments()
        )

    def val_dataloader(self) -> DataLoader | list:
        """Grid windows in order; no loader without a validation split."""
        return self._evaluation_loader("val") if "val" in self._grids else []

    def test_dataloader(self) -> DataLoader:
        """Grid windows in order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test windows."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader:
        dataset = self.grid(split)
        rank, ranks = self._rank()
        batch_size = self.hparams["eval_batch_size"] or self.hparams["batch_size"]
        sampler = ShardSampler(dataset, ranks, rank)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **self._loader_arguments())

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader_arguments(self) -> dict[str, Any]:
        workers = self.hparams["num_workers"]
        return {
            "collate_fn": collate,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The label map and the windows of each class and split, for the checkpoint."""
        return {"labels": list(self.labels), "counts": self.report.counts if self.report else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UserError when the checkpoint was trained on other classes."""
        if state_dict["labels"] != self.labels:
            raise UserError(
                f"the checkpoint was trained on the classes {state_dict['labels']}, the data have {self.labels}: "
                "set classes, or use the data it was trained on"
            )


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


def _check_arguments(hparams: Any) -> None:
    for name in ("window_bp", "stride_bp", "min_window_bp", "windows_per_epoch", "eval_windows", "batch_size"):
        if hparams[name] is not None and hparams[name] < 1:
            raise UserError(f"{name} is {hparams[name]}: it must be at least 1")
    for name in ("max_n_fraction", "rc_probability", "val_fraction"):
        if not 0 <= hparams[name] <= 1:
            raise UserError(f"{name} is {hparams[name]}: it must lie between 0 and 1")
