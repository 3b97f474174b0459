"""A checkpoint as a folder that anyone can read: written whole or not at all, and read without running any of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

import seqssm
from seqssm.errors import UserError
from seqssm.hub.cards import Notes, model_card

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD, METRICS, NOTES = "config.json", "model.safetensors", "README.md", "metrics.json", "card.yaml"
NGRAM = "ngram.arpa.gz"
FILES = re.compile(
    r"config\.json|model\.safetensors|README\.md|card\.yaml|ngram\.arpa\.gz|[\w-]+\.png|metrics(-[\w.^-]+)?\.json"
)
"""The names of all files that belong to a checkpoint; a second evaluation is metrics-WHAT.json, and
pictures of what a model gives may lie beside it."""
_REQUIRED = {"format_version", "version", "task", "init_args", "sha256"}
_KEYS = _REQUIRED | {"versions", "network", "data", "training", "storage", "ngram"}
_NGRAM_KEYS = {"sha256", "unit", "weight", "bonus"}


def save(
    folder: str | Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    card: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    notes: str | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all; a checkpoint that is there already is replaced.

    Args:
        folder: where.
        config: ``task`` and ``init_args``, optionally ``version``, ``versions``, ``network``, ``data``, ``training``
            and ``storage``; plain JSON data.
        weights: the state dict, stored in its own dtypes.
        card: the README; :func:`~seqssm.hub.cards.model_card` when None.
        metrics: results, written as metrics.json.
        notes: YAML, the hand-written part of the card, written as card.yaml.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else, or cannot be written.
        ValueError: ``config`` has other keys.
    """
    folder = Path(folder)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    content = {"format_version": FORMAT_VERSION, "version": seqssm.__version__, "versions": versions, **config}
    if set(content) - _KEYS or _REQUIRED - {"sha256"} - set(content):
        raise ValueError(
            f"a checkpoint's config needs task and init_args, may have {_KEYS - _REQUIRED}: {sorted(config)}"
        )
    # Bytes first: what the disk refuses is then an OSError that says so. Clones, since safetensors refuses tensors
    # that share memory.
    blob = to_safetensors({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()})
    content["sha256"] = hashlib.sha256(blob).hexdigest()
    reports = {} if metrics is None else {METRICS: metrics}
    if card is None:
        card = model_card(folder.name, content, weights, reports, Notes.parse(notes, f"{folder}/{NOTES}"))
    files = {WEIGHTS: blob, CONFIG: _json(content), CARD: card.encode()}
    files |= {name: _json(report) for name, report in reports.items()}
    if notes is not None:
        files[NOTES] = notes.encode()
    return write_folder(folder, files)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Have a checkpoint folder hold these files and no others, or leave everything as it was.

    Raises:
        UserError: the folder holds something else, or the disk does not take it.
    """
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and is not a checkpoint; choose another name")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            temporary.chmod(0o755)
            if folder.exists():
                aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
                folder.replace(aside)
                try:
                    temporary.replace(folder)
                except OSError:
                    aside.replace(folder)
                    raise
                shutil.rmtree(aside)
            else:
                temporary.replace(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write the checkpoint {folder}: {error.strerror or error}; choose another place"
        ) from error
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint that :func:`load` accepts, by name; others in the folder are left out.

    Raises:
        UserError: as :func:`load`.
    """
    load(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if FILES.fullmatch(path.name)}


