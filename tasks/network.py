"""The part of a task that answers: its model and its weights. Training, in :mod:`seqssm.tasks.base`, builds on it.

Nothing here, nor in the networks of the tasks, imports Lightning or torchmetrics, whose import takes longer than to
answer a short question.
"""

from __future__ import annotations

import argparse
import inspect
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from seqssm import hub
from seqssm.backbone import BackboneConfig
from seqssm.errors import UserError
from seqssm.mixers import Mixer

CHECKPOINT_KEY = "seqssm"
SHORT_WORK = 1_000_000
"""Tokens times layers times width up to which loading the compiled kernels of the CPU takes longer than they save."""
N = TypeVar("N", bound="Network")


class Network(nn.Module):
    """A backbone with what stands before and behind it, and the plain data that builds it again.

    A subclass passes its own arguments on to ``super().__init__``, under their names, and what it does not know as
    well: in a training task that derives from it, :class:`~seqssm.tasks.base.Task` is next in line.

    Attributes:
        kind: what such a network is called in messages.
        body_parts: its submodules that a task that starts from its weights must have, too.
        head_parts: those that depend on the classes; a task with others starts them afresh.
        backbone_config: of the backbone.
        trained_on: arguments of the DataModule that it was trained with, where it was loaded from a checkpoint.
    """

    kind: ClassVar[str] = "model"
    body_parts: ClassVar[tuple[str, ...]] = ("backbone",)
    head_parts: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, backbone: BackboneConfig, **own: Any) -> None:
        super().__init__()
        unknown = set(own) - set(inspect.signature(type(self)).parameters)
        if unknown:
            raise TypeError(f"{type(self).__name__} does not take {', '.join(sorted(unknown))}")
        # Lightning's load_from_checkpoint hands the stored plain data over as it is.
        self.backbone_config = BackboneConfig.from_dict(backbone) if isinstance(backbone, dict) else backbone
        self.trained_on: dict[str, Any] = {}
        self._own_args = own

    def init_args(self) -> dict[str, Any]:
        """The arguments that build this network again, as plain data."""
        return {"backbone": self.backbone_config.to_dict(), **self._own_args}

    @classmethod
    def from_init_args(cls, init_args: Mapping[str, Any]) -> Self:
        """Build a network, with fresh weights, from what :meth:`init_args` gave."""
        args = dict(init_args)
        return cls(backbone=BackboneConfig.from_dict(args.pop("backbone")), **args)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @classmethod
    def output_names(cls, init_args: Mapping[str, Any]) -> list[str]:
        """What each output of the head stands for, of a network with these arguments: by default its labels."""
        return list(init_args.get("labels", []))

    def use_backend(self, backend: str) -> None:
        """Have the scans run in another backend; those of the kernels, or ``auto``."""
        for module in self.modules():
            if isinstance(module, Mixer):
                module.backend = backend

    def prepare_for(self, tokens: int) -> None:
        """Choose how to compute so many tokens, where the config leaves it open, before the first of them.

        The compiled kernels of the CPU take about a second to load, and ten to compile when they first run on a
        machine; what is short is done sooner in plain PyTorch. The results differ by rounding alone.
        """
        backend = self.backbone_config.backend
        work = tokens * self.backbone_config.n_layers * self.backbone_config.d_model
        short = self.device.type == "cpu" and backend == "auto" and work <= SHORT_WORK
        self.use_backend("torch" if short else backend)

    def probe(self, seed: int = 0) -> Tensor:
        """Probabilities (..., c) for made-up input, the same for the same seed, to compare two versions of the weights.

        Raises:
            UserError: this kind of network has none.
        """
        raise UserError(f"a {self.kind} has no made-up input to compare its weights by: keep them in float32")


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# ---- loading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A checkpoint read from disk, in plain data and tensors.

    Attributes:
        description: what :meth:`seqssm.tasks.base.Task.describe` stored.
        weights: the state dict, on the CPU.
        data: arguments of the DataModule it was trained with: ``{"class_path": ..., "init_args": ...}``, or ``{}``.
    """

    description: dict[str, Any]
    weights: dict[str, Tensor]
    data: dict[str, Any]


def read_checkpoint(checkpoint: str | Path) -> Loaded:
    """Read a shipped checkpoint by its name, a folder in hub format, or a Lightning ``.ckpt``. Runs no code from it.

    Raises:
        UserError: nothing there, not a checkpoint, or not one of this program's.
    """
    path = Path(checkpoint)
    if not path.is_file():
        config, weights = hub.load(hub.resolve(checkpoint))
        return Loaded({**config.get("training", {}), **config}, weights, config.get("data", {}))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        # Torch's own message says how to run what the file holds: never to be said of a file from a stranger.
        raise UserError(
            f"{path}: not a readable checkpoint: it is none, or holds more than tensors and plain data, and code is "
            "not run; give one that `seqssm fit` wrote"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        why = " ".join(str(error).splitlines()[:1]) or type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({why}); is the file whole?") from error
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content:
        raise UserError(f"{path}: not a checkpoint of a seqssm task; train one with `seqssm fit`")
    description = content[CHECKPOINT_KEY]
    return Loaded(description, content["state_dict"], description.get("data", {}))


def weights_of(loaded: Loaded) -> dict[str, str]:
    """What a report says of the weights it is about, where they have a name: the SHA-256 of a hub folder's."""
    return {"weights_sha256": loaded.description["sha256"]} if "sha256" in loaded.description else {}


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``, for all commands that need a trained model."""
    parser.add_argument(
        "--checkpoint",
        help="a shipped name (`seqssm checkpoints` lists them), a folder in hub format, or a Lightning .ckpt; default: "
        "the shipped one for this command",
    )


def checkpoint_or_default(checkpoint: str | None, expected: type[Network]) -> str:
    """The checkpoint that was asked for, else the shipped one that answers when none is named.

    Raises:
        UserError: none was named and none is shipped.
    """
    if checkpoint is not None:
        return checkpoint
    if expected is Network:
        raise UserError(f"which checkpoint? give --checkpoint: {', '.join(hub.shipped()) or 'none are shipped'}")
    name = hub.default(class_path(expected))
    if name is None:
        raise UserError(f"no {expected.kind} is shipped: give --checkpoint a Lightning .ckpt or a folder in hub format")
    return name


def load_network(checkpoint: str | Path, expected: type[N]) -> N:
    """Load a trained network in evaluation mode, without what only training needs.

    Raises:
        UserError: as :func:`read_checkpoint`, or the checkpoint holds another kind of network than ``expected``.
    """
    return build_network(read_checkpoint(checkpoint), expected, str(checkpoint))


def build_network(loaded: Loaded, expected: type[N], name: str) -> N:
    """Turn what :func:`read_checkpoint` gave into a network in evaluation mode.

    A checkpoint that does not say which network its task trained, as old ones, gives the task itself.
    """
    cls, args = hub.model_class(loaded.description, name)
    built = build_expected(cls, expected, args, loaded.weights, name)
    built.trained_on = dict(loaded.data.get("init_args", {}))
    return built


def build_expected(
    cls: type, expected: type[N], init_args: Mapping[str, Any], weights: Mapping[str, Tensor], name: str
) -> N:
    """An ``expected`` of class ``cls``, in evaluation mode; errors name the checkpoint ``name``."""
    if not issubclass(cls, expected):
        found = cls.kind if issubclass(cls, Network) and cls.kind != Network.kind else cls.__name__
        raise UserError(f"{name} holds {_article(found)}; this command needs {_article(expected.kind)}")
    return hub.fill(cls, init_args, weights, name)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
