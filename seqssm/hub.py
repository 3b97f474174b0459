"""Checkpoints as folders that anyone can read: config.json, model.safetensors, README.md, and metrics.json if any.

config.json holds ``format_version``, ``task`` (a class path), ``init_args`` (its arguments, plain data), ``version`` of
the package that wrote it, the ``sha256`` of the weights, and optionally ``data`` and ``training`` (how they were made).
Nothing in the folder is ever run: no pickles, and only classes of this package are built.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import seqssm
from seqssm.backbone import BackboneConfig, LanguageModel, MixerSpec
from seqssm.errors import UserError

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD, METRICS = "config.json", "model.safetensors", "README.md", "metrics.json"
_REQUIRED = {"format_version", "version", "task", "init_args", "sha256"}
_KEYS = _REQUIRED | {"data", "training"}


def save(
    folder: str | Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    card: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all; a checkpoint that is there already is replaced.

    Args:
        folder: where.
        config: ``task`` and ``init_args``, optionally ``version``, ``data`` and ``training``; plain JSON data.
        weights: the state dict.
        card: the README; :func:`model_card` when None.
        metrics: results, written as metrics.json.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else, or cannot be written.
        ValueError: ``config`` has other keys.
    """
    folder = Path(folder)
    content = {"format_version": FORMAT_VERSION, "version": seqssm.__version__, **config}
    if set(content) - _KEYS or _REQUIRED - {"sha256"} - set(content):
        raise ValueError(
            f"a checkpoint's config needs task and init_args, may have data and training: {sorted(config)}"
        )
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and is not a checkpoint; choose another name")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            # Clones, since safetensors refuses tensors that share memory.
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, temporary / WEIGHTS)
            content["sha256"] = _sha256(temporary / WEIGHTS)
            (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            if metrics is not None:
                (temporary / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            text = model_card(content, weights, metrics) if card is None else card
            (temporary / CARD).write_text(text, encoding="utf-8")
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
        raise UserError(f"cannot write the checkpoint {folder}: {error.strerror or error}") from error
    return folder


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
        digest = _sha256(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; copy the whole checkpoint folder") from error
    if digest != config["sha256"]:
        raise UserError(f"{path} is not the file that was saved (its SHA-256 differs from config.json); copy it again")
    try:
        return config, load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error


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
    return config


def build(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """Build the module that :func:`load` described, in evaluation mode, with its weights.

    Its class, which must be one of this package, is built by its ``from_init_args``, or by its arguments.

    Raises:
        UserError: the class is foreign or unknown, or arguments or weights do not fit it.
    """
    cls = _own_class(config["task"])
    make = getattr(cls, "from_init_args", None)
    try:
        module = make(config["init_args"]) if make else cls(**config["init_args"])
    except TypeError as error:
        raise UserError(f"the checkpoint's init_args do not fit {config['task']}: {error}") from error
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint's weights do not fit {config['task']}: {reason}") from error
    return module.eval()


def load_model(folder: str | Path) -> nn.Module:
    """:func:`load` and :func:`build`."""
    return build(*load(folder))


def shipped() -> dict[str, Path]:
    """The checkpoints inside the package: name -> folder."""
    root = Path(__file__).parent / "pretrained"
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{CONFIG}"))}


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint given as a path or by a shipped name.

    Raises:
        UserError: neither.
    """
    if Path(name).is_dir():
        return Path(name)
    known = shipped()
    if str(name) not in known:
        raise UserError(f"{name}: no such folder, nor a shipped checkpoint ({', '.join(known) or 'none are shipped'})")
    return known[str(name)]


def model_card(config: Mapping[str, Any], weights: Mapping[str, Tensor], metrics: Mapping[str, Any] | None) -> str:
    """A README with YAML front matter: what the model is, how it scored, how to load it."""
    task = config["task"].rpartition(".")[2]
    parameters = sum(v.numel() for v in weights.values())
    lines = [
        "---",
        "library_name: seqssm",
        "tags: [seqssm, mamba, state-space-model]",
        "---",
        "",
        f"# {task}",
        "",
        f"{parameters:,} parameters, written by seqssm {config['version']}. `seqssm.hub.load_model(FOLDER)` loads it.",
    ]
    scores = (metrics or {}).get("metrics", {})
    if scores:
        lines += ["", "| metric | value | 95% interval | n |", "|---|---|---|---|"]
        for name, score in scores.items():
            interval = f"{score['low']:.3f} to {score['high']:.3f}" if "low" in score and "high" in score else ""
            lines.append(f"| {name} | {score['value']:.3f} | {interval} | {score.get('n', '')} |")
    settings = json.dumps(config["init_args"], indent=2)
    return "\n".join([*lines, "", "Settings:", "", "```json", settings, "```", ""])


# ---- weights of other libraries ------------------------------------------------------------------------------------


def from_transformers(source: str | Path | tuple[Mapping[str, Any], Mapping[str, Tensor]]) -> LanguageModel:
    """A Mamba or Mamba2 language model of the transformers library, as a :class:`LanguageModel` in evaluation mode.

    Args:
        source: a folder with config.json and model.safetensors (also in shards), or (config, state dict).

    Raises:
        UserError: files are missing or damaged, or the model has a setting that this package does not have.
    """
    config, weights = _read_transformers(Path(source)) if isinstance(source, (str, Path)) else source
    kind = config.get("model_type")
    if kind not in ("mamba", "mamba2"):
        raise UserError(f"cannot read a transformers model of type {kind!r}: only mamba and mamba2")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {config['hidden_act']!r} is not supported: only silu")
    arguments: dict[str, Any] = {
        "d_state": config["state_size"],
        "d_conv": config["conv_kernel"],
        "expand": config["expand"],
        "conv_bias": config["use_conv_bias"],
        "bias": config["use_bias"],
    }
    if kind == "mamba":
        rank = config["time_step_rank"]
        spec = MixerSpec(class_path="Mamba", init_args={**arguments, "dt_rank": rank})
    else:
        # In its files, transformers writes infinity as {"__float__": "Infinity"}.
        limits = config.get("time_step_limit", (0.0, "inf"))
        low, high = (float(limit["__float__"] if isinstance(limit, Mapping) else limit) for limit in limits)
        if low > 0 or high != float("inf"):
            raise UserError(f"time_step_limit {low, high} is not supported: step sizes are not clamped here")
        arguments |= {"headdim": config["head_dim"], "ngroups": config["n_groups"]}
        spec = MixerSpec(class_path="Mamba2", init_args={**arguments, "norm_eps": config["layer_norm_epsilon"]})
    backbone = BackboneConfig(
        d_model=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        mixers={"m": spec},
        norm_eps=config["layer_norm_epsilon"],
        residual_in_fp32=config["residual_in_fp32"],
    )
    tie = bool(config.get("tie_word_embeddings", kind == "mamba"))
    model = LanguageModel(config["vocab_size"], backbone, tie)
    renamed = {_rename(name): value for name, value in weights.items()}
    if tie:
        renamed.pop("head.weight", None)
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit their config: {' '.join(str(error).split())}") from error
    return model.eval()


def _rename(name: str) -> str:
    for old, new in (
        ("backbone.embeddings.", "embedding."),
        ("backbone.embedding.", "embedding."),
        ("backbone.norm_f.", "backbone.norm."),
        ("lm_head.", "head."),
    ):
        name = name.replace(old, new)
    return name


def _read_transformers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no model.safetensors; pickled weights are not read")
        weights: dict[str, Tensor] = {}
        for file in files:
            weights |= load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: not a readable transformers model ({error})") from error
    return config, weights


def _own_class(path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    if module.partition(".")[0] != "seqssm":
        raise UserError(f"the checkpoint's task is {path}, not one of seqssm's classes; load its weights in Python")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the checkpoint's task {path} is unknown to seqssm {seqssm.__version__}") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(f"the checkpoint's task {path} is not a model")
    return cls


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