def load(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify a checkpoint folder; builds nothing and runs nothing.

    Returns:
        config and weights (on the CPU), as :func:`save` was given them, with ``format_version`` and ``sha256``.

    Raises:
        UserError: a file is missing, damaged, altered since it was written, or of another version.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; copy the whole checkpoint folder") from error
    if digest != config["sha256"]:
        raise UserError(f"{path} is not the file that was saved (its SHA-256 differs from config.json); copy it again")
    if not (folder / CARD).is_file():
        raise UserError(
            f"{folder / CARD}: there is no model card; copy the whole folder, or `seqssm checkpoints card` it"
        )
    find_ngram(folder)
    try:
        return config, load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error


def find_ngram(folder: str | Path) -> dict[str, Any] | None:
    """The n-gram model that a recogniser brings along for its beam searches, if it does.

    Returns:
        ``path`` of the ARPA file, ``unit`` (word or token), and ``weight`` and ``bonus`` that suit it.

    Raises:
        UserError: as :func:`read_config`, or the file is missing or not the one that was saved.
    """
    folder = Path(folder)
    about = read_config(folder).get("ngram")
    if about is None:
        return None
    path = folder / NGRAM
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; copy the whole checkpoint folder") from error
    if digest != about["sha256"]:
        raise UserError(f"{path} is not the file that was saved (its SHA-256 differs from config.json); copy it again")
    return {"path": str(path), **{key: about[key] for key in ("unit", "weight", "bonus")}}


def add_ngram(folder: str | Path, content: bytes, unit: str, weight: float, bonus: float) -> Path:
    """Give a checkpoint folder an n-gram model, or another one; its card says so.

    Args:
        folder: of a recogniser.
        content: of the gzipped ARPA file.
        unit: of the model, word or token.
        weight, bonus: of its log-probabilities, and of a word of it, in nats.

    Raises:
        UserError: as :func:`load`, or the disk does not take it.
    """
    folder = Path(folder)
    files = read_files(folder)
    about = {"sha256": hashlib.sha256(content).hexdigest(), "unit": unit, "weight": weight, "bonus": bonus}
    config = {**read_config(folder), "ngram": about}
    card = model_card(folder.name, config, load_file(folder / WEIGHTS), read_reports(folder), read_notes(folder))
    return write_folder(folder, {**files, CONFIG: _json(config), NGRAM: content, CARD: card.encode()})


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check config.json alone.

    Raises:
        UserError: missing, not JSON, of another version, or with unknown keys.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a folder that seqssm saved") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(config, dict) or "format_version" not in config:
        raise UserError(f"{path}: not the config of a seqssm checkpoint (no format_version)")
    if config["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {config['format_version']!r}, and seqssm {seqssm.__version__} reads "
            f"{FORMAT_VERSION}; install the seqssm that wrote it ({config.get('version', 'unknown')})"
        )
    for keys, what in ((set(config) - _KEYS, "unknown key"), (_REQUIRED - set(config), "missing key")):
        if keys:
            raise UserError(f"{path}: {what} {', '.join(sorted(keys))}; was it edited, or written by another version?")
    if not isinstance(config["task"], str) or not isinstance(config["init_args"], dict):
        raise UserError(f"{path}: task must be a class path and init_args a table of its arguments")
    ngram = config.get("ngram")
    if ngram is not None and (not isinstance(ngram, dict) or set(ngram) != _NGRAM_KEYS):
        raise UserError(f"{path}: ngram must have {', '.join(sorted(_NGRAM_KEYS))}; was it edited?")
    network = config.get("network")
    if network is not None and (not isinstance(network, dict) or set(network) != {"class_path", "training_args"}):
        raise UserError(f"{path}: network must have a class_path and training_args; was it edited?")
    return config


def read_reports(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The evaluations in a checkpoint folder by file name, metrics.json first.

    Raises:
        UserError: one is not JSON.
    """
    reports = {}
    for path in sorted(Path(folder).glob("metrics*.json"), key=lambda path: (path.name != METRICS, path.name)):
        if FILES.fullmatch(path.name):
            try:
                reports[path.name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path}: not JSON ({error}); run `seqssm evaluate` again") from error
    return reports


def read_notes(folder: str | Path) -> Notes:
    """The hand-written part of a card; empty where there is none.

    Raises:
        UserError: not YAML, or with unknown keys.
    """
    path = Path(folder) / NOTES
    return Notes.parse(path.read_text(encoding="utf-8") if path.is_file() else None, str(path))


def make_card(folder: str | Path) -> str:
    """What the README of a checkpoint folder has to say, from its other files."""
    folder = Path(folder)
    config = read_config(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: not readable ({error}); copy the whole checkpoint folder") from error
    return model_card(folder.name, config, weights, read_reports(folder), read_notes(folder))


# ---- building ------------------------------------------------------------------------------------------------------


def model_class(config: Mapping[str, Any], name: str = "the checkpoint") -> tuple[type[nn.Module], dict[str, Any]]:
    """The class that answers, which must be one of this package, and its arguments.

    That is the ``network`` that the task trained, without what only training needs, where the config names it.

    Raises:
        UserError: the class is foreign or unknown.
    """
    network = config.get("network")
    if network is None:
        return own_class(config["task"], name), dict(config["init_args"])
    left_out = set(network["training_args"])
    args = {key: value for key, value in config["init_args"].items() if key not in left_out}
    return own_class(network["class_path"], name), args


def own_class(path: str, name: str = "the checkpoint") -> type[nn.Module]:
    """A model by its class path: no checkpoint says what code to run.

    Raises:
        UserError: it is none of this package's, or no model.
    """
    module, _, attribute = path.rpartition(".")
    if module.partition(".")[0] != "seqssm":
        raise UserError(f"{name}: its task is {path}, not one of seqssm's classes; load its weights in Python")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name}: its task {path} is unknown to seqssm {seqssm.__version__}; update it") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(f"{name}: its task {path} is not a model")
    return cls


def fill(
    cls: type[Any], init_args: Mapping[str, Any], weights: Mapping[str, Tensor], name: str = "the checkpoint"
) -> Any:
    """Build a model by its ``from_init_args``, or by its arguments, with these weights, in evaluation mode.

    Raises:
        UserError: arguments or weights do not fit the class.
    """
    make = getattr(cls, "from_init_args", None)
    path = f"{cls.__module__}.{cls.__qualname__}"
    try:
        module = make(dict(init_args)) if make else cls(**init_args)
    except (TypeError, KeyError, ValueError, RuntimeError) as error:  # the last where memory is asked for without end
        raise UserError(
            f"{name}: its init_args do not fit {path}: {' '.join(str(error).split())}; was it edited?"
        ) from error
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise UserError(f"{name}: its weights do not fit {path}: {' '.join(str(error).split())}") from error
    return module.eval()


def build(config: Mapping[str, Any], weights: Mapping[str, Tensor], name: str = "the checkpoint") -> nn.Module:
    """Build the model that :func:`load` described, in evaluation mode, with its weights.

    Raises:
        UserError: the class is foreign or unknown, or arguments or weights do not fit it.
    """
    return fill(*model_class(config, name), weights, name)


def load_model(folder: str | Path) -> nn.Module:
    """:func:`load` and :func:`build`."""
    return build(*load(folder), str(folder))


# ---- names ---------------------------------------------------------------------------------------------------------

PRETRAINED = Path(seqssm.__file__).parent / "pretrained"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def shipped() -> dict[str, Path]:
    """The checkpoints inside the package: name -> folder."""
    return {path.parent.name: path.parent for path in sorted(PRETRAINED.glob(f"*/{CONFIG}"))}


def default(class_path: str) -> str | None:
    """The shipped checkpoint that answers when none is named.

    Args:
        class_path: of the network that is needed.

    Returns:
        Its name: the one whose notes say ``default: true``, or the only one there is; None otherwise.
    """
    fitting = {
        name: folder
        for name, folder in shipped().items()
        if (read_config(folder).get("network") or {}).get("class_path") == class_path
    }
    marked = [name for name, folder in fitting.items() if read_notes(folder).default]
    chosen = marked or list(fitting)
    return chosen[0] if len(chosen) == 1 else None


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint given as a path or by a shipped name.

    Raises:
        UserError: neither.
    """
    if not str(name):
        raise UserError("the name of the checkpoint is empty: give a shipped name, a folder or a Lightning .ckpt")
    if Path(name).is_dir() and ((Path(name) / CONFIG).exists() or str(name) not in shipped()):
        return Path(name)  # a folder that only happens to be called like a shipped checkpoint is none
    if ".." in Path(name).parts and _NAME.fullmatch(str(name).split("/")[0]):
        raise UserError(f"{name}: a name cannot have .. in it; give the path of a folder that is there")
    known = shipped()
    if str(name) not in known:
        raise UserError(
            f"{name}: no such checkpoint, neither a Lightning .ckpt nor a folder, nor a shipped one "
            f"({', '.join(known) or 'none are shipped'})"
        )
    return known[str(name)]
