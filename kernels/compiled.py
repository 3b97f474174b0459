"""Functions that Numba compiles at first use, with no build step, and threads to run them on."""

import collections
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from torch import Tensor

_WORTH_A_THREAD = 1 << 16  # elements: some 50 microseconds

# Multiply-adds may fuse; nothing else is relaxed: NaN and infinity keep their meaning, and results their bits.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def inlined(function: Callable) -> Any:
    """``numba.njit`` for what kernels are made of: inlined, since a call would spill every vector."""
    return numba.njit(forceinline=True, **_OPTIONS)(function)


def kernel(function: Callable) -> Any:
    """``numba.njit`` for a kernel: compiled at its first call and kept on disk, without the GIL.

    Pass it integers and tuples of integers only, so that there is one version of it. Numba looks for a newer version in
    the kernel's own file alone: after a change to what it is made of elsewhere, remove ``__pycache__``.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder can be written to: compile in every process
        return numba.njit(**_OPTIONS)(function)


def addressable(x: Tensor) -> Tensor:
    """``x`` in float32 with neighbours in its last dimension next to each other; copies only if it is not."""
    if x.dtype != torch.float32 or x.stride(-1) != 1 or x.requires_grad:
        x = x.detach().float()
        x = x if x.stride(-1) == 1 else x.contiguous()
    return x


def parallel(function: Callable, tasks: int, work: int, scratch: int, *arguments: object) -> None:
    """Run the compiled ``function(first, last, scratch, *arguments)`` over all tasks, on as many threads as torch uses.

    ``work`` is the number of elements to go through: little work stays on few threads. Each thread has ``scratch``
    floats of its own and takes a few tasks at a time. Numba's own threads are not used: they must not be entered from
    two threads at once, nor after a fork.
    """
    threads = min(torch.get_num_threads(), tasks, 1 + work // _WORTH_A_THREAD)
    if threads == 1:
        own = torch.empty(scratch)
        function(0, tasks, own.data_ptr(), *arguments)
        return
    pieces = min(tasks, 4 * threads)
    waiting = collections.deque((tasks * i // pieces, tasks * (i + 1) // pieces) for i in range(pieces))

    def run() -> None:
        own = torch.empty(scratch)
        while True:
            try:
                first, last = waiting.popleft()
            except IndexError:
                return
            function(first, last, own.data_ptr(), *arguments)

    helpers = [_pool(os.getpid()).submit(run) for _ in range(threads - 1)]
    run()
    for helper in helpers:
        helper.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process: those of a parent do not live on after a fork."""
    return ThreadPoolExecutor(thread_name_prefix="seqssm")
