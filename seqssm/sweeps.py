"""Sequences of any length through any backbone of state-space layers: exactly, in constant memory, resumable.

A causal backbone needs one sweep over the sequence, its state carried from chunk to chunk. A layer that reads both ways
needs a sweep in each direction. The sweeps of neighbouring layers are joined: while one sweep, say to the right, adds
up the two readings of layer i, its outputs appear from left to right, so that the same sweep already runs the rightward
readings of layer i + 1. Of those only the states at the chunks' borders are kept; the next sweep, to the left, runs
each chunk's rightward readings once more, from the state at its border, beside the leftward ones. So l layers that read
both ways take l + 1 sweeps. On disk are border states and, between two sweeps, one layer's input; in memory is a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from seqssm.backbone import Backbone
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.mixers import State
from seqssm.mixers.base import Reading

SNAPSHOT_FORMAT = "seqssm-sweeps-1"
SNAPSHOT = "progress.safetensors"

Embed = Callable[[int, int], Tensor]
"""The backbone's input at positions start to end: (1, end - start, d_out)."""
Emit = Callable[[int, int, Tensor], None]
"""Takes the backbone's output (1, end - start, d_out) at positions start to end: every position once a run, chunk by
chunk, from the left or from the right; after a resumption, some chunks a second time."""


class Store(Protocol):
    """Where tensors wait between sweeps, and where a run can be taken up again."""

    def put(self, key: str, tensors: State) -> None: ...

    def get(self, key: str) -> State: ...

    def discard(self, key: str) -> None:
        """What ``key`` holds is needed no more, from the next snapshot on."""

    def save(self, state: State, about: dict[str, str]) -> None:
        """Remember how far the run has come; replaces what was saved before."""

    def saved(self) -> tuple[State, dict[str, str]] | None:
        """What was saved last, if anything."""


class MemoryStore:
    """For sequences so short that a layer's whole input fits in memory; such a run starts again from its beginning."""

    def __init__(self) -> None:
        self._tensors: dict[str, State] = {}

    def put(self, key: str, tensors: State) -> None:
        self._tensors[key] = tensors

    def get(self, key: str) -> State:
        return self._tensors[key]

    def discard(self, key: str) -> None:
        self._tensors.pop(key, None)

    def save(self, state: State, about: dict[str, str]) -> None:
        pass

    def saved(self) -> tuple[State, dict[str, str]] | None:
        return None


