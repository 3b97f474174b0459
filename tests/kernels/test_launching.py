"""Launches of a pass: in order, compiled together the first time, looked up afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from seqssm.kernels import launching
from seqssm.kernels.launching import Launcher, cdiv, next_power_of_2


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_compiled_kinds", set())


class Kernel:
    """Stands in for a Triton function: writes down when it is compiled ahead, looked at in full, and launched."""

    def __init__(self, name: str, log: list[tuple]) -> None:
        self.name, self.log = name, log
        self.arg_names = ["x", "n", "BLOCK"]

    def warmup(self, *args: Any, grid: tuple[int, ...], **constants: Any) -> None:
        self.log.append(("compile", self.name))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(x: Any, n: int, BLOCK: int) -> "Compiled":
            self.log.append(("first", self.name, grid, n, BLOCK))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda x, n, BLOCK: self.kernel.log.append(("again", self.kernel.name, grid, n, BLOCK))


def test_first_launches_are_compiled_together_and_keep_their_order() -> None:
    log: list[tuple] = []
    a, b = Kernel("a", log), Kernel("b", log)
    for _ in range(2):
        launch = Launcher(("scan", "forward"), torch.device("cuda", 0))
        with launch.together():
            launch(a, 5, None, 1, BLOCK=8)
            launch(b, 6, None, 2, BLOCK=8)
            launch(a, 7, None, 3, BLOCK=8)
    runs = [("first", "a", (5,), 1, 8), ("first", "b", (6,), 2, 8), ("again", "a", (7, 1, 1), 3, None)]
    # Another size of the same kind has a launcher of its own, but nothing is compiled ahead for it.
    assert log == [("compile", "a"), ("compile", "b"), ("compile", "a"), *runs, *runs]


def test_nothing_is_launched_when_the_work_fails() -> None:
    log: list[tuple] = []
    launch, kernel = Launcher(("scan", "forward"), torch.device("cuda", 0)), Kernel("a", log)

    def work() -> None:
        with launch.together():
            launch(kernel, 1, None, 1, BLOCK=8)
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        work()
    assert log == []
    launch(kernel, 1, None, 1, BLOCK=8)
    assert log == [("first", "a", (1,), 1, 8)]


def test_another_constant_or_an_absent_argument_is_another_compilation() -> None:
    log: list[tuple] = []
    launch, kernel = Launcher(("scan", "forward"), torch.device("cpu")), Kernel("a", log)
    with launch.together():  # nothing is compiled for a CPU: the interpreter runs at once
        for x, block in ((None, 8), (1, 8), (1, 16), (None, 8)):
            launch(kernel, 1, x, 4, BLOCK=block)
    assert [entry[0] for entry in log] == ["first", "first", "first", "again"]


def test_integers() -> None:
    assert [cdiv(n, 4) for n in (0, 1, 4, 5, 2**40 + 1)] == [0, 1, 1, 2, 2**38 + 1]
    assert [next_power_of_2(n) for n in (1, 2, 3, 4, 5, 2**40 + 1)] == [1, 2, 4, 4, 8, 2**41]
