"""The parts of a speech recogniser around its backbones: subsampling, the one lookahead convolution, the transducer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqssm.errors import UserError
from seqssm.mixers import State

SUBSAMPLING = 4
"""Frames a token."""


class Subsampling(nn.Module):
    """Four frames to one token: two causal convolutions of stride 2 in time and bands, and a projection.

    Token j is ready when frame 4 j + 3 is, and sees the frames from 4 j - 3 on.

    Args:
        n_mels: bands of a frame.
        d_model: width of a token.
        channels: of both convolutions.
    """

    def __init__(self, n_mels: int, d_model: int, channels: int) -> None:
        super().__init__()
        self.n_mels, self.channels = n_mels, channels
        self.first = nn.Conv2d(1, channels, 3, 2, padding=(0, 1))
        self.second = nn.Conv2d(channels, channels, 3, 2, padding=(0, 1))
        self.projection = nn.Linear(channels * -(-n_mels // 4), d_model)
        self.norm = nn.LayerNorm(d_model)

    @staticmethod
    def tokens(frames: Tensor) -> Tensor:
        """Tokens that so many frames make."""
        return -(-frames // SUBSAMPLING)

    def init_state(self, batch: int) -> State:
        """The frames before the first: zeros, as in the padding."""
        weight = self.projection.weight
        return {
            "first": weight.new_zeros(batch, 1, 1, self.n_mels),
            "second": weight.new_zeros(batch, self.channels, 1, -(-self.n_mels // 2)),
        }

    def forward(self, features: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Make tokens (b, ceil(l / 4), d) of features (b, l, mel), zero where padded; the last chunk may be ragged."""
        if state is None:
            # The first convolution makes of silence something that is not zero; what precedes the first frame is zero.
            state = self.init_state(len(features))
        x = F.pad(features, (0, 0, 0, -features.shape[1] % SUBSAMPLING)).unsqueeze(1)  # (b, 1, l, mel)
        new_state: State = {}
        for name, convolution in (("first", self.first), ("second", self.second)):
            x = torch.cat([state[name].to(x.dtype), x], dim=2)
            new_state[name] = x[:, :, -1:].clone()
            x = F.silu(convolution(x))
        return self.norm(self.projection(x.transpose(1, 2).flatten(2))), new_state


