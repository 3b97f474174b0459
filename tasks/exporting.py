"""Lightning checkpoints to hub folders and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqssm import hub
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.mixers import Mixer
from seqssm.tasks.network import CHECKPOINT_KEY, Loaded, Network, build_network, read_checkpoint

TRAINING = ("epochs", "steps", "base_seed")
_ABSOLUTE = re.compile(r"/|[A-Za-z]:\\|~")


def export(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    half: bool = False,
    tolerance: float = 1e-3,
    notes: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write any checkpoint as a hub folder, with the weights that evaluation uses (averaged ones, where there are).

    The folder's own card.yaml stays where no other is given. Paths of the training data lose their folders.

    Args:
        checkpoint: a Lightning ``.ckpt``, a hub folder, or a shipped name.
        folder: where; an older checkpoint there is replaced.
        half: store matrices as float16; state-space parameters, vectors and statistics stay float32.
        tolerance: the greatest change of a probability that this may cause.
        notes: YAML, the hand-written part of the card.
        metrics: what `seqssm evaluate` found for these weights.

    Raises:
        UserError: the checkpoint cannot be read, the folder cannot be written, or float16 changes the output.
    """
    loaded, name = read_checkpoint(checkpoint), str(checkpoint)
    ngram = None if Path(checkpoint).is_file() else hub.find_ngram(hub.resolve(checkpoint))
    content = None if ngram is None else Path(ngram.pop("path")).read_bytes()  # the folder may be the same
    folder = export_loaded(loaded, folder, name, half=half, tolerance=tolerance, notes=notes, metrics=metrics)
    if ngram is not None and content is not None:
        hub.add_ngram(folder, content, **ngram)
    return folder


def refuse_to_replace(folder: str | Path, checkpoint: str | Path) -> None:
    """Raise UserError where a new checkpoint would take the place of the one that it is made of."""
    source = Path(checkpoint) if Path(checkpoint).is_file() else hub.resolve(checkpoint)
    if Path(folder).exists() and Path(folder).resolve() == source.resolve():
        raise UserError(
            f"{folder} is the checkpoint that is read: its metrics and pictures would be lost; choose another folder"
        )


def export_loaded(
    loaded: Loaded,
    folder: str | Path,
    name: str,
    *,
    half: bool = False,
    tolerance: float = 1e-3,
    notes: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """:func:`export` of what was read from a checkpoint called ``name``, and perhaps changed since."""
    description, folder = loaded.description, Path(folder)
    config: dict[str, Any] = {key: description[key] for key in ("task", "init_args", "version") if key in description}
    network = description.get("network") or _network(loaded, name)
    config |= {"network": network} if network else {}
    config |= {"data": _portable(loaded.data)} if loaded.data else {}
    training = {key: description[key] for key in TRAINING if description.get(key) is not None}
    config |= {"training": training} if training else {}
    weights = loaded.weights
    if half:
        described = Loaded({**description, **config}, weights, loaded.data)
        weights, config["storage"] = _halved(build_network(described, Network, name), tolerance)
    elif description.get("storage"):
        config["storage"] = description["storage"]
    if notes is None and (folder / hub.NOTES).is_file():
        notes = (folder / hub.NOTES).read_text(encoding="utf-8")
    return hub.save(folder, config, weights, metrics=metrics, notes=notes)


def _network(loaded: Loaded, name: str) -> dict[str, Any] | None:
    """What a checkpoint from before tasks said so would say of the network that answers."""
    from seqssm.tasks.base import Task, build_task

    return build_task(loaded, Task, name).describe().get("network")


def _portable(data: Mapping[str, Any]) -> dict[str, Any]:
    """Data settings for other machines, whose folders and caches are elsewhere."""
    settings = _without_folders(data)
    args = settings.get("init_args", {})
    return {**settings, "init_args": {**args, **({"cache_dir": None} if "cache_dir" in args else {})}}


def _without_folders(value: Any) -> Any:
    """Paths of another machine mean nothing to others: their last part stays."""
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and _ABSOLUTE.match(value) else value


def _halved(network: Network, tolerance: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights with matrices in float16, and what that changed."""
    kept = {
        f"{name}.{parameter}"
        for name, module in network.named_modules()
        if isinstance(module, Mixer)
        for parameter in module.float32_parameters
    }
    before = network.probe().double()
    whole = network.state_dict()
    weights = {
        key: value.half() if value.dim() > 1 and value.is_floating_point() and key not in kept else value.clone()
        for key, value in whole.items()
    }
    network.load_state_dict(weights)
    after = network.probe().double()
    change = float((after - before).abs().max())
    if not change <= tolerance:  # also where it is NaN
        raise UserError(
            f"float16 changes a probability by {change:.2g}, more than {tolerance:g}: keep float32, or set --tolerance"
        )
    return weights, {"dtype": "float16", "largest_change": change, "outputs": before.numel()}


def mean(checkpoints: Sequence[str | Path], path: str | Path) -> Path:
    """Write the mean of several checkpoints' weights as a Lightning ``.ckpt``, which may be better than each.

    Runs that began from the same weights lie close enough for it (Wortsman et al., 2022, "model soups").

    Args:
        checkpoints: of the same model; settings of training may differ, and the first one's are kept.
        path: the ``.ckpt`` to write.

    Raises:
        UserError: one cannot be read, or they are not of the same model.
    """
    first, *others = [read_checkpoint(one) for one in checkpoints]
    training = set((first.description.get("network") or {}).get("training_args", ()))
    weights = {key: value.double() if value.is_floating_point() else value for key, value in first.weights.items()}
    for name, other in zip(checkpoints[1:], others, strict=True):
        different = [
            key
            for key, value in first.description["init_args"].items()
            if key not in training and other.description["init_args"].get(key) != value
        ]
        if other.description["task"] != first.description["task"] or other.weights.keys() != weights.keys():
            raise UserError(f"{name} is another model than {checkpoints[0]}: a mean needs the same one")
        # Dropout and the like change nothing of what a weight means.
        shapes = [key for key, value in other.weights.items() if value.shape != weights[key].shape]
        if shapes or {"tokenizer", "labels", "features"} & set(different):
            what = shapes[0] if shapes else next(key for key in ("tokenizer", "labels", "features") if key in different)
            raise UserError(f"{name} has another {what} than {checkpoints[0]}: a mean needs the same model")
        for key, value in other.weights.items():
            if value.is_floating_point():
                weights[key] = weights[key] + value.double()
    for key, value in weights.items():
        if value.is_floating_point():
            weights[key] = (value / len(checkpoints)).to(first.weights[key].dtype)
    return _write_lightning(Loaded(first.description, weights, first.data), Path(path))


def to_lightning(checkpoint: str | Path, path: str | Path) -> Path:
    """Write any checkpoint as a Lightning ``.ckpt`` that ``init_from``, evaluation and ``load_from_checkpoint`` take.

    It holds no optimizer: training can start from it, not go on.

    Raises:
        UserError: the checkpoint cannot be read, or the file cannot be written.
    """
    return _write_lightning(read_checkpoint(checkpoint), Path(path))


def _write_lightning(loaded: Loaded, path: Path) -> Path:
    import lightning.pytorch as pl

    about = loaded.description
    description = {key: about[key] for key in ("version", "task", "init_args", "network", *TRAINING) if key in about}
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": {key: v.float() if v.is_floating_point() else v for key, v in loaded.weights.items()},
        "hyper_parameters": {**about["init_args"], "_class_path": about["task"]},
        CHECKPOINT_KEY: {**description, "data": loaded.data},
    }
    with atomic_write(path, "wb") as file:
        torch.save(content, file)
    return path