class FolderStore:
    """A safetensors file a key. A killed run leaves a folder that another process can go on with.

    Args:
        folder: made where it is missing.
        device: where tensors are to be when they are read.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = folder, torch.device(device)
        folder.mkdir(parents=True, exist_ok=True)
        self._stale: list[str] = []

    def put(self, key: str, tensors: State) -> None:
        # Not atomic: a file that a kill cut short belongs to a chunk behind the last snapshot, and is written again.
        try:
            save_file({k: v.cpu().contiguous().clone() for k, v in tensors.items()}, self._path(key))
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write to {self.folder}: {error}; free space there, then run again") from error

    def get(self, key: str) -> State:
        try:
            return load_file(self._path(key), device=str(self.device))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._path(key)} is missing or damaged ({error}); delete {self.folder}") from error

    def discard(self, key: str) -> None:
        self._stale.append(key)

    def save(self, state: State, about: dict[str, str]) -> None:
        blob = save(
            {key: value.cpu().contiguous().clone() for key, value in state.items()},
            metadata={**about, "format": SNAPSHOT_FORMAT},
        )
        with atomic_write(self.folder / SNAPSHOT, "wb") as file:
            file.write(blob)
        for key in self._stale:
            self._path(key).unlink(missing_ok=True)
        self._stale.clear()

    def saved(self) -> tuple[State, dict[str, str]] | None:
        path = self.folder / SNAPSHOT
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                about = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); delete {self.folder} to start again") from error
        if about.get("format") != SNAPSHOT_FORMAT:
            raise UserError(f"{path} is of another version; delete {self.folder} to start again")
        return state, about

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


class Sweep(NamedTuple):
    """One way over the sequence: finishes the layers ``first`` to ``last`` - 1, and begins with ``last``."""

    reverse: bool
    first: int
    last: int


class Sweeper:
    """Runs a backbone over one sequence, chunk by chunk.

    Args:
        backbone: in evaluation mode, of any directions; attention only with a window, and causal.
        length: positions l of the sequence.
        chunk: positions at once, on a fixed grid from the left: memory is proportional to it, results are not changed
            beyond rounding. A resumed run repeats an uninterrupted one to the bit.
        reverse: turn all directions around: reads the sequence as another strand would be.

    Attributes:
        sweeps: the plan.

    Raises:
        UserError: a layer's state is not of bounded size.
        ValueError: the backbone is in training mode, or a size is not positive.
    """

    def __init__(self, backbone: Backbone, length: int, chunk: int = 1 << 16, reverse: bool = False) -> None:
        if length < 1 or chunk < 1:
            raise ValueError(f"length and chunk must be positive, got {length} and {chunk}")
        if backbone.training:
            raise ValueError("sweeps need the model in evaluation mode: call model.eval()")
        self.backbone, self.length, self.chunk = backbone, length, chunk
        self.strands = 2 if backbone.config.reverse_complement else 1
        self._readings = [block.mixer.readings(reverse) for block in backbone.blocks]
        plans = [_plan(self._readings, start) for start in (False, True)]
        self.sweeps = min(plans, key=len)
        self.chunks = -(-length // chunk)

    def spilled_bytes(self) -> int:
        """About how much a :class:`FolderStore` takes at most, without the states."""
        spills = any(0 < sweep.last < len(self._readings) for sweep in self.sweeps)
        return 4 * self.length * self.backbone.d_out if spills else 0

    @torch.inference_mode()
    def run(
        self,
        embed: Embed,
        emit: Emit,
        store: Store,
        advance: Callable[[int], None] = lambda positions: None,
        snapshot_s: float = 10.0,
    ) -> None:
        """Run, or go on with the run that ``store`` remembers.

        Args:
            embed: gives the input.
            emit: takes the output.
            store: holds what must wait.
            advance: told of the positions of each chunk, in every sweep.
            snapshot_s: seconds between two snapshots.
        """
        first_sweep, first_chunk, carry = 0, 0, State()
        resumed = store.saved()
        if resumed is not None:
            carry, about = resumed
            first_sweep, first_chunk = int(about["sweep"]), int(about["chunks"])
            chunks_done = self._order(self.sweeps[first_sweep])[:first_chunk] if first_chunk else []
            advance(first_sweep * self.length + sum(self._size(at) for at in chunks_done))
        saved_at = time.monotonic()
        for number, sweep in enumerate(self.sweeps[first_sweep:], start=first_sweep):
            for done, at in enumerate(self._order(sweep)[first_chunk:], start=first_chunk + 1):
                self._advance(sweep, at, embed, emit, store, carry)
                advance(self._size(at))
                if time.monotonic() - saved_at >= snapshot_s:
                    store.save(carry, {"sweep": str(number), "chunks": str(done)})
                    saved_at = time.monotonic()
            carry.clear()
            first_chunk = 0
            store.save(carry, {"sweep": str(number + 1), "chunks": "0"})

    def _order(self, sweep: Sweep) -> range:
        return range(self.chunks - 1, -1, -1) if sweep.reverse else range(self.chunks)

    def _size(self, at: int) -> int:
        return min(self.chunk, self.length - at * self.chunk)

    def _advance(self, sweep: Sweep, at: int, embed: Embed, emit: Emit, store: Store, carry: State) -> None:
        """One chunk of a sweep; ``carry`` holds the states of the readings in its direction, and moves on."""
        start, end = at * self.chunk, at * self.chunk + self._size(at)
        if sweep.first == 0:
            x = embed(start, end)
            if self.backbone.config.residual_in_fp32:
                x = x.to(torch.promote_types(x.dtype, torch.float32))
        else:
            x = store.get(f"x{sweep.first}-{at}")["x"]
            store.discard(f"x{sweep.first}-{at}")
        blocks = self.backbone.blocks
        for layer in range(sweep.first, sweep.last):
            border = State()
            if any(reading.reverse != sweep.reverse for reading in self._readings[layer]):
                border = store.get(f"s{layer}-{at}")
                store.discard(f"s{layer}-{at}")
            y = self._mix(layer, x, sweep.reverse, carry, border)
            x = blocks[layer].feed_forward(x + y)
        if sweep.last == len(blocks):
            emit(start, end, self.backbone.norm(x, strands=self.strands)[1])
            return
        # The next layer has readings against this sweep: keep the states with which the others enter this chunk.
        prefix = f"{sweep.last}."
        store.put(f"s{sweep.last}-{at}", {k: v for k, v in carry.items() if k.startswith(prefix)})
        if sweep.last > 0:
            store.put(f"x{sweep.last}-{at}", {"x": x})
        if at != (0 if sweep.reverse else self.chunks - 1):  # nobody asks for the state behind the last chunk
            self._mix(sweep.last, x, sweep.reverse, carry, None)

    def _mix(self, layer: int, x: Tensor, reverse: bool, carry: State, border: State | None) -> Tensor:
        """The sum of a layer's readings of x (1, n, d_out), of those in the sweep's direction alone without border.

        States have keys such as ``3.0.scan``: layer, reading, key.
        """
        parts = self.backbone.blocks[layer].norm(x, strands=self.strands)[1].chunk(self.strands, dim=-1)
        outputs: list[Tensor | None] = [None] * self.strands
        for number, reading in enumerate(self._readings[layer]):
            along = reading.reverse == reverse
            if not along and border is None:
                continue
            source = carry if along else border
            prefix = f"{layer}.{number}."
            assert source is not None
            state = {k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)}
            y, state = reading.mixer(parts[reading.strand], state or None, reverse=reading.reverse)
            if along:
                carry.update({f"{prefix}{key}": value for key, value in state.items()})
            before = outputs[reading.strand]
            outputs[reading.strand] = y if before is None else before + y
        return torch.cat([torch.zeros_like(p) if y is None else y for p, y in zip(parts, outputs, strict=True)], dim=-1)


def _plan(readings: list[list[Reading]], reverse: bool) -> list[Sweep]:
    """The sweeps, in turn in either direction, that finish all layers, when the first goes in the given one."""
    sweeps: list[Sweep] = []
    first = 0
    while True:
        last = first
        while last < len(readings):
            # The sweep before, in the other direction, has begun with the layer that this one starts at.
            begun = bool(sweeps) and last == first
            if not begun and any(reading.reverse != reverse for reading in readings[last]):
                break
            last += 1
        sweeps.append(Sweep(reverse, first, last))
        if last == len(readings):
            return sweeps
        first, reverse = last, not reverse
