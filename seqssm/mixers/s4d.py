"""S4D: the diagonal time-invariant state space of Gu, Gupta, Goel and Ré (2022)."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.errors import UserError
from seqssm.mixers.base import Mixer, State, check_sizes, float32_parameter
from seqssm.mixers.segments import SegmentGroup, by_segment, last_segment


class S4D(Mixer):
    """Gated S4D: ``out(ssm(u) · silu(z))`` with u, z projections of x.

    Each channel is its own linear time-invariant system with n/2 pairs of conjugate modes, S4D-Lin at the start
    (A = -1/2 + iπk, zero-order hold). A chunk is one FFT convolution with the system's impulse response; a single
    token is one step of the recurrence; both carry the same state, with gradients.

    State: ``scan`` (b, e, n/2, 2) float32, real and imaginary parts.

    Args:
        d_model: model width d.
        d_state: state size n, even: modes count with their conjugates.
        expand: inner width e = expand·d.
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
        bias: give the input and output projections a bias.
    """

    state_keys: ClassVar = ("scan",)
    float32_parameters: ClassVar = ("log_dt", "A_log", "A_imag", "C", "D")
    no_weight_decay: ClassVar = ("log_dt", "A_log", "A_imag", "D")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        expand: float = 2,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model)
        check_sizes("S4D", d_state=d_state, inner_width=expand * d_model)
        if d_state < 2 or d_state % 2:
            raise UserError(f"S4D: d_state must be even, got {d_state}: its modes come in conjugate pairs")
        self.d_inner, self.modes = int(expand * d_model), d_state // 2
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.log_dt = float32_parameter(torch.empty(self.d_inner).uniform_(math.log(dt_min), math.log(dt_max)))
        self.A_log = float32_parameter(torch.full((self.d_inner, self.modes), math.log(0.5)))  # log(-Re A)
        self.A_imag = float32_parameter(math.pi * torch.arange(self.modes).repeat(self.d_inner, 1))
        self.C = float32_parameter(torch.randn(self.d_inner, self.modes, 2) * math.sqrt(0.5))
        self.D = float32_parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        device = device or self.D.device
        return {"scan": torch.zeros(batch, self.d_inner, self.modes, 2, device=device, dtype=self.D.dtype)}

    def forward(
        self, x: Tensor, state: State | None = None, *, seq_idx: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, State]:
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            state = {"scan": state["scan"].clone()}
            return self.step(x[:, 0], state).unsqueeze(1), state
        initial = None if state is None else torch.view_as_complex(state["scan"])
        y, u, system, initial = self._mix(x, initial, seq_idx, reverse)
        with torch.autocast(x.device.type, enabled=False):
            final = _final_state(system, u, initial, seq_idx, reverse)
        return y, {"scan": torch.view_as_real(final)}

    def output(self, x: Tensor, *, seq_idx: Tensor | None = None, reverse: bool = False) -> Tensor:
        return self._mix(x, None, seq_idx, reverse)[0]

    def step(self, x: Tensor, state: State) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b, e) each
        dtype = self.D.dtype
        system = self._system(1)
        h = torch.view_as_complex(state["scan"])  # (b, e, n/2), written through
        h.mul_(system.power(1)).add_(u.to(dtype)[..., None] * system.drive)
        y = 2 * (system.C * h).sum(-1).real + self.D * u.to(dtype)
        return self.out_proj(y.to(u.dtype) * F.silu(z))

    def _mix(
        self, x: Tensor, initial: Tensor | None, seq_idx: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, _System, Tensor | None]:
        """The output (b, l, d), and at full precision the input u (b, l, e), the system, and the state that enters."""
        projected, z = self.in_proj(x).chunk(2, dim=-1)
        u = projected.to(self.D.dtype)
        with torch.autocast(x.device.type, enabled=False):
            system = self._system(x.shape[1])
            if initial is None and self.operations.split:
                initial = self._enter(system, u, seq_idx, reverse)
            if seq_idx is None:
                y = _convolve(system, u, initial, reverse)
            elif reverse:
                y = _convolve_segments(system, u.flip(1), initial, seq_idx.flip(1)).flip(1)
            else:
                y = _convolve_segments(system, u, initial, seq_idx)
            y = torch.addcmul(y, u, self.D)
        return self.out_proj(y.to(projected.dtype) * F.silu(z)), u, system, initial

    def _enter(self, system: _System, u: Tensor, seq_idx: Tensor | None, reverse: bool) -> Tensor:
        """(b, e, n/2): the state at the first token in reading order, where other processes hold what comes before."""
        end = _final_state(system, u, None, seq_idx, reverse)
        decay = system.power(u.shape[1]).expand_as(end)
        if seq_idx is not None:
            decay = decay * last_segment(seq_idx)[1][:, None, None]
        return self.operations.enter(end, decay, seq_idx=seq_idx, reverse=reverse)

    def _system(self, length: int) -> _System:
        """The discrete system (zero-order hold), with the powers of its decay that ``length`` tokens need."""
        # In float64: a slow mode's decay is one minus little, and its phase grows with the length.
        dt = self.log_dt.double().exp()[:, None]
        A = torch.complex(-self.A_log.double().exp(), self.A_imag.double())
        C = torch.view_as_complex(self.C)
        block = 2 ** math.ceil(math.log2(length) / 2)
        return _System(
            log_decay=dt * A,
            drive=(torch.expm1(dt * A) / A).to(C.dtype),
            C=C,
            fine=_powers(dt * A, block).to(C.dtype),
            coarse=_powers(dt * A * block, -(-length // block)).to(C.dtype),
        )


class _System(NamedTuple):
    """h_t = exp(log_decay) h_{t-1} + drive u_t, y_t = 2 Re(C h_t), for e channels of n/2 modes.

    Powers of the decay are kept in two short tables, since t = q·block + r: ``fine`` (e, n/2, block) for r and
    ``coarse`` (e, n/2, blocks) for q·block. Sums over modes or over time are then matrix products, and nothing of size
    n·length is ever made.
    """

    log_decay: Tensor
    drive: Tensor
    C: Tensor
    fine: Tensor
    coarse: Tensor

    def power(self, tokens: int) -> Tensor:
        """(e, n/2) decay over some tokens."""
        return torch.exp(self.log_decay * tokens).to(self.C.dtype)

    def response(self, h: Tensor, length: int) -> Tensor:
        """y of ``length`` tokens, (..., e, length), from the state h (..., e, n/2) at the first, without input."""
        fine = self.fine[..., :length]
        left = (self.C * h)[..., None] * self.coarse[..., : -(-length // fine.shape[-1])]
        left = torch.cat([left.real, -left.imag], dim=-2).transpose(-1, -2)  # (..., e, q, n)
        right = torch.cat([fine.real, fine.imag], dim=-2)  # (e, n, t)
        return 2 * (left @ right).flatten(-2)[..., :length]


def _powers(log_decay: Tensor, count: int) -> Tensor:
    """exp(t · log_decay) for t = 0 ... count-1, (e, n, count): by doubling, since products cost less than exps."""
    table = torch.ones_like(log_decay)[..., None]
    while table.shape[-1] < count:
        table = torch.cat([table, table * torch.exp(log_decay * table.shape[-1])[..., None]], dim=-1)
    return table[..., :count]


def _convolve(system: _System, u: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """The response to u (b, l, e), and to the state (b, e, n/2) that enters: (b, l, e)."""
    length = u.shape[1]
    kernel = system.response(system.drive, length)  # (e, l)
    size = _fft_size(2 * length - 1)
    spectrum = torch.fft.rfft(kernel, n=size)
    if reverse:
        spectrum = spectrum.conj()  # correlates: sums over the tokens that follow
    y = torch.fft.irfft(torch.fft.rfft(u.transpose(1, 2), n=size) * spectrum, n=size)[..., :length]
    if initial is not None:
        entering = system.response(initial * system.power(1), length)  # (b, e, l)
        y = y + (entering.flip(-1) if reverse else entering)
    return y.transpose(1, 2)


def _convolve_segments(system: _System, u: Tensor, initial: Tensor | None, seq_idx: Tensor) -> Tensor:
    """:func:`_convolve` of each segment by itself."""

    def run(group: SegmentGroup) -> Tensor:
        state = None if initial is None else initial[group.rows] * group.first[:, None, None]
        return _convolve(system, group.take(u), state, False)

    return by_segment(run, seq_idx)


def _final_state(system: _System, u: Tensor, initial: Tensor | None, seq_idx: Tensor | None, reverse: bool) -> Tensor:
    """(b, e, n/2) complex: the state after the last token of u (b, l, e) in reading order."""
    if reverse:
        u, seq_idx = u.flip(1), None if seq_idx is None else seq_idx.flip(1)
    length = u.shape[1]
    carried: Tensor | None = None
    if seq_idx is not None:
        last, carried = last_segment(seq_idx)
        before = torch.arange(length, device=u.device) < length - last[:, None]
        u = u.masked_fill(before[..., None], 0)
    block, blocks = system.fine.shape[-1], system.coarse.shape[-1]
    # Zeros in front change nothing: the sum starts there.
    u = F.pad(u.transpose(1, 2), (blocks * block - length, 0)).unflatten(-1, (blocks, block))  # (b, e, q, t)
    within = torch.view_as_real(system.fine.flip(-1))  # (e, n/2, t, 2)
    ends = torch.view_as_complex(torch.einsum("beqt,entr->beqnr", u, within))  # what each block adds by its end
    final = (ends * system.coarse.flip(-1).transpose(-1, -2)).sum(2) * system.drive
    if initial is not None:
        entering = initial * system.power(length)
        final = final + (entering if carried is None else entering * carried[:, None, None])
    return final


def _fft_size(minimum: int) -> int:
    """The smallest 2^k or 3·2^k that is at least ``minimum``: sizes for which FFTs are fast."""
    power = 2 ** math.ceil(math.log2(minimum))
    return power // 4 * 3 if power // 4 * 3 >= minimum else power
