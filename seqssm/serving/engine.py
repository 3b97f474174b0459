"""The models behind the server: each in a thread of its own, hearing many streams, while the event loop goes on."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from seqssm.tasks.asr_network import ASRNetwork
from seqssm.tasks.asr_stream import Session, SlotTable
from seqssm.tasks.decoding.emissions import Decoder
from seqssm.tasks.events import Change, EventDetector
from seqssm.tasks.tagging_network import TaggingNetwork
from seqssm.tasks.tagging_stream import LiveTagger
from seqssm.tasks.transcripts import EndpointRules, Result

log = logging.getLogger("seqssm.serving")
PIECE_S = 0.25
"""Sound is handed to the models in pieces of so much at most, whatever the client's frames: no client's large frame
keeps the others waiting."""


@dataclass
class Heard:
    """What a model says of a stream after some more of it.

    Attributes:
        read_s: seconds of the stream that the model has read.
        done: whether this is the last of it.
        results: of a recogniser.
        tags: of a tagger: label, highest probability since the last time, and whether that reaches its threshold.
        changes: of a tagger: events that began or ended.
    """

    read_s: float
    done: bool
    results: list[Result] = field(default_factory=list)
    tags: list[tuple[str, float, bool]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


Deliver = Callable[["Heard | None"], None]
"""Is called in the event loop's thread; None: the model has failed, and nothing will follow."""
T = TypeVar("T")


class Feed(Generic[T]):
    """One stream's sound on its way to a model. :meth:`Engine.open` makes it; for the event loop's thread.

    Attributes:
        read_s: seconds that the model has read.
    """

    def __init__(self, listener: T, rate: int, deliver: Deliver, wake: Callable[[], None]) -> None:
        self.listener, self.rate, self.deliver, self._wake = listener, rate, deliver, wake
        # A deque's append and popleft need no lock between the threads. None is the end of the stream.
        self.pieces: deque[NDArray[np.float32] | None] = deque()
        self._sent = 0
        self.read_s = 0.0
        self.ended = False

    @property
    def backlog_s(self) -> float:
        """Seconds that wait for the model."""
        return max(0.0, self._sent / self.rate - self.read_s)

    def send(self, samples: NDArray[np.float32]) -> None:
        """Take the next samples (n,), which must be finite."""
        size = max(1, round(PIECE_S * self.rate))
        self.pieces.extend(samples[i : i + size] for i in range(0, len(samples), size))
        self._sent += len(samples)
        self._wake()

    def finish(self) -> None:
        """The stream has ended: what is still inside the model will come out."""
        if not self.ended:
            self.ended = True
            self.pieces.append(None)
            self._wake()


class Engine(ABC, Generic[T]):
    """Feeds that one model hears, by turns, in one thread that does nothing else.

    All methods belong to the event loop's thread, but for those that are marked otherwise.

    Attributes:
        feeds: those that are open.
        failure: what stopped the model, if anything did.
    """

    def __init__(self, name: str, threads: int) -> None:
        # Torch's number of threads is a thread's own.
        self._thread = ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(threads,))
        self._wake = asyncio.Event()
        self._stepping = asyncio.Lock()  # feeds come and go between steps alone
        self.feeds: set[Feed[T]] = set()
        self.failure: BaseException | None = None

    async def open(self, listener: Callable[[], T], rate: int, deliver: Deliver) -> Feed[T]:
        """Add a feed, whose listener is made between two steps of the model."""
        async with self._stepping:
            feed = Feed(listener(), rate, deliver, self._wake.set)
            self.feeds.add(feed)
            return feed

    async def close(self, feed: Feed[T]) -> None:
        """Forget a feed, wherever it is."""
        async with self._stepping:
            if feed in self.feeds:
                self.feeds.discard(feed)
                self._forget(feed)

    async def run(self) -> None:
        """Serve all feeds until cancelled, or until the model fails."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while True:
                    async with self._stepping:
                        heard = await loop.run_in_executor(self._thread, self._advance)
                    if not heard:
                        break
                    for feed, what in heard:
                        feed.read_s = what.read_s
                        feed.deliver(what)
        except Exception as error:
            # Not the clients' fault, and not theirs to see: they are told that it happened, the operator what.
            log.exception("the model has failed")
            self.failure = error
            for feed in list(self.feeds):
                feed.deliver(None)
        finally:
            self._thread.shutdown(wait=False)

    @abstractmethod
    def _advance(self) -> list[tuple[Feed[T], Heard]]:
        """In the model's thread: hear a bounded part of what waits; an empty list says that nothing does."""

    @abstractmethod
    def _forget(self, feed: Feed[T]) -> None: ...


