import importlib

import pytest
from guarded import guard_launches
from interpreter import INTERPRET


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, a kernel that reads or writes behind a tensor's memory ends the process."""
    if INTERPRET:
        guard_launches(monkeypatch, "end")


TINY = {
    "selective_scan": {
        "CHUNK": 8,
        "_SEGMENT": 8,
        "_SHORTEST_SEGMENT": 4,
        "_HISTORY_BYTES": 1,
        "_TILE": 4,
        "_BLOCK": 32,
        "_SPAN": 2,
    },
    "causal_conv1d": {"_BLOCK": 16, "_SEGMENT": 16, "_SHORTEST_SEGMENT": 8},
    "ssd": {
        "_CHUNK": {False: 16, True: 16},
        "_BLOCK_P": {False: 16, True: 16},
        "_SUM_BLOCK_N": {False: 16, True: 16},
        "_SEGMENT": 32,
        "_SHORTEST_SEGMENT": 32,
        "_KEPT_BYTES": 1,
    },
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, chunks, segments, slabs and spans so small that a few dozen tokens have several of each."""
    for operator, sizes in TINY.items():
        module = importlib.import_module(f"seqssm.kernels.{operator}.triton")
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
