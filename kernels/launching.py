"""Launching Triton kernels over and over, with little work for the CPU."""

from collections.abc import Hashable
from typing import Any

from torch import Tensor

_MOST_LAUNCHERS = 1024
_launchers: dict[tuple, "Launcher"] = {}


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
    """

    def __init__(self) -> None:
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        """Launch ``kernel`` with its arguments in order, the compile-time constants and options by name and last."""
        key = (id(kernel), *constants.values(), *[arg is None for arg in args])
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = kernel[(programs,)](*args, **constants)
        else:
            # The constants come last in every kernel and are part of what is compiled: their values are not read.
            compiled[(programs, 1, 1)](*args, *(None,) * (len(kernel.arg_names) - len(args)))


def launcher(*settings: Hashable, tensors: tuple[Tensor | None, ...]) -> Launcher:
    """The launcher for ``settings`` and for the dtypes, layouts and alignments of ``tensors``.

    Between them they must determine the type of every argument of the kernels that it will launch, and the value of
    every integer among them but those that the kernel does not specialise on.
    """
    key = settings + tuple(
        None if v is None else (v.dtype, v.shape, v.stride(), v.data_ptr() % 16, v.device.index) for v in tensors
    )
    found = _launchers.get(key)
    if found is None:
        if len(_launchers) >= _MOST_LAUNCHERS:
            _launchers.clear()
        found = _launchers[key] = Launcher()
    return found
