"""Speech recognition of sound that is still going on: exact, in constant memory, many sessions at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from seqssm.data.resampling import StreamingResampler
from seqssm.errors import UserError
from seqssm.mixers import State
from seqssm.streaming import fingerprint
from seqssm.tasks.asr_encoder import OPEN_END, StreamingEncoder, TableStep
from seqssm.tasks.asr_layers import SUBSAMPLING
from seqssm.tasks.asr_network import ASRNetwork
from seqssm.tasks.decoding.ctc import GreedyCTC
from seqssm.tasks.decoding.emissions import Decoder
from seqssm.tasks.packets import SampleQueue, mono
from seqssm.tasks.transcripts import EndpointRules, Result, Segmenter

SNAPSHOT_FORMAT = "seqssm-transcriber"
SNAPSHOT_VERSION = 1


class Session:
    """One stream: samples of any packet size in, results out. :meth:`SlotTable.open` makes it.

    Attributes:
        input_rate: Hz, of the samples.
        lookahead_ms: of the model.
        ended: whether :meth:`finish` was called.
        done: whether all results are there.
    """

    def __init__(
        self,
        encoder: StreamingEncoder,
        slot: int,
        input_rate: int,
        lookahead_ms: int,
        decoder: Decoder,
        rules: EndpointRules,
        tell_ready: Callable[[Session], object],
    ) -> None:
        task = encoder.task
        self._tell_ready = tell_ready
        self._encoder, self.slot, self.input_rate, self.lookahead_ms = encoder, slot, input_rate, lookahead_ms
        self.choice = task.menu_position(lookahead_ms)
        self.delay = task.lookahead.menu[self.choice]
        self._resampler = StreamingResampler(input_rate, task.features.sample_rate)
        self.decoder = decoder
        self._segmenter = Segmenter(task.tokenizer.tokens, task.token_s, rules)
        self._waiting = SampleQueue()  # resampled, not yet read
        self._accepted = 0  # samples that came in
        self._resampled = 0
        self.position = 0  # tokens that the model has read
        self.total = OPEN_END
        self.ended = self.done = False
        self._results: list[Result] = []

    @property
    def waiting_s(self) -> float:
        """Seconds of sound that the model has not read yet."""
        return len(self._waiting) / self._encoder.task.features.sample_rate

    @property
    def accepted_s(self) -> float:
        """Seconds of sound that came in."""
        return self._accepted / self.input_rate

    def accept(self, samples: np.ndarray | Tensor) -> None:
        """Take the next samples, (n,) or (channels, n): floats between -1 and 1, or 16-bit integers.

        Raises:
            UserError: they are of another kind, or NaN or infinite; none of the packet is taken then.
            ValueError: the stream has ended.
        """
        if self.ended:
            raise ValueError("the stream has ended with finish()")
        packet = self._resampler.accept(mono(samples, self._accepted))
        self._accepted += np.shape(samples)[-1]
        self._append(packet)

    def _append(self, packet: np.ndarray) -> None:
        self._waiting.append(packet)
        self._resampled += len(packet)
        if len(self._waiting) >= self._encoder.span_samples:
            self._tell_ready(self)

    def finish(self) -> None:
        """The stream has ended: what is still inside the model will come out."""
        if self.ended:
            return
        self._append(self._resampler.flush())
        self.ended = True
        frames = self._encoder.task.features.frames(self._resampled)
        self.total = -(-frames // SUBSAMPLING)
        if self.total:
            self._tell_ready(self)
        else:
            self._close()

    def take(self) -> list[Result]:
        """The results that have not been taken yet, in order."""
        results, self._results = self._results, []
        return results

    # ---- for the table -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the model can read a chunk."""
        return not self.done and (self.ended or len(self._waiting) >= self._encoder.span_samples)

    def next_chunk(self, row: np.ndarray) -> int:
        """Write the next chunk's samples into row (span,), zero behind the end; gives the number of real frames."""
        encoder = self._encoder
        samples = self._waiting.samples[: encoder.span_samples]
        row[: len(samples)] = samples
        row[len(samples) :] = 0
        self._waiting.drop(encoder.step_samples)
        frames = encoder.chunk * SUBSAMPLING
        if not self.ended:
            return frames
        left = encoder.task.features.frames(self._resampled) - self.position * SUBSAMPLING
        return min(max(left, 0), frames)

    def take_chunk(self, rows: Any) -> None:
        """What the model made of the chunk, c frames as the decoder reads them, goes to the decoder."""
        first = self.position - self.delay
        self.position += self._encoder.chunk
        last = min(self.position - self.delay, self.total)
        if last > max(first, 0):
            self.decoder.advance(rows[max(-first, 0) : last - first])
            if last < self.total:
                stable = list(self.decoder.take())
                if self._segmenter.must_settle(stable, self.decoder.partial, last):
                    self.decoder.settle()
                    stable += self.decoder.take()
                self._results += self._segmenter.advance(stable, self.decoder.partial, last)
        if last >= self.total:
            self._close()

    def _close(self) -> None:
        self.decoder.settle()
        self._results += self._segmenter.finish(list(self.decoder.take()), self.accepted_s)
        self.done = True

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """All that is not in the table: plain data, and arrays."""
        resampler = self._resampler.snapshot()
        plain = {
            "accepted": self._accepted,
            "resampled": self._resampled,
            "position": self.position,
            "total": self.total,
            "ended": self.ended,
            "done": self.done,
            "decoder": self.decoder.state(),
            "segmenter": self._segmenter.state(),
            "resampler": {key: value for key, value in resampler.items() if key != "input"},
        }
        return plain, {"samples": self._waiting.samples, "input": np.asarray(resampler["input"], np.float32)}

    def load(self, plain: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Go on from :meth:`state`."""
        self._accepted, self._resampled = plain["accepted"], plain["resampled"]
        self.position, self.total = plain["position"], plain["total"]
        self.ended, self.done = plain["ended"], plain["done"]
        self.decoder.load(plain["decoder"])
        self._segmenter.load(plain["segmenter"])
        self._resampler.restore({**plain["resampler"], "input": arrays["input"]})
        self._waiting = SampleQueue()
        self._waiting.append(arrays["samples"])
        if self.ready:
            self._tell_ready(self)


class SlotTable:
    """Streams that advance together, one batched step at a time, each in a slot of its own.

    Every step has the same shape, whoever is there, so that a session's text depends neither on its neighbours nor on
    when they come and go. Tables of other sizes round differently: their texts may differ where two are all but equal.

    Args:
        task: in evaluation mode.
        slots: sessions at most.
        chunk_ms: sound that the model reads at once, rounded to whole tokens: the grid of all results.

    Attributes:
        sessions: those that are open, by slot.
        state_bytes: memory of a session's state in the model; it never grows.
    """

    def __init__(self, task: ASRNetwork, slots: int = 1, chunk_ms: float = 160.0) -> None:
        if task.training:
            raise ValueError("a stream needs the model in evaluation mode: call task.eval()")
        if slots < 1:
            raise UserError(f"a table needs a slot at least, got {slots}")
        self.task, self.slots = task, slots
        self.chunk = max(1, round(chunk_ms / 1000 / task.token_s))
        self.encoder = StreamingEncoder(task, self.chunk).to(task.device).eval()
        self.sessions: dict[int, Session] = {}
        self._ready: set[Session] = set()  # those that have a chunk
        self._step = TableStep(self.encoder, slots)
        self._fresh = {key: value[:1].clone() for key, value in self._step.state.items()}
        self._fingerprint: str | None = None

    @property
    def state_bytes(self) -> int:
        return sum(value.nbytes for value in self._fresh.values())

    def open(
        self,
        input_rate: int,
        lookahead_ms: int | None = None,
        decoder: Decoder | None = None,
        rules: EndpointRules | None = None,
    ) -> Session:
        """Begin a stream.

        Args:
            input_rate: Hz, of its samples.
            lookahead_ms: one of those that the model was trained with; by default that of its validation.
            decoder: its own; greedy CTC by default.
            rules: where its text is cut.

        Raises:
            UserError: all slots are taken, or the rate or the lookahead cannot be had.
        """
        slot = next((i for i in range(self.slots) if i not in self.sessions), None)
        if slot is None:
            raise UserError(f"all {self.slots} sessions are in use; try again later")
        lookahead_ms = self.task.lookahead_ms[self.task.eval_choice] if lookahead_ms is None else lookahead_ms
        session = Session(
            self.encoder,
            slot,
            input_rate,
            lookahead_ms,
            decoder or GreedyCTC(),
            rules or EndpointRules(),
            self._ready.add,
        )
        self._write_row(slot, self._fresh)
        self.sessions[slot] = session
        return session

    def close(self, session: Session) -> None:
        """Forget a stream; its slot is free again."""
        if self.sessions.get(session.slot) is session:
            del self.sessions[session.slot]
            self._ready.discard(session)

    def step(self) -> list[Session]:
        """Advance every session that has a chunk by one; gives these sessions."""
        ready = sorted(self._ready, key=lambda session: session.slot)
        if not ready:
            return []
        samples, about = self._step.samples, self._step.about
        about[:] = [[0], [-1], [0], [0]]  # nobody is there
        for session in ready:
            frames = session.next_chunk(samples[session.slot])
            about[:, session.slot] = frames, session.position, session.total, session.choice
        encoded, log_probs = self._step()
        # What decoders read, for all rows at once.
        for reads in {session.decoder.reads for session in ready}:
            readers = [session for session in ready if session.decoder.reads == reads]
            rows: Iterable[Any]
            slots = [session.slot for session in readers]
            if reads == "best":
                values, ids = (x.cpu().numpy()[slots].tolist() for x in log_probs.max(-1))
                rows = (list(zip(*row, strict=True)) for row in zip(ids, values, strict=True))
            else:
                rows = (encoded if reads == "encoded" else log_probs).cpu().numpy()[slots]
            for session, row in zip(readers, rows, strict=True):
                session.take_chunk(row)
        self._ready.difference_update([session for session in ready if not session.ready])
        return ready

    def _write_row(self, slot: int, row: State) -> None:
        state, device = self._step.state, self.task.device
        # At once: on a GPU, dozens of small copies for each that comes would keep the others waiting.
        torch._foreach_copy_([state[key][slot : slot + 1] for key in row], [row[key].to(device) for key in row])

    # ---- to another process ------------------------------------------------------------------------------------------

    def snapshot(self, session: Session) -> bytes:
        """All that a table of the same model needs to go on with a session, as one safetensors blob.

        Results that were not taken yet are not in it.
        """
        plain, arrays = session.state()
        about = {**self._settings(session), "session": json.dumps(plain)}
        tensors = {f"state/{key}": value[session.slot : session.slot + 1] for key, value in self._step.state.items()}
        tensors |= {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
        return save({key: value.cpu().contiguous().clone() for key, value in tensors.items()}, metadata=about)

    def restore(self, session: Session, blob: bytes) -> None:
        """Have a session, which was opened with the same arguments, go on from what :meth:`snapshot` gave.

        Raises:
            UserError: it is no such snapshot, or one of another model, chunk, rate, lookahead or decoder.
        """
        about = _metadata(blob)
        for key, value in self._settings(session).items():
            if about.get(key) != value:
                raise UserError(f"the snapshot's {key} is {about.get(key)}, not {value}: open the session as it was")
        try:
            tensors = load(blob)
            plain = json.loads(about["session"])
        except (SafetensorError, ValueError) as error:
            raise UserError(f"the snapshot is damaged ({error}); take a new one") from error
        self._write_row(session.slot, {key: tensors[f"state/{key}"] for key in self._step.state})
        session.load(plain, {key: tensors[key].numpy() for key in ("samples", "input")})

    def _settings(self, session: Session) -> dict[str, str]:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.task)
        return {
            "format": SNAPSHOT_FORMAT,
            "version": str(SNAPSHOT_VERSION),
            "model": self._fingerprint,
            "chunk": str(self.chunk),
            "rate": str(session.input_rate),
            "lookahead": str(session.lookahead_ms),
            "decoder": type(session.decoder).__name__,
        }


def _metadata(blob: bytes) -> dict[str, str]:
    try:
        size = int.from_bytes(blob[:8], "little")
        about = json.loads(blob[8 : 8 + size]).get("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise UserError("this is not a snapshot of a transcriber, or it is damaged") from error
    if about.get("format") != SNAPSHOT_FORMAT:
        raise UserError("this is not a snapshot of a transcriber")
    return about


class Transcriber:
    """One stream by itself: the same results, to the byte, for any packet sizes.

    Args:
        task: in evaluation mode.
        input_rate: Hz, of the samples.
        lookahead_ms: one of those that the model was trained with; by default that of its validation.
        chunk_ms: sound that the model reads at once. Results appear on this grid, ``lookahead_ms`` later.
        decoder: greedy CTC by default.
        rules: where the text is cut into segments.
    """

    def __init__(
        self,
        task: ASRNetwork,
        input_rate: int,
        *,
        lookahead_ms: int | None = None,
        chunk_ms: float = 160.0,
        decoder: Decoder | None = None,
        rules: EndpointRules | None = None,
    ) -> None:
        self.table = SlotTable(task, 1, chunk_ms)
        self.session = self.table.open(input_rate, lookahead_ms, decoder, rules)

    def accept(self, samples: np.ndarray | Tensor) -> list[Result]:
        """Take samples as :meth:`Session.accept`, and give the results that became ready, in order."""
        self.session.accept(samples)
        return self._run()

    def finish(self) -> list[Result]:
        """End of the stream: the remaining results."""
        self.session.finish()
        return self._run()

    def _run(self) -> list[Result]:
        while self.session.ready:
            self.table.step()
        return self.session.take()

    def snapshot(self) -> bytes:
        """All state, as one safetensors blob: another process can go on with it."""
        return self.table.snapshot(self.session)

    def restore(self, blob: bytes) -> None:
        """Go on from what :meth:`snapshot` gave; raises UserError as :meth:`SlotTable.restore`."""
        self.table.restore(self.session, blob)