class Recogniser(Engine[Session]):
    """A recogniser: one table of slots, all sessions advanced by one batched step.

    Args:
        task: in evaluation mode.
        slots: sessions at most.
        chunk_ms: sound that the model reads at once.
        make_decoder: of each session.
        rules: where texts are cut into segments.
        threads: of the model, on a CPU.
    """

    def __init__(
        self,
        task: ASRNetwork,
        slots: int,
        chunk_ms: float,
        make_decoder: Callable[[], Decoder],
        rules: EndpointRules,
        threads: int = 1,
    ) -> None:
        super().__init__("recogniser", threads)
        self.table = SlotTable(task, slots, chunk_ms)
        self._make_decoder, self._rules = make_decoder, rules

    @property
    def task(self) -> ASRNetwork:
        return self.table.task

    @property
    def full(self) -> bool:
        """Whether all slots are taken."""
        return len(self.table.sessions) >= self.table.slots

    @property
    def chunk_s(self) -> float:
        """Seconds that the model reads at once."""
        return self.table.chunk * self.task.token_s

    def warm_up(self) -> None:
        """Have everything compiled that is compiled at first use; before :meth:`run`."""
        session = self.table.open(self.task.features.sample_rate, None, self._make_decoder(), self._rules)
        session.accept(np.zeros(round(3 * self.chunk_s * session.input_rate), np.float32))
        session.finish()
        while self.table.step():
            pass
        self.table.close(session)

    async def open_session(self, rate: int, lookahead_ms: int | None, deliver: Deliver) -> Feed[Session]:
        """Begin a session; raises UserError where the table is full or the lookahead cannot be had."""
        return await self.open(
            lambda: self.table.open(rate, lookahead_ms, self._make_decoder(), self._rules), rate, deliver
        )

    def _advance(self) -> list[tuple[Feed[Session], Heard]]:
        ended = []
        for feed in self.feeds:
            session = feed.listener
            # Resampling is work, too: no more of it than the next step needs.
            while feed.pieces and not session.ready and not session.ended:
                piece = feed.pieces.popleft()
                if piece is not None:
                    session.accept(piece)
                    continue
                session.finish()
                if session.done:  # there was no sound in it
                    ended.append(session)
        told = {id(session) for session in [*self.table.step(), *ended]}
        return [
            (feed, Heard(self._read_s(feed.listener), feed.listener.done, feed.listener.take()))
            for feed in self.feeds
            if id(feed.listener) in told
        ]

    def _read_s(self, session: Session) -> float:
        read_s = session.position * self.task.token_s
        return min(read_s, session.accepted_s) if session.ended else read_s

    def _forget(self, feed: Feed[Session]) -> None:
        self.table.close(feed.listener)


class TagListener:
    """One stream's tags and events.

    Args:
        task: causal, in evaluation mode.
        rate: Hz, of the samples.
        chunk_s: seconds that the model hears at once.
        off_ratio: an event lasts while it stays above so much of its threshold.
    """

    def __init__(self, task: TaggingNetwork, rate: int, chunk_s: float, off_ratio: float = 0.6) -> None:
        self._task, self._tagger = task, LiveTagger(task, rate, chunk_s)
        self._on = np.maximum(np.array(task.thresholds, np.float64), 1e-6)
        self._detector = EventDetector(task.labels, task.token_s, self._on, self._on * off_ratio)

    @torch.inference_mode()
    def hear(self, piece: NDArray[np.float32] | None) -> Heard | None:
        """Hear the next samples (n,), None for the end; None where the model has nothing new to say."""
        tagger = self._tagger
        scores = tagger.flush() if piece is None else tagger.accept(piece)
        if not scores and piece is not None:
            return None
        heard = Heard(0.0, piece is None)
        if scores:
            logits = torch.cat([one.frames[0] for one in scores])
            table = self._task.probabilities(logits.double()).cpu().numpy()  # (t, c)
            heard.changes = self._detector.accept(table)
            peaks = table.max(0)
            heard.tags = [
                (label, float(p), bool(p >= on))
                for label, p, on in zip(self._task.labels, peaks, self._on, strict=True)
            ]
        if piece is None:
            heard.changes += self._detector.flush()
        heard.read_s = self._detector.position * self._task.token_s
        return heard


class TagEngine(Engine[TagListener]):
    """A tagger beside the recogniser, in its own thread: text does not wait for tags.

    Args:
        task: causal, in evaluation mode.
        chunk_s: seconds that the model hears at once, the delay of tags.
        threads: of the model, on a CPU.

    Raises:
        UserError: the model looks ahead.
    """

    def __init__(self, task: TaggingNetwork, chunk_s: float, threads: int = 1) -> None:
        super().__init__("tagger", threads)
        self.task, self.chunk_s = task, chunk_s
        self.warm_up()

    def warm_up(self) -> None:
        """Have everything compiled that is compiled at first use."""
        listener = TagListener(self.task, self.task.features.sample_rate, self.chunk_s)
        listener.hear(np.zeros(round(2 * self.chunk_s * self.task.features.sample_rate), np.float32))
        listener.hear(None)

    async def open_session(self, rate: int, deliver: Deliver) -> Feed[TagListener]:
        """Begin a session."""
        return await self.open(lambda: TagListener(self.task, rate, self.chunk_s), rate, deliver)

    def _advance(self) -> list[tuple[Feed[TagListener], Heard]]:
        # A piece of each stream, then what has come of it: no stream's backlog keeps the others waiting.
        told: list[tuple[Feed[Any], Heard]] = []
        while not told:
            waiting = [feed for feed in self.feeds if feed.pieces]
            if not waiting:
                break
            for feed in waiting:
                heard = feed.listener.hear(feed.pieces.popleft())
                if heard is not None:
                    told.append((feed, heard))
        return told

    def _forget(self, feed: Feed[TagListener]) -> None:
        pass  # its state goes with it
