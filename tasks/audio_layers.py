"""The parts of an audio tagger around its backbone: the stem that makes tokens of frames, and the pooling over time."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.errors import UserError
from seqssm.mixers import State

PoolingKind = Literal["mean", "mean_max", "attention", "last"]
Downsampling = Literal["stride", "max"]


def real_positions(lengths: Tensor | None, size: int) -> Tensor | None:
    """(b, size) True where a position is no padding; None without lengths, where nothing is padded."""
    return None if lengths is None else torch.arange(size, device=lengths.device) < lengths[:, None]


def padded_lengths(features: Tensor, lengths: Tensor) -> Tensor | None:
    """The lengths (b,) of features (b, l, mel), or None where nothing is padded and no masks are needed.

    This waits for the device of the lengths.
    """
    return None if bool((lengths == features.shape[1]).all()) else lengths


def shorter(lengths: Tensor | None, stride: int, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Lengths after a stride, and which of the ``size`` positions then are real."""
    lengths = None if lengths is None else -(-lengths // stride)
    return lengths, real_positions(lengths, size)


class MaskedBatchNorm(nn.Module):
    """Batch normalisation over (b, t, f) of x (b, c, t, f) that leaves padding out of its statistics.

    What it gives at padded positions means nothing.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        if not self.training or real is None:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        # Sums under a mask: to pick the real positions would wait for a GPU to say how many there are.
        mask = real[:, None, :, None]
        count = real.sum() * x.shape[3]
        mean = x.float().masked_fill(~mask, 0).sum((0, 2, 3)) / count
        centred = (x - mean[:, None, None]).masked_fill(~mask, 0)
        variance = centred.square().sum((0, 2, 3)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Convolution(NamedTuple):
    """What one convolution of a stem reads, and whether it ends a layer, by a stride in time of so much."""

    channels: int
    bands: int
    ends: bool
    stride: int


class FrameStem(nn.Module):
    """Log-mel frames to tokens: 3 x 3 convolutions in time and frequency, then one projection of all bands.

    Each layer halves the bands; the first ones also take the time strides, whose product is ``frame_group``, so that
    token j stands for the frames [j g, (j + 1) g). A causal stem sees no frame beyond its group and carries a state.

    Args:
        n_mels: bands of a frame.
        d_model: width of a token.
        frame_group: g, frames a token.
        channels: of each layer.
        causal: whether it sees the past alone.
        downsampling: by the strides of a layer's last convolution, or by maxima of what dense ones give, which costs
            more.
        depth: convolutions a layer.

    Raises:
        UserError: more time strides than layers, or no convolutions.
    """

    def __init__(
        self,
        n_mels: int,
        d_model: int,
        frame_group: int,
        channels: list[int],
        causal: bool,
        downsampling: Downsampling = "stride",
        depth: int = 1,
    ) -> None:
        super().__init__()
        strides = _factors(frame_group)
        if frame_group < 1 or not channels or min(channels) < 1 or len(strides) > len(channels):
            raise UserError(
                f"model.frame_group {frame_group} takes {len(strides)} layers with a time stride, stem_channels has "
                f"{len(channels)}: choose a frame_group such as 2, 4 or 8, or give more stem_channels"
            )
        if depth < 1:
            raise UserError(f"model.stem_depth is {depth}: a layer of the stem needs a convolution")
        self.frame_group, self.causal, self.downsampling = frame_group, causal, downsampling
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        self._plan: list[_Convolution] = []
        before, bands = 1, n_mels
        for after, stride in zip(channels, [*strides, *[1] * (len(channels) - len(strides))], strict=True):
            for i in range(depth):
                one = _Convolution(before, bands, i == depth - 1, stride)
                kernel = (3 if self._dense(one) else stride + 1, 3)
                step = (stride, 2) if one.ends and downsampling == "stride" else (1, 1)
                self._plan.append(one)
                self.convolutions.append(nn.Conv2d(before, after, kernel, step, bias=False))
                self.norms.append(MaskedBatchNorm(after))
                before = after
            bands = -(-bands // 2)
        self.projection = nn.Linear(channels[-1] * bands, d_model)

    def tokens(self, frames: Tensor) -> Tensor:
        """Tokens that so many frames make."""
        return -(-frames // self.frame_group)

    def init_state(self, batch: int) -> State:
        """The frames before the first: zeros, which is what padding holds."""
        weight = self.projection.weight
        return {
            str(i): weight.new_zeros(batch, one.channels, self._past(one), one.bands)
            for i, one in enumerate(self._plan)
        }

    def _dense(self, one: _Convolution) -> bool:
        """Whether the convolution gives something for every frame that it reads."""
        return not one.ends or one.stride == 1 or self.downsampling == "max"

    def _past(self, one: _Convolution) -> int:
        return 2 if self._dense(one) else 1

    def forward(self, features: Tensor, lengths: Tensor | None, state: State | None = None) -> tuple[Tensor, State]:
        """Make tokens.

        Args:
            features: (b, l, mel) normalised frames. What lies beyond ``lengths`` is not looked at.
            lengths: (b,) real frames; None where nothing is padded.
            state: what the previous chunk returned, for a causal stem; chunks but the last are whole groups.

        Returns:
            (b, ceil(l / g), d) tokens, and the state.
        """
        x = features.unsqueeze(1)  # (b, 1, l, mel)
        real = real_positions(lengths, x.shape[2])
        x = _masked(x, real)
        new_state: State = {}
        for i, (one, convolution, norm) in enumerate(zip(self._plan, self.convolutions, self.norms, strict=True)):
            past, strided = self._past(one), not self._dense(one)
            # The last group may not be whole; maxima take it as it is.
            x = F.pad(x, (0, 0, 0, -x.shape[2] % one.stride)) if strided else x
            if state is not None:
                x = torch.cat([state[str(i)].to(x.dtype), x], dim=2)
                new_state[str(i)] = x[:, :, x.shape[2] - past :].clone()
            # A strided convolution needs one frame of the past; a dense one looks two back, or one to either side.
            ahead = 1 if not strided and not self.causal else 0
            x = convolution(F.pad(x, (1, 1, 0 if state is not None else past - ahead, ahead)))
            if one.ends and self.downsampling == "stride":
                lengths, real = shorter(lengths, one.stride, x.shape[2])
            x = _masked(F.relu(norm(x, real)), real)
            if one.ends and self.downsampling == "max":
                # Nothing is negative, so the zeros of the padding change no maximum.
                x = F.max_pool2d(x, (one.stride, 2), ceil_mode=True)
                lengths, real = shorter(lengths, one.stride, x.shape[2])
        return self.projection(x.transpose(1, 2).flatten(2)), new_state


def _masked(x: Tensor, real: Tensor | None) -> Tensor:
    """Zero in the padding, as the convolution's own padding is."""
    return x if real is None else x.masked_fill(~real[:, None, :, None], 0)


def _factors(number: int) -> list[int]:
    """Prime factors, ascending."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


class Pooling(nn.Module):
    """Clip scores as a weighted mean of frame scores: equal weights, learnt ones, or all on the last frame; or halfway
    between the mean and the greatest score, so that a short event in a long silence counts.

    Learnt weights are the softmax over time of a linear map, a class each. The running form carries the sum of the
    weights, the weighted sum, the largest exponent and the greatest score, so that a stream of any length takes
    constant memory.

    Args:
        kind: ``mean``, ``mean_max``, ``attention`` or ``last``.
        d_model: width of what the weights are computed from.
        classes: number of scores c.
    """

    def __init__(self, kind: PoolingKind, d_model: int, classes: int) -> None:
        super().__init__()
        self.kind, self.classes = kind, classes
        if kind == "attention":
            self.attention = nn.Linear(d_model, classes)
            nn.init.zeros_(self.attention.weight)  # at the start, the mean
            nn.init.zeros_(self.attention.bias)

    def init_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """Nothing pooled yet. Sums are float64: ten hours are a million frames."""
        zeros = torch.zeros(batch, self.classes, dtype=torch.float64, device=device)
        state = {"peak": torch.full_like(zeros, -torch.inf), "weight": zeros, "total": zeros.clone()}
        return {**state, "highest": torch.full_like(zeros, -torch.inf)} if self.kind == "mean_max" else state

    def forward(self, logits: Tensor, y: Tensor, lengths: Tensor | None) -> Tensor:
        """Pool frame logits (b, t, c) with y (b, t, d) behind them, over the first ``lengths`` (b,) or all: (b, c)."""
        if self.kind == "last":
            if lengths is None:
                return logits[:, -1]
            return logits[torch.arange(len(logits), device=logits.device), lengths - 1]
        real = real_positions(lengths, logits.shape[1])
        if self.kind in ("mean", "mean_max"):
            known = logits if real is None else logits.masked_fill(~real[..., None], 0)
            mean = known.mean(1) if lengths is None else known.sum(1) / lengths[:, None]
            if self.kind == "mean":
                return mean
            known = logits if real is None else logits.masked_fill(~real[..., None], -torch.inf)
            return (mean + known.amax(1)) / 2
        exponents = self.attention(y)
        if real is not None:
            exponents = exponents.masked_fill(~real[..., None], -torch.inf)
        return (exponents.softmax(1) * logits).sum(1)

    def advance(self, logits: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Go on pooling: the clip logits (b, c) of all frames so far, and the state."""
        if self.kind == "last":
            total = logits[:, -1].double()
            state = {**state, "weight": torch.ones_like(total), "total": total}
        else:
            exponents = self.attention(y).double() if self.kind == "attention" else torch.zeros_like(logits).double()
            peak = torch.maximum(state["peak"], exponents.amax(1))
            weights = (exponents - peak[:, None]).exp()  # (b, t, c)
            kept = (state["peak"] - peak).exp()
            state = {
                **state,
                "peak": peak,
                "weight": state["weight"] * kept + weights.sum(1),
                "total": state["total"] * kept + (weights * logits).sum(1),
            }
        clip = state["total"] / state["weight"]
        if self.kind == "mean_max":
            state = {**state, "highest": torch.maximum(state["highest"], logits.amax(1))}
            clip = (clip + state["highest"]) / 2
        return clip.to(logits.dtype), state
