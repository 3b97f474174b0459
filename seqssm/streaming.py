"""Live sequences: packets of any size in, the same bytes out, and a state that survives the process."""

from __future__ import annotations

import hashlib
import json
import struct
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from seqssm.backbone import Backbone
from seqssm.errors import UserError

SNAPSHOT_FORMAT = "seqssm-stream"
SNAPSHOT_VERSION = "1"


class Stream:
    """Feeds a causal model chunks of one fixed length, whatever the packets.

    Matrix products of other shapes round differently, so output that must not depend on the packets needs a fixed
    grid: packets are gathered until a chunk is full, and only the last chunk, at :meth:`flush`, may be shorter.

    Args:
        model: in evaluation mode, with ``forward(x, state) -> (y, state)`` and ``init_state(batch)``: a
            :class:`~seqssm.backbone.Backbone`, a :class:`~seqssm.backbone.LanguageModel`, or a task's own.
        chunk: tokens or frames in a chunk; the delay that the grid adds is at most ``chunk - 1`` of them.
        batch: sequences that advance together.

    Attributes:
        position: tokens that the model has read; the state and the outputs so far belong to these.

    Raises:
        UserError: the model cannot carry a state.
        ValueError: it is in training mode, or ``chunk`` is not positive.
    """

    def __init__(self, model: nn.Module, chunk: int, batch: int = 1) -> None:
        if chunk < 1:
            raise ValueError(f"chunk must be a positive number of tokens, got {chunk}")
        if model.training:
            raise ValueError("a stream needs the model in evaluation mode: call model.eval()")
        self.model = model
        self.chunk = chunk
        self.batch = batch
        self.reset()

    def reset(self) -> None:
        """Forget everything and start a new sequence."""
        init_state: Any = self.model.init_state
        self.state: dict[str, Tensor] = init_state(self.batch)
        self.position = 0
        self._waiting: Tensor | None = None  # (b, t < chunk, ...)
        self._ended = False

    def advance(self, packet: Tensor) -> list[Tensor]:
        """Take a packet (b, t, ...), t of any size, and give the outputs of the chunks it completes, in order.

        Raises:
            ValueError: the packet does not fit those before it, or the sequence was flushed.
        """
        if self._ended:
            raise ValueError("the sequence has ended with flush(): call reset() to start another")
        if packet.dim() < 2 or packet.shape[0] != self.batch:
            raise ValueError(f"a packet must be (batch, time, ...) with batch {self.batch}, got {tuple(packet.shape)}")
        if self._waiting is not None:
            if packet.shape[2:] != self._waiting.shape[2:] or packet.dtype != self._waiting.dtype:
                raise ValueError(
                    f"packets must keep their kind: {self._waiting.dtype} (b, t, {tuple(self._waiting.shape[2:])}), "
                    f"then {packet.dtype} {tuple(packet.shape)}"
                )
            packet = torch.cat([self._waiting, packet], dim=1)
        ready = packet.shape[1] - packet.shape[1] % self.chunk
        outputs = [self._run(part) for part in packet[:, :ready].split(self.chunk, dim=1) if part.shape[1]]
        self._waiting = packet[:, ready:].clone()
        return outputs

    def flush(self) -> list[Tensor]:
        """End the sequence: the output of what still waited for a full chunk (an empty list if nothing did)."""
        self._ended = True
        waiting, self._waiting = self._waiting, None
        return [self._run(waiting)] if waiting is not None and waiting.shape[1] else []

    def snapshot(self) -> bytes:
        """Everything that a stream of the same model needs to go on in another process, as one safetensors blob."""
        tensors = {f"state/{key}": value for key, value in self.state.items()}
        if self._waiting is not None:
            tensors["waiting"] = self._waiting
        about = {
            "format": SNAPSHOT_FORMAT,
            "version": SNAPSHOT_VERSION,
            "model": self._model_hash,
            "chunk": str(self.chunk),
            "batch": str(self.batch),
            "position": str(self.position),
            "ended": str(self._ended),
        }
        return save({key: value.cpu().contiguous().clone() for key, value in tensors.items()}, metadata=about)

    def restore(self, blob: bytes) -> None:
        """Go on from what :meth:`snapshot` gave, on this model's device.

        Raises:
            UserError: it is not a snapshot, or of another version, model, chunk or batch.
        """
        about = _read_metadata(blob)
        expected = {
            "version": (SNAPSHOT_VERSION, "of another version; take a new one with this version"),
            "model": (self._model_hash, "of another model; load the checkpoint that it was taken with"),
            "chunk": (str(self.chunk), f"of a stream with chunk {about.get('chunk')}, not {self.chunk}"),
            "batch": (str(self.batch), f"of a stream with batch {about.get('batch')}, not {self.batch}"),
        }
        for key, (value, complaint) in expected.items():
            if about.get(key) != value:
                raise UserError(f"the snapshot is {complaint}")
        try:
            tensors = load(blob)
        except SafetensorError as error:
            raise UserError(f"the snapshot is damaged ({error}); take a new one") from error
        device = next(self.model.parameters()).device
        tensors = {key: value.to(device) for key, value in tensors.items()}
        self._waiting = tensors.pop("waiting", None)
        self.state = {key.removeprefix("state/"): value for key, value in tensors.items()}
        self.position = int(about["position"])
        self._ended = about["ended"] == "True"

    @cached_property
    def _model_hash(self) -> str:
        return fingerprint(self.model)

    @torch.no_grad()
    def _run(self, part: Tensor) -> Tensor:
        y, self.state = self.model(part, self.state)
        self.position += part.shape[1]
        return y


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model: its class, the settings of its backbone that shape its results, and all weights."""
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for module in model.modules():
        if isinstance(module, Backbone):
            settings = module.config.to_dict()
            for key in ("dropout", "checkpoint_activations", "backend"):
                del settings[key]
            digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_metadata(blob: bytes) -> dict[str, str]:
    """The metadata of a safetensors blob: 8 bytes of header length, then the header as JSON."""
    try:
        (size,) = struct.unpack_from("<Q", blob)
        about = json.loads(blob[8 : 8 + size]).get("__metadata__", {})
    except (struct.error, ValueError, AttributeError) as error:
        raise UserError("this is not a snapshot of a stream, or it is damaged") from error
    if about.get("format") != SNAPSHOT_FORMAT:
        raise UserError("this is not a snapshot of a stream")
    return about