class Lookahead(nn.Module):
    """The one place where a token sees its future: x_t + out(silu(sum_k w_k · gate(x_{t+k}))), k up to the lookahead.

    Each lookahead of the menu has taps w of its own, everything else is shared: one checkpoint serves them all.

    Args:
        d_model: width.
        menu: lookaheads in tokens to choose from.
    """

    def __init__(self, d_model: int, menu: Sequence[int]) -> None:
        super().__init__()
        if not menu or min(menu) < 0 or len(set(menu)) != len(menu):
            raise UserError(f"model.lookahead_ms must be different times, zero or more; they make {list(menu)} tokens")
        self.menu, self.longest = list(menu), max(menu)
        self.norm = nn.LayerNorm(d_model)
        self.in_proj = nn.Linear(d_model, 2 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        reach = torch.arange(self.longest + 1) <= torch.tensor(self.menu)[:, None]  # (m, k)
        self.register_buffer("reach", reach[..., None].float(), persistent=False)
        self.register_buffer("delays", torch.tensor(self.menu), persistent=False)
        taps = torch.randn(len(menu), self.longest + 1, d_model) / (1 + torch.tensor(self.menu)).sqrt()[:, None, None]
        self.taps = nn.Parameter(taps)

    reach: Tensor
    delays: Tensor

    def init_state(self, batch: int) -> State:
        """Tokens before the first."""
        past = self.taps.new_zeros(batch, self.longest, self.taps.shape[-1])
        return {"gated": past, "tokens": past.clone()}

    def _gate(self, x: Tensor, real: Tensor | None) -> Tensor:
        gated = F.glu(self.in_proj(self.norm(x)), dim=-1)
        return gated if real is None else gated.masked_fill(~real[..., None], 0)

    def _mix(self, x: Tensor, windows: Tensor, choice: Tensor) -> Tensor:
        """x (b, t, d), gated tokens from each on (b, t, k, d), position in the menu (b,)."""
        taps = (self.taps * self.reach)[choice]  # (b, k, d)
        return x + self.out_proj(F.silu((windows * taps[:, None]).sum(2)))

    def forward(self, x: Tensor, choice: Tensor, real: Tensor | None) -> Tensor:
        """Whole sequences x (b, t, d) with the lookahead ``menu[choice]``, choice (b,); real (b, t), None for all."""
        gated = F.pad(self._gate(x, real), (0, 0, 0, self.longest))
        return self._mix(x, gated.unfold(1, self.longest + 1, 1).transpose(2, 3), choice)

    def advance(self, x: Tensor, choice: Tensor, real: Tensor, state: State) -> tuple[Tensor, State]:
        """The next tokens of streams: (b, t, d) in, and out those that are ``menu[choice]`` tokens older."""
        length, device = x.shape[1], x.device
        gated = torch.cat([state["gated"], self._gate(x, real)], dim=1)  # (b, longest + t, d)
        tokens = torch.cat([state["tokens"], x], dim=1)
        first = (self.longest - self.delays[choice])[:, None] + torch.arange(length, device=device)  # (b, t)
        # Windows that end before the last taps are filled up with any token: those taps are zero.
        index = (first[..., None] + torch.arange(self.longest + 1, device=device)).clamp(max=self.longest + length - 1)
        rows = torch.arange(len(x), device=device)
        y = self._mix(tokens[rows[:, None], first], gated[rows[:, None, None], index], choice)
        return y, {"gated": gated[:, length:].clone(), "tokens": tokens[:, length:].clone()}


class Predictor(nn.Module):
    """Stateless transducer predictor: an embedding of the last tokens, convolved (Ghodsi et al., 2020).

    Args:
        vocabulary: tokens with the blank, which also stands for what precedes the first one.
        d_model: width.
        context: how many tokens back it sees.
    """

    def __init__(self, vocabulary: int, d_model: int, context: int = 2) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.mix = nn.Linear(context * d_model, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """The last tokens (..., context), oldest first -> (..., d)."""
        return F.relu(self.mix(self.embedding(tokens).flatten(-2)))

    def history(self, tokens: Tensor) -> Tensor:
        """Transcripts (b, u) -> what precedes each position and the end, (b, u + 1, context)."""
        return F.pad(tokens, (self.context, 0)).unfold(1, self.context, 1)


class Joiner(nn.Module):
    """Encoder (..., d) and predictor (..., d) to logits (..., v): head(tanh(a(x) + b(p)))."""

    def __init__(self, d_model: int, vocabulary: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(d_model, d_model)
        self.predictor = nn.Linear(d_model, d_model, bias=False)
        self.head = nn.Linear(d_model, vocabulary)

    def forward(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(encoded) + self.predictor(predicted)))


def ctc_loss(log_probs: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    """Mean over the batch of the CTC loss a token; transcripts longer than what the frames can spell count zero.

    Args:
        log_probs: (b, t, v), blank 0.
        lengths: (b,) real positions.
        tokens: (b, u) padded.
        token_lengths: (b,).
    """
    losses = F.ctc_loss(
        log_probs.float().transpose(0, 1), tokens, lengths, token_lengths, reduction="none", zero_infinity=True
    )
    return (losses / token_lengths.clamp_min(1)).mean()


def spellable(lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    """(b,) whether CTC can emit a transcript: a position for each token and a blank between equal neighbours."""
    same = (tokens[:, 1:] == tokens[:, :-1]) & (
        torch.arange(1, tokens.shape[1], device=tokens.device) < token_lengths[:, None]
    )
    return token_lengths + same.sum(1) <= lengths


def transducer_loss(logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    """Mean over the batch of the RNN-T loss a token, in float32; logits (b, t, u + 1, v), blank 0."""
    from torchaudio.functional import rnnt_loss

    with torch.autocast(device_type=logits.device.type, enabled=False):
        losses = rnnt_loss(
            logits.float().contiguous(),
            tokens.int().contiguous(),
            lengths.int(),
            token_lengths.int(),
            blank=0,
            reduction="none",
        )
    return (losses / token_lengths.clamp_min(1)).mean()
