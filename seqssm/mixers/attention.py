"""Softmax attention for hybrid stacks."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.errors import UserError
from seqssm.mixers.base import Mixer, Reading, State, check_sizes
from seqssm.mixers.segments import SegmentGroup, by_segment, last_segment


class Attention(Mixer):
    """Multi-head attention with rotary positions (Su et al., 2021), causal or two-way (``causal = False``).

    State: ``key`` and ``value`` (b, m, kv_heads, d/heads), keys before rotation, the newest last, and ``length`` (b,),
    how many of them, from the right, are real. Positions are relative to the cache, so they never outgrow a float.
    Without a window the cache grows with the sequence, and a chunk of l tokens behind m cached ones takes an
    l × (m + l) mask; with a window it holds the last ``window`` tokens, and memory is constant.

    Args:
        d_model: model width d.
        heads: query heads; d/heads must be even.
        kv_heads: heads of keys and values, shared evenly by the query heads (Ainslie et al., 2023); ``heads`` if None.
        window: how many tokens, itself included, a causal token sees; all if None. Two-way attention sees everything.
        rope_theta: base of the rotary wavelengths.
        bias: give the projections a bias.

    Raises:
        UserError: sizes do not divide.
    """

    recurrent: ClassVar = False
    state_keys: ClassVar = ("key", "value", "length")

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        kv_heads: int | None = None,
        window: int | None = None,
        rope_theta: float = 10_000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model)
        check_sizes("Attention", heads=heads, kv_heads=kv_heads)
        self.heads, self.kv_heads, self.window = heads, heads if kv_heads is None else kv_heads, window
        if d_model % (2 * heads) or heads % self.kv_heads:
            raise UserError(f"Attention: d_model {d_model} / heads {heads} must be even, and kv_heads divide heads")
        if window is not None and window < 1:
            raise UserError(f"Attention: window must be at least 1, got {window}")
        self.head_dim, self.rope_theta = d_model // heads, rope_theta
        self.in_proj = nn.Linear(d_model, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        shape = (batch, self.window or 0, self.kv_heads, self.head_dim)
        return {
            "key": torch.zeros(shape, device=device, dtype=dtype),
            "value": torch.zeros(shape, device=device, dtype=dtype),
            "length": torch.zeros(batch, dtype=torch.long, device=device),
        }

    def forward(
        self, x: Tensor, state: State | None = None, *, seq_idx: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, State]:
        if reverse:
            flipped = None if seq_idx is None else seq_idx.flip(1)
            y, state = self(x.flip(1), state, seq_idx=flipped)
            return y.flip(1), state
        q, k, v = self._project(x)
        if not self.causal:
            y, new = self._by_segment(q, k, v, seq_idx), {}
        elif state is None:
            y, new = self._by_segment(q, k, v, seq_idx), self._cache(k, v, self._run_length(None, seq_idx, x))
        else:
            past = state["key"].shape[1]
            k = torch.cat([state["key"].to(k.dtype), k], dim=1)
            v = torch.cat([state["value"].to(v.dtype), v], dim=1)
            y = self._attend_mask(q, k, v, self._mask(state["length"], seq_idx, past, x.shape[1]))
            new = self._cache(k, v, self._run_length(state, seq_idx, x))
        return self.out_proj(y.flatten(2)), new

    def readings(self, reverse: bool = False) -> list[Reading]:
        if not self.causal or self.window is None:
            raise UserError(
                "this model's attention sees the whole sequence at once, so it cannot read a long one in constant "
                "memory; train one with attention that is causal and has a window, or without attention"
            )
        return super().readings(reverse)

    def step(self, x: Tensor, state: State) -> Tensor:
        y, new = self(x.unsqueeze(1), state)
        for key, value in new.items():
            if state[key].shape == value.shape:
                state[key].copy_(value)  # the same memory, for CUDA graphs
            else:
                state[key] = value
        return y.squeeze(1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim))  # (b, l, heads + 2 kv_heads, d/heads)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        return q, k, v

    # ---- whole sequences -------------------------------------------------------------------------------------------

    def _by_segment(self, q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor | None) -> Tensor:
        if seq_idx is None:
            return self._attend(q, k, v, None)

        def run(group: SegmentGroup) -> Tensor:
            # Causal tokens never see the padding behind them.
            keys = None if self.causal else group.real[:, None, None, :]
            return self._attend(group.take(q), group.take(k), group.take(v), keys)

        return by_segment(run, seq_idx)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        """q (b, l, heads, p), k, v (b, l, kv_heads, p) -> (b, l, heads, p); ``keys`` (b, 1, 1, l) masks keys."""
        length = q.shape[1]
        if not self.causal or self.window is None or length <= self.window:
            return self._sdpa(self._rotate(q), self._rotate(k), v, keys, self.causal)
        return self._attend_window(q, k, v, self.window)

    def _attend_window(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Blocks of ``window`` queries see their own block and the one before: memory grows with l, not with l²."""
        length = q.shape[1]
        blocks = -(-length // window)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, blocks * window - length)) for x in (q, k, v))
        first = self._sdpa(self._rotate(q[:, :window]), self._rotate(k[:, :window]), v[:, :window], None, True)
        queries = q[:, window:].unflatten(1, (blocks - 1, window)).flatten(0, 1)
        keys, values = (x.unfold(1, 2 * window, window).movedim(-1, 2).flatten(0, 1) for x in (k, v))
        i, j = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
        visible = (j > i) & (j <= i + window)  # key j of the pair of blocks, query i of the second
        rest = self._sdpa(self._rotate(queries, window), self._rotate(keys), values, visible, False)
        return torch.cat([first, rest.unflatten(0, (-1, blocks - 1)).flatten(1, 2)], dim=1)[:, :length]

    # ---- behind a cache --------------------------------------------------------------------------------------------

    def _mask(self, cached: Tensor, seq_idx: Tensor | None, past: int, length: int) -> Tensor:
        """(b, 1, l, past + l): which keys each new token sees; ``cached`` (b,) counts the real ones of the past."""
        device = cached.device
        i, j = torch.arange(past, past + length, device=device)[:, None], torch.arange(past + length, device=device)
        visible = (j <= i) if self.window is None else (j <= i) & (j > i - self.window)
        visible = visible & (j >= past - cached[:, None, None])  # (b, l, past + l)
        if seq_idx is not None:
            changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1)
            segment = F.pad(changes, (1, 0))  # (b, l), 0 continues the cache
            visible = visible & (segment[:, :, None] == F.pad(segment, (past, 0))[:, None, :])
        return visible[:, None]

    def _attend_mask(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self._sdpa(self._rotate(q, k.shape[1] - q.shape[1]), self._rotate(k), v, mask, False)

    def _run_length(self, state: State | None, seq_idx: Tensor | None, x: Tensor) -> Tensor:
        """(b,) tokens since the last reset, after x."""
        batch, length, _ = x.shape
        before = torch.zeros(batch, dtype=torch.long, device=x.device) if state is None else state["length"]
        if seq_idx is None:
            return before + length
        last, whole = last_segment(seq_idx)
        return last + before * whole

    def _cache(self, k: Tensor, v: Tensor, length: Tensor) -> State:
        if self.window is not None:
            short = max(0, self.window - k.shape[1])
            # Copies: a view would keep the whole chunk's projection alive.
            k, v = (F.pad(x[:, -self.window :], (0, 0, 0, 0, short, 0)).clone() for x in (k, v))
            length = length.clamp(max=self.window)
        return {"key": k, "value": v, "length": length}

    # ---- kernels ---------------------------------------------------------------------------------------------------

    def _rotate(self, x: Tensor, offset: int = 0) -> Tensor:
        """Rotate pairs of channels of x (b, l, h, p) by their positions, ``offset`` ... offset + l - 1."""
        half = self.head_dim // 2
        # In float64: at a million tokens float32 would be off by a twentieth of a radian.
        position = torch.arange(offset, offset + x.shape[1], device=x.device, dtype=torch.float64)
        rate = self.rope_theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
        angle = position[:, None, None] * rate  # (l, 1, p/2)
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        a, b = x.to(wide).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = self.kv_heads != self.heads
        if grouped and mask is not None:
            # The fused kernels that take a mask take no grouped heads.
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
            grouped = False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return y.transpose(1, 2)
