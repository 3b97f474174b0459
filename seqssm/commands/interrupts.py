"""Interrupts that end a live stream as its own end would."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def until_interrupted(packets: Iterable[T]) -> Iterator[Iterator[T]]:
    """The packets; an interrupt ends them as the end of the stream would, once what came in has been heard."""
    waiting = asked = False

    def interrupt(*_: object) -> None:
        nonlocal asked
        if waiting or asked:
            raise KeyboardInterrupt
        asked = True

    def until() -> Iterator[T]:
        nonlocal waiting, asked
        source = iter(packets)
        while not asked:
            try:
                waiting = True
                packet = next(source)
            except (StopIteration, KeyboardInterrupt):
                asked = True
                return
            finally:
                waiting = False
            yield packet

    try:
        before = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not in the main thread, where interrupts arrive
        yield until()
        return
    try:
        yield until()
    finally:
        signal.signal(signal.SIGINT, before)
