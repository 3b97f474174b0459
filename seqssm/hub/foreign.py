"""Weights of other libraries as models of this one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from seqssm.backbone import BackboneConfig, LanguageModel, MixerSpec
from seqssm.errors import UserError
from seqssm.hub.folders import CONFIG


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
