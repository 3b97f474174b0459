"""Logits that mean what they say: one scale and a bias a class, fitted on windows that were not trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.tasks.dna_network import DNANetwork


def fit_scaling(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[float, Tensor]:
    """The scale a and the bias b for which softmax(a · logits + b) has the least log loss.

    Where every window comes out right, the loss falls for ever as a grows, and what is returned means nothing.

    Temperature scaling (Guo et al., 2017, "On calibration of modern neural networks") with a bias: a network that knows
    its training sequences by heart prefers some classes on others, and what that costs grows with the length of the
    windows, as a mean over more positions leaves less noise to hide it.

    Args:
        logits: (n, c).
        labels: (n,) class ids.
        weights: (n,) of the windows; None for equal ones.

    Returns:
        a, positive, and b (c,) in float64, whose mean is 0.
    """
    logits = logits.double()
    weights = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights.double()
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nll = F.cross_entropy(log_scale.exp() * logits + bias, labels, reduction="none")
        # The faintest pull to no bias settles what the softmax leaves open.
        value = (nll * weights).sum() / weights.sum() + 1e-9 * bias.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float(log_scale.detach().exp()), (bias - bias.mean()).detach()


@torch.no_grad()
def rescale(network: DNANetwork, scale: float, bias: Tensor) -> None:
    """Have a network's logits be scale · logits + bias (c,) from now on."""
    network.check_single()
    last = network.head[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(scale)
    last.bias.mul_(scale).add_(bias.to(last.bias))
    if network.composition is not None:
        network.composition.table.mul_(scale)
        network.composition.bias.mul_(scale)
