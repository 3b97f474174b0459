"""Which parameters decay, and how the learning rate moves."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def remember_shapes(module: nn.Module) -> None:
    """Note which parameters are matrices, for :func:`parameter_groups` after a strategy has sharded them: flat shards
    all look like vectors."""
    for submodule in module.modules():
        matrices = {name for name, parameter in submodule.named_parameters(recurse=False) if parameter.ndim >= 2}
        object.__setattr__(submodule, _MATRICES, matrices)


_MATRICES = "_matrices_before_sharding"


def parameter_groups(module: nn.Module, weight_decay: float, *, decay_embeddings: bool = True) -> list[dict[str, Any]]:
    """Split the trainable parameters in two groups for an optimizer: matrices that decay, and all that must not.

    Biases, norm weights and other vectors never decay, nor does what a module names in ``no_weight_decay`` (A_log and
    D of the mixers).

    Args:
        module: the model.
        weight_decay: of the first group.
        decay_embeddings: whether embedding tables decay.

    Returns:
        ``[{"params", "weight_decay"}, {"params", "weight_decay": 0}]``, without empty groups.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    seen: set[int] = set()
    for submodule in module.modules():
        exempt = getattr(submodule, "no_weight_decay", ())
        matrices = getattr(submodule, _MATRICES, None)
        embedding = isinstance(submodule, nn.Embedding) and not decay_embeddings
        for name, parameter in submodule.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            matrix = parameter.ndim >= 2 if matrices is None else name in matrices
            (decay if matrix and name not in exempt and not embedding else keep).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, final_fraction: float = 0.0) -> LambdaLR:
    """A learning rate that rises linearly for ``warmup_steps``, then falls along half a cosine to the end.

    Args:
        optimizer: its groups' ``lr`` is the peak.
        warmup_steps: optimizer steps of rise; step 0 already takes 1/warmup_steps of the peak.
        total_steps: optimizer steps in all; past them the rate stays at its last value.
        final_fraction: the last rate as a share of the peak.
    """
    return LambdaLR(optimizer, lambda step: rate_at(step, warmup_steps, total_steps, final_fraction))


def rate_at(step: int, warmup_steps: int, total_steps: int, final_fraction: float = 0.0) -> float:
    """The share of the peak rate that step ``step`` (from 0) takes under :func:`warmup_cosine`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
