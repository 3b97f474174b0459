"""Memory that ends, or begins, at a page without access: what reads or writes past it dies of a signal."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

Edge = Literal["begin", "end"]
_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0
_LARGEST = 64 << 20


def guarded_copy(storage: torch.UntypedStorage, edge: Edge) -> Tensor:
    """The bytes of ``storage`` in pages of their own, as uint8, at the given edge of them, with the page beyond closed.

    The page at the other edge is closed, too, but there may be bytes between it and these.
    """
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = storage.nbytes()
    room = -(-size // _PAGE) * _PAGE
    pages = mmap.mmap(-1, room + 2 * _PAGE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for closed in (first, first + _PAGE + room):
        if mprotect(closed, _PAGE, _NO_ACCESS) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE if edge == "begin" else _PAGE + room - size
    result = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=offset)  # keeps the pages
    return result.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))


def tight(x: Tensor) -> Tensor:
    """The same numbers with the same strides, in memory that holds nothing before the first nor after the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.new_empty(last + 1).as_strided(x.shape, x.stride()).copy_(x)


def guard_launches(monkeypatch: pytest.MonkeyPatch, edge: Edge) -> Callable[[], int]:
    """Have Triton's interpreter copy all memory of a kernel's arguments to guarded pages, and back after the launch;
    what is returned says how many launches there were. What is larger than 64 MiB stays where it is: the tests of far
    strides take gigabytes of addresses that nothing stands behind."""
    from triton.runtime.interpreter import GridExecutor

    launches = 0

    def guard_arguments(executor: Any, args: tuple, kwargs: dict) -> tuple[list, dict]:
        nonlocal launches
        launches += 1
        copies: dict[int, Tensor] = {}

        def guard(x: Any) -> Any:
            if not isinstance(x, Tensor) or not 0 < x.untyped_storage().nbytes() <= _LARGEST:
                return x
            storage = x.untyped_storage()
            if storage.data_ptr() not in copies:
                copies[storage.data_ptr()] = guarded_copy(storage, edge)
            memory = copies[storage.data_ptr()].untyped_storage()
            return x.new_empty(0).set_(memory, x.storage_offset(), x.shape, x.stride())

        return [guard(x) for x in args], {name: guard(x) for name, x in kwargs.items()}

    monkeypatch.setattr(GridExecutor, "_init_args_hst", guard_arguments)
    return lambda: launches
