"""How backend "torch" cuts an SSD scan into parts, slabs and chunks, and the memory that its slabs take in turn."""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens of a chunk, by device. On the CPU 64 was near the best for p = 64 and every n from 16 to 128; on a GPU longer
# chunks mean fewer launches.
_CHUNK = {"cpu": 64, "cuda": 256}

# Elements of one slab's decay matrices (tokens * heads * chunk), by device: the largest temporary.
_SLAB_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}

# Chunks are whole numbers of blocks of so many tokens.
BLOCK = 16


@dataclass(frozen=True)
class Part:
    """Sequences and groups that are scanned together, in one direction, and the grid of chunks and slabs in tokens."""

    rows: slice
    groups: slice
    heads: slice
    backwards: bool
    chunk: int
    slab: int


def grid(x: Tensor, chunk: int | None) -> tuple[int, int]:
    """Tokens of a chunk and of a slab, a whole number of chunks."""
    l, h = x.shape[1:3]
    chunk = _round_up(min(chunk or _CHUNK.get(x.device.type, _CHUNK["cuda"]), l), BLOCK)
    return chunk, chunk * _slab_chunks(x.device.type, h, chunk)


def _slab_chunks(device: str, h: int, chunk: int) -> int:
    """Chunks of a slab."""
    budget = _SLAB_ELEMENTS.get(device, _SLAB_ELEMENTS["cuda"])
    return max(1, budget // (h * chunk * chunk))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def parts(x: Tensor, B: Tensor, chunk: int | None, reverse: tuple[bool, ...]) -> Iterator[Part]:
    """Runs of groups of one direction, and within them as many sequences at once as fill a slab."""
    b, l, h, _ = x.shape
    g = B.shape[2]
    q, slab = grid(x, chunk)
    rows = max(1, slab // l)
    first = 0
    for last in range(1, g + 1):
        if last < g and reverse[last] == reverse[first]:
            continue
        groups, heads = slice(first, last), slice(first * (h // g), last * (h // g))
        for row in range(0, b, rows):
            yield Part(slice(row, min(row + rows, b)), groups, heads, reverse[first], q, slab)
        first = last


class Memory(threading.local):
    """Named pieces of memory that a thread uses again for every slab and every call.

    On the CPU fresh pages from the operating system cost as much as the arithmetic on them. A GPU's allocator keeps its
    memory itself: there the pieces are allocated each time.
    """

    # What is kept between calls. Slabs are far smaller, but for very long chunks.
    KEPT_BYTES = 2**27

    def __init__(self) -> None:
        self.pieces: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}  # memory, and the last view of it

    def get(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory, valid until ``name`` is asked for again."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        memory, view = self.pieces.get((name, like.dtype), (None, None))
        if view is not None and view.shape == shape:
            return view
        size = math.prod(shape)
        with torch.inference_mode(False):  # memory first asked for in inference mode must serve in training too
            if memory is None or memory.numel() < size:
                memory = torch.empty(size, dtype=like.dtype)
            view = memory[:size].view(shape)
        self.pieces[name, like.dtype] = memory, view
        return view

    def trim(self) -> None:
        """Give back what an unusual call took."""
        if sum(memory.nbytes for memory, _ in self.pieces.values()) > self.KEPT_BYTES:
            self.pieces.clear()


memory = Memory()
