"""Mamba: the selective state space of Gu and Dao (2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.kernels import dispatch
from seqssm.kernels.causal_conv1d.op import causal_conv1d_step
from seqssm.kernels.mamba_step import LayerWeights, mamba_chunk, mamba_step
from seqssm.kernels.selective_scan.op import selective_scan_step
from seqssm.mixers import mamba_layer
from seqssm.mixers.base import (
    Mixer,
    Normed,
    RMSNorm,
    State,
    check_sizes,
    float32_parameter,
    init_dt_bias,
    join,
    merge_streams,
    project_streams,
    stream_directions,
)

# Sequences that advance together up to which one kernel for the whole layer beats matrix products.
_MOST_FUSED_STEPS = 32
# Tokens up to which, on a CPU, one call for the whole layer beats operators, whose matrix products are better.
_MOST_CHUNKED = 16


class Mamba(Mixer):
    """Mamba's block without its norm and residual (Gu and Dao, 2023, figure 3).

    State: ``conv`` (b, e, k-1), the last inputs of the convolution, and ``scan`` (b, e, n) float32.
    Parameter names and initialisation are the published ones, so that published weights fit.

    Args:
        d_model: model width d.
        d_state: state size n.
        d_conv: convolution width k.
        expand: inner width e = expand·d.
        dt_rank: rank of the step-size projection; "auto" is ceil(d/16).
        dt_min, dt_max, dt_floor: range of the initial step sizes, drawn log-uniformly, and their floor.
        dt_scale: scale of the initial step-size projection.
        conv_bias: give the convolution a bias.
        bias: give the input and output projections a bias.
    """

    state_keys: ClassVar = ("conv", "scan")
    float32_parameters: ClassVar = ("A_log", "D", "dt_proj.bias")
    no_weight_decay: ClassVar = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        dt_scale: float = 1.0,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model)
        rank = None if dt_rank == "auto" else dt_rank
        check_sizes("Mamba", d_state=d_state, d_conv=d_conv, dt_rank=rank, inner_width=expand * d_model)
        self.d_state, self.d_conv = d_state, d_conv
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -dt_scale * self.dt_rank**-0.5, dt_scale * self.dt_rank**-0.5)
        self.dt_proj.bias = float32_parameter(init_dt_bias(self.d_inner, dt_min, dt_max, dt_floor))
        # S4D-real: A = -(1, ..., n) in every channel.
        self.A_log = float32_parameter(torch.arange(1, d_state + 1).log().repeat(self.d_inner, 1))  # (e, n)
        self.D = float32_parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return {
            "conv": torch.zeros(batch, self.d_inner, self.d_conv - 1, device=device, dtype=dtype),
            "scan": torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=self.A_log.dtype),
        }

    def forward(
        self, x: Tensor, state: State | None = None, *, seq_idx: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, State]:
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            state = {key: state[key].clone() for key in self.state_keys}
            return self.step(x[:, 0], state).unsqueeze(1), state
        if torch.is_grad_enabled() and self.recomputes(x):
            return mamba_layer.run(self, x, None, state, seq_idx, reverse)
        return _run((self,), x, 1, state, seq_idx, reverse)

    def recomputes(self, x: Tensor) -> bool:
        return mamba_layer.available(self, x)

    def forward_recomputed(
        self, x: Tensor, source: Normed, state: State | None = None, *, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return mamba_layer.run(self, x, source, state, seq_idx, False)

    def run_streams(
        self,
        backward: Mixer | None,
        x: Tensor,
        *,
        strands: int = 1,
        seq_idx: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        if backward is None and strands == 1:
            return self(x, seq_idx=seq_idx, reverse=reverse)[0]
        mixers = (self,) if backward is None else (self, backward)
        return _run(mixers, x, strands, None, seq_idx, reverse)[0]  # type: ignore[arg-type]

    def chunks(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or self.operations.split:
            return False
        if x.shape[1] > _MOST_CHUNKED or not x.dtype == self.in_proj.weight.dtype == torch.float32:
            return False
        return dispatch.choose_backend("selective_scan", self.backend, x) == "numba"

    def residual_chunk(
        self, x: Tensor, norm: RMSNorm, state: State, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, State]:
        weights = self._weights(norm)
        y, conv, scan = mamba_chunk(x, state["conv"], state["scan"], weights, seq_idx=seq_idx, backend="numba")
        return y, {"conv": conv, "scan": scan}

    def _weights(self, norm: RMSNorm) -> LayerWeights:
        return LayerWeights(
            norm.weight,
            norm.eps,
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
            self.out_proj.weight,
            self.out_proj.bias,
        )

    def residual_step(self, x: Tensor, norm: RMSNorm, state: State) -> Tensor:
        if x.shape[0] > _MOST_FUSED_STEPS or not mamba_layer.available(self, x):
            return super().residual_step(x, norm, state)
        return mamba_step(x, state["conv"], state["scan"], self._weights(norm))

    def step(self, x: Tensor, state: State) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b, e) each
        u = causal_conv1d_step(state["conv"], u, self.conv1d.weight.squeeze(1), self.conv1d.bias, backend=self.backend)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan_step(
            state["scan"],
            u,
            F.linear(dt, self.dt_proj.weight),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            backend=self.backend,
        )
        return self.out_proj(y)


def _run(
    mixers: Sequence[Mamba], x: Tensor, strands: int, state: State | None, seq_idx: Tensor | None, reverse: bool
) -> tuple[Tensor, State]:
    """All (strand, mixer) streams, side by side in the channels, through one convolution and one scan.

    Streams are ordered strand by strand; s below counts them. x (b, l, strands·d).
    """
    first = mixers[0]
    e, n, r = first.d_inner, first.d_state, first.dt_rank
    directions = stream_directions(strands, len(mixers), reverse)
    u, z = project_streams(x, [m.in_proj for m in mixers], (e, e), strands)  # (b, l, s·e) each
    bias = None if first.conv1d.bias is None else join([m.conv1d.bias for m in mixers], strands)  # type: ignore[misc]
    u, conv = first.operations.causal_conv1d(
        u,
        join([m.conv1d.weight.squeeze(1) for m in mixers], strands),
        bias,
        initial_state=None if state is None else state["conv"],
        seq_idx=seq_idx,
        reverse=directions,
        backend=first.backend,
    )
    if len(mixers) == 1:
        selected = first.x_proj(u.unflatten(-1, (strands, e)))  # (b, l, s, r + 2n)
        delta = F.linear(selected[..., :r], first.dt_proj.weight).flatten(2)  # (b, l, s·e)
    else:
        by_mixer = u.unflatten(-1, (strands, len(mixers), e)).unbind(3)
        selected = torch.stack([m.x_proj(part) for m, part in zip(mixers, by_mixer, strict=True)], dim=3)
        # Block-diagonal, so that all step sizes leave one product side by side: r is small, its zeros cost little.
        weight = torch.block_diag(*(m.dt_proj.weight for m in mixers))
        delta = F.linear(selected[..., :r].flatten(3), weight).flatten(2)
        selected = selected.flatten(2, 3)
    y, scan = first.operations.selective_scan(
        u,
        delta,
        -torch.exp(join([m.A_log for m in mixers], strands)),
        selected[..., r : r + n],
        selected[..., r + n :],
        join([m.D for m in mixers], strands),
        z,
        join([m.dt_proj.bias for m in mixers], strands),
        delta_softplus=True,
        initial_state=None if state is None else state["scan"],
        seq_idx=seq_idx,
        reverse=directions,
        backend=first.backend,
    )
    return merge_streams(y, [m.out_proj for m in mixers], strands), {"conv": conv, "scan": scan}
