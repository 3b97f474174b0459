"""What a DNA model says along whole chromosomes: bins of positions, exactly as if the record were read in one piece."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.backbone import Backbone
from seqssm.data.dna.indexing import Sequences
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.sweeps import FolderStore, MemoryStore, Sweeper
from seqssm.tasks.dna_layers import SequenceEmbedding
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.network import Network

BLOCK_BINS = 1 << 14  # scored and written at once
MOST_POOLED_BINS = (1 << 16) - 1
STATE = "state.json"


class DNAModel(Protocol):
    """What the bins are made with: any DNA task."""

    embedding: SequenceEmbedding
    backbone: Backbone


@dataclass(frozen=True)
class TrackPlan:
    """How a record becomes rows.

    Args:
        bin_bp: bases a row.
        pool_bp: bases, centred on the row and cut off at the record's ends, that the model's own pooling pools for it:
            the windows that the model was trained on, say. An odd number of bins, rounded up. The outputs pooled always
            depend on the whole record, as far as the model's directions reach.
        both_strands: average with what the model says of the other strand.
        chunk: positions of the backbone at once; memory grows with it.
    """

    bin_bp: int
    pool_bp: int
    both_strands: bool
    chunk: int = 1 << 16

    @property
    def side(self) -> int:
        """Bins pooled to either side of a row's own."""
        return -(-max(self.pool_bp - self.bin_bp, 0) // (2 * self.bin_bp))

    def fitted(self, patch: int) -> TrackPlan:
        """With chunks of whole bins.

        Raises:
            UserError: sizes do not fit the model or each other.
        """
        if self.bin_bp < 1 or self.bin_bp % patch:
            raise UserError(f"--bin-bp {self.bin_bp} must be a positive multiple of the model's patch, {patch} bp")
        positions = self.bin_bp // patch
        if positions > self.chunk:
            raise UserError(
                f"--bin-bp {self.bin_bp} is more than {self.chunk * patch} bases a row: give a shorter one, and pool "
                "over more with --window-bp"
            )
        if 2 * self.side + 1 > MOST_POOLED_BINS:
            raise UserError(
                f"--window-bp {self.pool_bp} pools {2 * self.side + 1} rows of --bin-bp {self.bin_bp} for each: "
                f"more than {MOST_POOLED_BINS}; make the rows longer"
            )
        return TrackPlan(self.bin_bp, self.pool_bp, self.both_strands, self.chunk - self.chunk % positions)


class Rows(NamedTuple):
    """Consecutive rows of one record.

    Attributes:
        record: its name.
        first: number of the first of them among the rows of all records.
        start_bp, end_bp: (n,) 0-based, half-open.
        probabilities: (n, c), or None from a model without classes.
        empty: (n,) whether there is nothing but N.
        embeddings: (n, d) mean outputs of the backbone over each row's bases, strands averaged.
    """

    record: str
    first: int
    start_bp: np.ndarray
    end_bp: np.ndarray
    probabilities: np.ndarray | None
    empty: np.ndarray
    embeddings: np.ndarray


class RowFile(Protocol):
    """Takes rows in order, and can go back to where it was."""

    def write(self, rows: Rows) -> None: ...

    def mark(self) -> Any:
        """Where it is, as JSON data; what was written before must survive a kill."""

    def rewind(self, mark: Any) -> None:
        """Go back to where a :meth:`mark` was, perhaps another process's."""


class Tracks:
    """Rows of every record of a file, in a run that can be killed and taken up again.

    Args:
        task: in evaluation mode, with ``embedding`` and ``backbone``; a :class:`DNANetwork` gives probabilities.
        sequences: the records.
        plan: how they become rows.
        folder: for what must wait on disk; removed by the caller, once the run is complete.
        settings: whatever determines the result, JSON data; a run in ``folder`` with others is refused.
        autocast: run the backbone in bfloat16.

    Raises:
        UserError: the model needs aligned windows, or its memory would grow with the record; the folder holds another
            run.
    """

    def __init__(
        self,
        task: Network,
        sequences: Sequences,
        plan: TrackPlan,
        folder: Path,
        settings: dict[str, Any],
        autocast: bool = False,
    ) -> None:
        model: Any = task
        self.task, self.model, self.sequences = task, model, sequences
        self.plan = plan.fitted(model.embedding.patch)
        self.folder = folder
        self.autocast = autocast
        self.strands = 2 if model.backbone.config.reverse_complement else 1
        self.parts = ["mean"]
        if isinstance(task, DNANetwork):
            task.check_unaligned()
            mode = task.pooling.mode
            self.parts += {"mean": [], "mean_max": ["max"]}.get(mode, [mode])
            if mode == "last" and self.plan.side:
                raise UserError("this model's answer is its last position's: --window-bp must be 0, for none to pool")
        # The other strand of an equivariant model says the same.
        self.views = [False, True] if plan.both_strands and self.strands == 1 else [False]
        self.bins = -(-sequences.lengths // self.plan.bin_bp)  # (r,)
        self.settings = {**settings, "plan": asdict(self.plan)}
        self._sweepers(0)  # refuses what cannot be swept

    def work_bp(self) -> int:
        """What ``advance`` of :meth:`run` adds up to."""
        sweeps = sum(len(sweeper.sweeps) for sweeper in self._sweepers(0))
        return int(self.sequences.lengths.sum()) * sweeps

    def spilled_bytes(self) -> int:
        """About how much the longest record takes on disk while it is worked on."""
        longest = int(self.sequences.lengths.argmax())
        wait = max(sweeper.spilled_bytes() for sweeper in self._sweepers(longest))
        return wait + len(self.views) * int(self.bins[longest]) * len(self.parts) * self.model.backbone.d_out * 4

    def _sweepers(self, record: int) -> list[Sweeper]:
        positions = -(-int(self.sequences.lengths[record]) // self.model.embedding.patch)
        return [Sweeper(self.model.backbone, positions, self.plan.chunk, reverse=view) for view in self.views]

    def run(
        self, files: list[RowFile], advance: Callable[[int], None] = lambda bases: None, snapshot_s: float = 10.0
    ) -> bool:
        """Write the rows of all records, or those that are missing.

        Args:
            files: where they go; each is rewound to where the interrupted run had come.
            advance: told of bases done, those of an interrupted run included.
            snapshot_s: seconds between two snapshots.

        Returns:
            Whether an interrupted run was taken up.
        """
        resumed = self._read_state()
        state = resumed or {"record": 0, "block": 0, "files": [file.mark() for file in files]}
        for file, mark in zip(files, state["files"], strict=True):
            file.rewind(mark)
        if resumed is None:
            self._save_state(0, 0, files)
        lengths = self.sequences.lengths
        advance(int(lengths[: state["record"]].sum()) * sum(len(s.sweeps) for s in self._sweepers(0)))
        saved_at = time.monotonic()
        for record in range(state["record"], len(lengths)):
            bins = self._bins(record, advance, snapshot_s)
            blocks = -(-int(self.bins[record]) // BLOCK_BINS)
            for block in range(state["block"] if record == state["record"] else 0, blocks):
                rows = self._rows(record, bins, block)
                for file in files:
                    file.write(rows)
                if block + 1 < blocks and time.monotonic() - saved_at >= snapshot_s:
                    self._save_state(record, block + 1, files)
                    saved_at = time.monotonic()
            large = self._folder(record, 0).exists()
            if large or time.monotonic() - saved_at >= snapshot_s:
                self._save_state(record + 1, 0, files)
                saved_at = time.monotonic()
            for view in range(len(self.views)):
                shutil.rmtree(self._folder(record, view), ignore_errors=True)
        return resumed is not None

    # ---- one record ------------------------------------------------------------------------------------------------

    def _folder(self, record: int, view: int) -> Path:
        return self.folder / f"record{record}-{view}"

    @torch.inference_mode()
    def _bins(self, record: int, advance: Callable[[int], None], snapshot_s: float) -> list[np.ndarray]:
        """A view each: (bins, parts, d_out) float32, pooled within each bin; a memory map for a long record."""
        length, patch = int(self.sequences.lengths[record]), self.model.embedding.patch
        positions = self.plan.bin_bp // patch
        shape = (int(self.bins[record]), len(self.parts), self.model.backbone.d_out)
        result = []
        for number, (view, sweeper) in enumerate(zip(self.views, self._sweepers(record), strict=True)):
            if sweeper.chunks == 1:
                bins, store = np.empty(shape, np.float32), MemoryStore()
            else:
                folder = self._folder(record, number)
                store = FolderStore(folder, self.task.device)  # type: ignore[assignment]
                path = folder / "bins.f32"
                bins = np.memmap(path, np.float32, "r+" if path.exists() else "w+", shape=shape)

            def emit(start: int, end: int, y: Tensor, bins: np.ndarray = bins, view: bool = view) -> None:
                pooled = pool_within_bins(y[0].float(), positions, self.parts, self._against(view))
                bins[start // positions : -(-end // positions)] = pooled.cpu().numpy()

            def embed(start: int, end: int, view: bool = view) -> Tensor:
                return self._embed(record, length, start, end, view)

            def tell(count: int) -> None:
                advance(count * patch)

            with torch.autocast(self.task.device.type, torch.bfloat16, self.autocast):
                sweeper.run(embed, emit, store, tell, snapshot_s)
            result.append(bins)
        return result

    def _against(self, view: bool) -> list[bool]:
        """Of each strand: whether it is read from right to left."""
        return [view, not view][: self.strands]

    def _embed(self, record: int, length: int, start: int, end: int, view: bool) -> Tensor:
        def read(start_bp: int, end_bp: int) -> Tensor:
            return torch.from_numpy(self.sequences.tokens(record, start_bp, end_bp))

        span = self.model.embedding.span
        return torch.cat([span(read, length, start, end, other) for other in self._against(view)], dim=-1)

    @torch.inference_mode()
    def _rows(self, record: int, views: list[np.ndarray], block: int) -> Rows:
        first, count = block * BLOCK_BINS, int(self.bins[record])
        last = min(first + BLOCK_BINS, count)
        length, size, side = int(self.sequences.lengths[record]), self.plan.bin_bp, self.plan.side
        low, high = max(first - side, 0), min(last + side, count)
        start_bp = np.arange(low, high, dtype=np.int64) * size
        bases = np.minimum(start_bp + size, length) - start_bp
        own = slice(first - low, last - low)
        probabilities, embeddings = [], []
        for bins in views:
            near = torch.from_numpy(np.ascontiguousarray(bins[low:high])).to(self.task.device)
            mean = near[own, 0].unflatten(-1, (self.strands, -1)).mean(-2)
            embeddings.append(mean.cpu().numpy())
            if isinstance(self.task, DNANetwork):
                weights = torch.from_numpy(-(-bases // self.model.embedding.patch)).to(self.task.device)
                pooled = pool_over_bins(near, weights, self.parts, side)[own]  # (n, parts, d_out)
                if self.task.pooling.mode in ("max", "last"):
                    pooled = pooled[:, 1:]
                pooled = pooled.unflatten(-1, (self.strands, -1)).mean(-2).flatten(1)
                logits = self.task.score(pooled.to(next(self.task.head.parameters()).dtype))
                probabilities.append((logits + self._composition(record, low, high)[own]).softmax(-1))
        records = np.full(last - first, record)
        n_count = self.sequences.n_count(records, start_bp[own], start_bp[own] + bases[own])
        return Rows(
            self.sequences.names[record],
            int(self.bins[:record].sum()) + first,
            start_bp[own],
            start_bp[own] + bases[own],
            torch.stack(probabilities).mean(0).float().cpu().numpy() if probabilities else None,
            n_count == bases[own],
            np.mean(embeddings, axis=0),
        )

    def _composition(self, record: int, low: int, high: int) -> Tensor:
        """(high - low, c) logits of the k-mers that end within what is pooled for each bin; zeros without them."""
        assert isinstance(self.task, DNANetwork)
        composition, size = self.task.composition, self.plan.bin_bp
        if composition is None:
            return torch.zeros(high - low, len(self.task.labels), device=self.task.device)
        start, end = low * size, min(high * size, int(self.sequences.lengths[record]))
        before = min(start, composition.k - 1)
        values, whole = composition.along(torch.from_numpy(self.sequences.tokens(record, start - before, end)))
        missing = (high - low) * size - (end - start)  # the last bin of a record may be shorter
        count = F.pad(whole[before:], (0, missing)).view(-1, size).sum(1)
        sums = F.pad(values[before:], (0, 0, 0, missing)).view(-1, size, values.shape[1]).sum(1, dtype=torch.float64)
        means = (sums / count.clamp(min=1)[:, None])[:, None]
        return pool_over_bins(means, count, ["mean"], self.plan.side)[:, 0].nan_to_num().float() + composition.bias

    # ---- resumption ------------------------------------------------------------------------------------------------

    def _save_state(self, record: int, block: int, files: list[RowFile]) -> None:
        state = {"settings": self.settings, "record": record, "block": block, "files": [f.mark() for f in files]}
        with atomic_write(self.folder / STATE) as file:
            json.dump(state, file)

    def _read_state(self) -> dict[str, Any] | None:
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            state = json.loads(path.read_text())
            found = state["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged; delete {self.folder} to start again") from error
        differing = sorted(k for k in {*found, *self.settings} if found.get(k) != self.settings.get(k))
        if differing:
            raise UserError(
                f"{self.folder} holds an interrupted run with another {', '.join(differing)}: give the same as then to "
                "go on with it, or delete the folder to start again"
            )
        return state


def pool_within_bins(y: Tensor, positions: int, parts: list[str], against: list[bool]) -> Tensor:
    """Pool each run of positions, the last perhaps shorter: (l, d_out) to (bins, parts, d_out).

    ``against`` says of each strand, side by side in d_out, whether its last position is the leftmost.
    """
    whole = len(y) // positions * positions
    groups = [y[:whole].unflatten(0, (-1, positions))] if whole else []
    groups += [y[None, whole:]] if whole < len(y) else []

    def last(group: Tensor) -> Tensor:
        strands = group.chunk(len(against), dim=-1)
        return torch.cat([s[:, 0 if left else -1] for s, left in zip(strands, against, strict=True)], dim=-1)

    pool: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda g: g.mean(1),
        "max": lambda g: g.amax(1),
        "last": last,
    }
    return torch.cat([torch.stack([pool[part](group) for part in parts], dim=1) for group in groups])


def pool_over_bins(bins: Tensor, weights: Tensor, parts: list[str], side: int) -> Tensor:
    """Pool each bin with ``side`` neighbours to either side, as far as there are any.

    bins (n, parts, d) and their positions, weights (n,), to (n, parts, d): weighted means, maxima; ``last`` stays.
    """
    if not side:
        return bins
    n = len(bins)
    at = torch.arange(n, device=bins.device)
    low, high = (at - side).clamp(min=0), (at + side + 1).clamp(max=n)
    result = []
    for number, part in enumerate(parts):
        own = bins[:, number]
        if part == "mean":
            # In float64: differences of running sums lose digits.
            sums = F.pad((own.double() * weights[:, None]).cumsum(0), (0, 0, 1, 0))
            total = F.pad(weights.double().cumsum(0), (1, 0))
            own = ((sums[high] - sums[low]) / (total[high] - total[low])[:, None]).to(own.dtype)
        elif part == "max":
            own = F.max_pool1d(own.T[None], 2 * side + 1, stride=1, padding=side)[0].T
        result.append(own)
    return torch.stack(result, dim=1)
