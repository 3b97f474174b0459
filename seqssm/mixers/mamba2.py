"""Mamba-2: state-space duality (Dao and Gu, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.errors import UserError
from seqssm.kernels.causal_conv1d.op import causal_conv1d_step
from seqssm.kernels.rms_norm.op import add_rms_norm
from seqssm.kernels.ssd.op import ssd_step
from seqssm.mixers import convolved_projection
from seqssm.mixers.base import (
    Mixer,
    State,
    check_sizes,
    float32_parameter,
    init_dt_bias,
    join,
    merge_streams,
    project_streams,
    stream_directions,
)


class Mamba2(Mixer):
    """Mamba-2's block without its norm and residual (Dao and Gu, 2024, section 7.1, the parallel form).

    State: ``conv`` (b, e + 2gn, k-1), the last inputs of the convolution, and ``scan`` (b, h, p, n) float32.
    Parameter names and initialisation are the published ones, so that published weights fit.

    Args:
        d_model: model width d.
        d_state: state size n.
        d_conv: convolution width k.
        expand: inner width e = expand·d.
        headdim: head width p; it must divide e.
        ngroups: groups g of B and C, and of the norm; it must divide the heads.
        A_init_range: range from which -A is drawn uniformly.
        dt_min, dt_max, dt_floor: range of the initial step sizes, drawn log-uniformly, and their floor.
        conv_bias: give the convolution a bias.
        bias: give the input and output projections a bias.
        norm_eps: epsilon of the gated norm.

    Raises:
        UserError: sizes do not divide.
    """

    state_keys: ClassVar = ("conv", "scan")
    float32_parameters: ClassVar = ("A_log", "D", "dt_bias")
    no_weight_decay: ClassVar = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model)
        check_sizes(
            "Mamba2", d_state=d_state, d_conv=d_conv, headdim=headdim, ngroups=ngroups, inner_width=expand * d_model
        )
        self.d_state, self.d_conv, self.headdim, self.ngroups = d_state, d_conv, headdim, ngroups
        self.d_inner = int(expand * d_model)
        if self.d_inner % headdim or (self.d_inner // headdim) % ngroups:
            raise UserError(
                f"Mamba2: headdim {headdim} must divide expand·d_model {self.d_inner}, and ngroups {ngroups} the heads"
            )
        self.heads = self.d_inner // headdim
        d_conv_inner = self.d_inner + 2 * ngroups * d_state  # x, B and C
        self.in_proj = nn.Linear(d_model, self.d_inner + d_conv_inner + self.heads, bias=bias)  # z, x, B, C, dt
        self.conv1d = nn.Conv1d(d_conv_inner, d_conv_inner, d_conv, groups=d_conv_inner, bias=conv_bias)
        self.dt_bias = float32_parameter(init_dt_bias(self.heads, dt_min, dt_max, dt_floor))
        self.A_log = float32_parameter(torch.empty(self.heads).uniform_(*A_init_range).log())
        self.D = float32_parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=norm_eps)
        self.norm_eps = norm_eps
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return {
            "conv": torch.zeros(batch, self.conv1d.out_channels, self.d_conv - 1, device=device, dtype=dtype),
            "scan": torch.zeros(batch, self.heads, self.headdim, self.d_state, device=device, dtype=self.A_log.dtype),
        }

    def forward(
        self, x: Tensor, state: State | None = None, *, seq_idx: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, State]:
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            state = {key: state[key].clone() for key in self.state_keys}
            return self.step(x[:, 0], state).unsqueeze(1), state
        e, gn = self.d_inner, self.ngroups * self.d_state
        sizes = (e, gn, gn)
        if not self.operations.split and convolved_projection.available(self.backend, x):
            z, (u, B, C), dt, conv = convolved_projection.run(
                x, self.in_proj, self.conv1d, e, sizes, None if state is None else state["conv"], seq_idx, reverse
            )
        else:
            z, xBC, dt = self.in_proj(x).split([e, e + 2 * gn, self.heads], dim=-1)
            xBC, conv = self.operations.causal_conv1d(
                xBC,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                initial_state=None if state is None else state["conv"],
                seq_idx=seq_idx,
                reverse=reverse,
                backend=self.backend,
            )
            u, B, C = xBC.split(sizes, dim=-1)
        initial = None if state is None else state["scan"]
        y, scan = _scan((self,), 1, u, dt, B, C, z, initial, seq_idx, (reverse,))
        return self.out_proj(y), {"conv": conv, "scan": scan}

    def run_streams(
        self,
        backward: Mixer | None,
        x: Tensor,
        *,
        strands: int = 1,
        seq_idx: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        mixers: Sequence[Mamba2] = (self,) if backward is None else (self, backward)  # type: ignore[assignment]
        if strands * len(mixers) == 1:
            return self(x, seq_idx=seq_idx, reverse=reverse)[0]
        e, gn = self.d_inner, self.ngroups * self.d_state
        directions = stream_directions(strands, len(mixers), reverse)
        sizes = (e, e, gn, gn, self.heads)
        z, u, B, C, dt = project_streams(x, [m.in_proj for m in mixers], sizes, strands)  # (b, l, s·size) each
        # Two convolutions: the scan takes x, and B and C, side by side by stream.
        weights = [m.conv1d.weight.squeeze(1).split([e, gn, gn]) for m in mixers]
        biases = [None if m.conv1d.bias is None else m.conv1d.bias.split([e, gn, gn]) for m in mixers]

        def convolve(parts: Sequence[int], inputs: Tensor) -> Tensor:
            weight = torch.cat([join([w[part] for w in weights], strands) for part in parts])
            bias = None
            if biases[0] is not None:
                bias = torch.cat([join([b[part] for b in biases if b is not None], strands) for part in parts])
            way = directions * len(parts)
            convolution = self.operations.causal_conv1d
            return convolution(inputs, weight, bias, seq_idx=seq_idx, reverse=way, backend=self.backend)[0]

        u = convolve([0], u)
        B, C = convolve([1, 2], torch.cat([B, C], dim=-1)).chunk(2, dim=-1)
        y, _ = _scan(mixers, strands, u, dt, B, C, z, None, seq_idx, directions)
        return merge_streams(y, [m.out_proj for m in mixers], strands)

    def step(self, x: Tensor, state: State) -> Tensor:
        e, gn = self.d_inner, self.ngroups * self.d_state
        z, xBC, dt = self.in_proj(x).split([e, e + 2 * gn, self.heads], dim=-1)
        xBC = causal_conv1d_step(
            state["conv"], xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, backend=self.backend
        )
        u, B, C = xBC.split([e, gn, gn], dim=-1)
        y = ssd_step(
            state["scan"],
            u.unflatten(-1, (self.heads, self.headdim)),
            dt,
            -torch.exp(self.A_log),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
            self.D,
            z.unflatten(-1, (self.heads, self.headdim)),
            self.dt_bias,
            dt_softplus=True,
            backend=self.backend,
        )
        return self.out_proj(_normalise((self,), 1, y.flatten(-2)))


def _scan(
    mixers: Sequence[Mamba2],
    strands: int,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    directions: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gated scan and its norm over all streams: u, z (b, l, s·e), dt (b, l, s·h), B, C (b, l, s·g·n)."""
    first = mixers[0]
    y, state = first.operations.ssd(
        u.unflatten(-1, (-1, first.headdim)),
        dt,
        -torch.exp(join([m.A_log for m in mixers], strands)),
        B.unflatten(-1, (-1, first.d_state)),
        C.unflatten(-1, (-1, first.d_state)),
        join([m.D for m in mixers], strands),
        z.unflatten(-1, (-1, first.headdim)),
        join([m.dt_bias for m in mixers], strands),
        dt_softplus=True,
        initial_state=initial_state,
        seq_idx=seq_idx,
        reverse=[direction for direction in directions for _ in range(first.ngroups)],
        backend=first.backend,
    )
    return _normalise(mixers, strands, y.flatten(-2)), state


def _normalise(mixers: Sequence[Mamba2], strands: int, y: Tensor) -> Tensor:
    """The published norm of the gated output y (..., s·e), within each group of channels."""
    first = mixers[0]
    weight = join([m.norm.weight for m in mixers], strands).to(y.dtype)
    groups = first.ngroups * strands * len(mixers)
    if groups == 1:
        backend = "auto" if first.backend == "numba" else first.backend
        return add_rms_norm(y, None, weight, first.norm_eps, backend=backend)[1]
    y = y.unflatten(-1, (groups, -1))
    return F.rms_norm(y, y.shape[-1:], None, first.norm.eps).flatten(-2) * weight
