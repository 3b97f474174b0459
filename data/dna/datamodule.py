"""The LightningDataModule for labelled DNA."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader

from seqssm.data.dna.division import Division, WindowPlan
from seqssm.data.dna.library import Library, Regions
from seqssm.data.dna.report import Report
from seqssm.data.dna.sampling import (
    TrainingDataset,
    WindowDataset,
    collate,
    collate_unlabelled,
)
from seqssm.data.dna.sources import Layout, Listing, list_sources
from seqssm.data.dna.splits import SplitPlan
from seqssm.data.dna.warmup import LengthWarmUp, collate_items, window_lengths
from seqssm.data.loading import EpochSampler, ResumableLoader, ShardSampler, data_rank
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
            column of split names is the split (Enformer's intervals) and any other fourth column the label. Intervals
            whose `strand`, a column of that name or else the sixth, is `-` are read from the other strand.
        record_pattern: a regular expression searched in record names, whose named groups become columns.
        label_names: what to call the labels of the data, `{"0": other, "1": promoter}`; those not in it keep their own.
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
        warmup_from_bp: begin training with windows of so many bases and double them until they have `window_bp`; a step
            takes as many more windows as they are shorter, so that its bases, and the steps of an epoch, stay the same
            (`batch_size` and `windows_per_epoch` are those at full length). Validation is at full length throughout.
        warmup_epochs: epochs at each length on the way.
        eval_windows: at most so many validation (and test) windows, spread evenly, classes in equal parts.

    Split: by the split column when there is one, else records at random; or one of
        split_rules: `[{split: test, record: 'chr(3|6)', strain: 'A.*'}, ...]`, whole-value regular expressions, first
            match wins, `drop` leaves out.
        split_positions: `{train: [0, 0.7], val: [0.7, 0.78], test: [0.8, 1]}`, fractions of each record, with
            `guard_bp` (default a window) clear between splits.
        split_group: the column whose values stay together, divided by split_fractions class by class.
        val_fraction: held out of train where a column or rules name no validation split.
        group_column: the unit that intervals resample; default split_group, else the file where a table or class
            folders name files, else the record.
        drop_shared: leave out train sequences that equal one of validation or test, on either strand.

    Other:
        min_class_windows: fewer windows of a class in any split is an error. leakage_report: print it before training.
        index_dir: where sequence indexes live, one byte a base; default `$XDG_CACHE_HOME/seqssm/dna`.

    Raises UserError for bad input, from `labels`, `prepare_data` and `setup`.
    """

    case = False  # whether samples say which letters are in lower case

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
        label_names: dict[str, str] | None = None,
        classes: list[str] | None = None,
        window_bp: int | None = None,
        stride_bp: int | None = None,
        min_window_bp: int | None = None,
        max_n_fraction: float = 0.5,
        sampling: Literal["random", "grid"] = "random",
        windows_per_epoch: int | None = None,
        balance: bool = False,
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
        # What this class was given. `hparams` are those of a subclass, which may work some of these out by itself.
        settings = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.settings: dict[str, Any] = settings
        _check_arguments(settings)
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
        self.split_plan = SplitPlan(
            column=split_column,
            rules=split_rules,
            positions=split_positions,
            group=split_group,
            fractions=split_fractions or {"train": 0.8, "val": 0.1, "test": 0.1},
            guard_bp=(window_bp or 0) if guard_bp is None else guard_bp,
            val_fraction=val_fraction,
            seed=seed,
        )
        self.window_plan = WindowPlan(
            window_bp=window_bp,
            stride_bp=stride_bp,
            min_window_bp=min_window_bp,
            max_n_fraction=max_n_fraction,
            eval_windows=eval_windows,
            drop_shared=drop_shared,
            min_class_windows=min_class_windows,
            classes_only=bool(classes),
        )
        self.train: TrainingDataset | None = None
        self.warmup: LengthWarmUp | None = None
        self.val: WindowDataset | None = None
        self.test: WindowDataset | None = None
        self.report: Report | None = None
        self._listing: Listing | None = None
        self._loaded: tuple[Library, Regions] | None = None
        self._labels: list[str] | None = None
        self._division: Division | None = None
        self._grids: dict[str, WindowDataset] = {}
        self._reported = False

    @property
    def labels(self) -> list[str]:
        """Class names in the order of their ids: sorted, as numbers when all are. Reads tables, no sequences."""
        if self._labels is None:
            if self.settings["classes"]:
                values = set(map(str, self.settings["classes"]))
            else:
                found = self._list().label_values()
                values = set(map(self._name, found)) if found else self._labels_of_records()
            if len(values) < 2:
                raise UserError(f"{self.layout.path}: a classifier needs two classes or more, found {sorted(values)}")
            self._labels = sorted(values, key=_natural)
        return self._labels

    def _name(self, label: str) -> str:
        return (self.settings["label_names"] or {}).get(str(label), str(label))

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
            index_dir = self.settings["index_dir"]
            library, regions = self._list().load(Path(index_dir) if index_dir else None)
            labels = regions.columns.get(self.layout.label_column)
            if labels is not None and self.settings["label_names"]:
                self._check_names({str(label) for label in labels})
                regions.columns[self.layout.label_column] = np.array([self._name(label) for label in labels], object)
            self._loaded = library, regions
        return self._loaded

    def _check_names(self, labels: set[str]) -> None:
        unknown = set(self.settings["label_names"]) - labels
        if unknown:
            raise UserError(
                f"label_names: {self.layout.path} has no label {', '.join(sorted(unknown))}; "
                f"column {self.layout.label_column!r} holds {', '.join(sorted(labels)[:20])}"
            )

    def prepare_data(self) -> None:
        """Build the indexes that are missing (Lightning calls this in one process of a machine)."""
        self._labels = self.labels  # a bad table fails before gigabytes are indexed
        self._load()

    def setup(self, stage: str | None = None) -> None:
        """Divide, window and check the data; before training, print the counts and the leakage report."""
        if self._division is None:
            self._divide()
        if stage == "fit" and self.train is None:
            raise UserError(f"{self.layout.path}: the split leaves nothing to train on")
        if stage == "fit" and not self._reported:
            self._reported = True
            if self.warmup is not None:
                self._check_warmup(self.warmup)
            assert self.report is not None
            if self.settings["leakage_report"] and self._division is not None:
                self._division.add_leakage(self.report)
            rank_zero_only(self.report.print)()

    def _divide(self) -> None:
        library, regions = self._load()
        if self.layout.label_column not in regions.columns:
            self._labels_of_records()
        by_file = self._list().samples_are_files
        default = self.settings["split_group"] or ("file" if by_file else "record")
        division = Division(library, self.layout, self.labels, self.window_plan)
        division.divide(regions, self.split_plan, self.settings["group_column"] or default)
        self._grids = {split: WindowDataset(library, grid, self.case) for split, grid in division.grids.items()}
        if "train" in division.grids:
            self.train = self._training(division)
            self.warmup = self._warmup(division, self.train)
        self.val = self._grids.get("val")
        self.test = self._grids.get("test")
        self.report = division.report(len(self.train) if self.train is not None else 0)
        self._division = division

    def _warmup(self, division: Division, full: TrainingDataset) -> LengthWarmUp | None:
        first = self.settings["warmup_from_bp"]
        if first is None:
            return None
        lengths = window_lengths(first, self.settings["window_bp"])[:-1]
        return LengthWarmUp([*(self._training(division, bp) for bp in lengths), full], self.settings["warmup_epochs"])

    def _check_warmup(self, warmup: LengthWarmUp) -> None:
        epochs = None if self.trainer is None else self.trainer.max_epochs
        if epochs is not None and 0 <= epochs <= warmup.epochs:
            raise UserError(
                f"the warm-up takes {warmup.epochs} epochs and trainer.max_epochs is {epochs}: windows would never "
                "reach window_bp; raise it, or warmup_from_bp, or lower warmup_epochs"
            )
        rank_zero_info(warmup.schedule(self.settings["batch_size"]))

    def _training(self, division: Division, length_bp: int | None = None) -> TrainingDataset:
        """Training windows of `window_bp`, or as many bases of shorter ones."""
        window_bp, grid = self.settings["window_bp"], division.grids["train"]
        times = 1 if length_bp is None else window_bp // length_bp
        random_start = self.settings["sampling"] == "random" and window_bp is not None
        return TrainingDataset(
            division.library,
            division.candidates() if random_start else grid,
            windows_per_epoch=times * (self.settings["windows_per_epoch"] or len(grid)),
            seed=self.settings["seed"],
            window_bp=length_bp or window_bp,
            random_start=random_start,
            balance=self.settings["balance"],
            rc_probability=self.settings["rc_probability"],
            max_n_fraction=self.settings["max_n_fraction"],
            case=self.case,
        )

    def grid(self, split: str) -> WindowDataset:
        """The grid windows of a split in file order; `grid("train")` is what a baseline is fitted on."""
        self.setup()
        if split not in self._grids:
            raise UserError(f"{self.layout.path} has no {split} split: change the split")
        return self._grids[split]

    def train_dataloader(self) -> DataLoader:
        """Resumable to the batch; item order depends on seed and epoch alone."""
        self.setup("fit")
        assert self.train is not None
        rank, ranks = self._rank()
        dataset = self.train if self.warmup is None else self.warmup
        sampler = EpochSampler(dataset, self.settings["batch_size"], ranks, rank)
        if self.trainer is not None:
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        arguments = self._loader_arguments()
        if self.warmup is not None:
            arguments["collate_fn"] = partial(collate_items, collate=arguments["collate_fn"])
        return ResumableLoader(dataset, batch_size=self.settings["batch_size"], sampler=sampler, **arguments)

    def val_dataloader(self) -> DataLoader | list:
        """Grid windows in order; no loader without a validation split."""
        self.setup()
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
        batch_size = self.settings["eval_batch_size"] or self.settings["batch_size"]
        sampler = ShardSampler(dataset, ranks, rank)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **self._loader_arguments())

    def _rank(self) -> tuple[int, int]:
        return data_rank(self.trainer)

    def _loader_arguments(self) -> dict[str, Any]:
        workers = self.settings["num_workers"]
        return {
            "collate_fn": collate_unlabelled if self.case else collate,
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


def _check_arguments(settings: dict[str, Any]) -> None:
    counts = ("window_bp", "stride_bp", "min_window_bp", "windows_per_epoch", "eval_windows")
    for name in (*counts, "batch_size", "eval_batch_size", "warmup_epochs"):
        if settings[name] is not None and settings[name] < 1:
            raise UserError(f"{name} is {settings[name]}: it must be at least 1")
    for name in ("num_workers", "guard_bp", "min_class_windows", "seed"):
        if settings[name] is not None and settings[name] < 0:
            raise UserError(f"{name} is {settings[name]}: it must not be negative")
    for name in ("max_n_fraction", "rc_probability", "val_fraction"):
        if not 0 <= settings[name] <= 1:
            raise UserError(f"{name} is {settings[name]}: it must lie between 0 and 1")
    if settings["warmup_from_bp"] is not None:
        window_lengths(settings["warmup_from_bp"], settings["window_bp"])
        if settings["sampling"] != "random":
            raise UserError("warmup_from_bp needs sampling: random; a grid has windows of one length")
