"""Launching Triton kernels over and over, with little work for the CPU; and compiling them side by side at first."""

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

_MOST_LAUNCHERS = 1024
_launchers: dict[tuple, "Launcher"] = {}
_compiled_kinds: set[tuple] = set()
_this_thread = threading.local()


def cdiv(amount: int, size: int) -> int:
    """How many of ``size`` hold ``amount``. Triton's function of this name takes microseconds on the host, as the next
    one does: it looks for compile-time constants among its arguments."""
    return -(-amount // size)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``, which is at least 1."""
    return 1 << (n - 1).bit_length()


class Launcher:
    """Launches kernels, each always with the types, constants and sizes that Triton compiles for.

    So what it compiled is looked up once: every other launch skips the look at each of 20 to 60 arguments, which takes
    longer than the GPU takes for a short sequence.

    Args:
        kind: what the kernels are, but for sizes: the first time that one of a kind is used, kernels are compiled.
        device: the GPU.
    """

    def __init__(self, kind: tuple, device: torch.device) -> None:
        self.kind, self.device = kind, device
        self.ready = device.type != "cuda" or kind in _compiled_kinds
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        """Launch ``kernel`` with its arguments in order, the compile-time constants and options by name and last."""
        waiting = getattr(_this_thread, "launches", None)
        if waiting is not None:
            waiting.append((kernel, programs, args, constants))
            return
        key = (id(kernel), *constants.values(), *[arg is None for arg in args])
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = kernel[(programs,)](*args, **constants)
        else:
            # The constants come last in every kernel and are part of what is compiled: their values are not read.
            compiled[(programs, 1, 1)](*args, *(None,) * (len(kernel.arg_names) - len(args)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """For launches that need nothing from one another but their order on the GPU, with no other work in between.

        The first of a kind wait until the end of the block, where all that they launch is compiled side by side: one
        after another takes three times as long.
        """
        if self.ready:
            yield
            return
        launches: list[tuple[Any, int, tuple, dict]] = []
        _this_thread.launches = launches
        try:
            yield
        finally:
            _this_thread.launches = None
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            # An error is raised below, where the kernel is compiled again.
            triton.AsyncCompileMode(_Loading(pool, self.device), ignore_errors=True),
        ):
            for kernel, programs, args, constants in launches:
                kernel.warmup(*args, grid=(programs,), **constants)
        for kernel, programs, args, constants in launches:
            self(kernel, programs, *args, **constants)
        self.ready = True
        _compiled_kinds.add(self.kind)


class _Loading:
    """An executor for Triton that also loads what it has compiled: that runs the C compiler, for each kernel again."""

    def __init__(self, pool: ThreadPoolExecutor, device: torch.device) -> None:
        self.pool, self.device = pool, device

    def submit(self, compile_kernel: Callable[[], Any]) -> Future:
        return self.pool.submit(self._compile_and_load, compile_kernel)

    def _compile_and_load(self, compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        with torch.cuda.device(self.device):
            kernel[(1, 1, 1)]  # not launched, only looked up
        return kernel


def launcher(*settings: Hashable, tensors: tuple[Tensor | None, ...]) -> Launcher:
    """The launcher for ``settings`` and for the dtypes, layouts and alignments of ``tensors``, the first not None.

    The first two settings name the operator and its pass. Between them, settings and tensors must determine the type of
    every argument of the kernels that it will launch, and the value of every integer among them but those that the
    kernel does not specialise on.
    """
    key = settings + tuple(
        [None if v is None else (v.dtype, v.shape, v.stride(), v.data_ptr() % 16, v.device.index) for v in tensors]
    )
    found = _launchers.get(key)
    if found is None:
        if len(_launchers) >= _MOST_LAUNCHERS:
            _launchers.clear()
        first = tensors[0]
        assert first is not None
        kind = (*settings[:2], *[None if v is None else v.dtype for v in tensors])
        found = _launchers[key] = Launcher(kind, first.device)
    return found
