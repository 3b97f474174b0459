"""The shared backbone: pre-norm residual blocks of any pattern of mixers. Tensors in, tensors out: it knows no task."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Required, Self, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqssm.directions import NO_STATE, Bidirectional, ReverseComplement
from seqssm.errors import UserError
from seqssm.kernels.dispatch import BACKENDS
from seqssm.mixers import Mamba, Mixer, State, mamba_stack
from seqssm.mixers.base import Normed, RMSNorm


class MixerSpec(TypedDict, total=False):
    """A mixer by class path: a short name means ``seqssm.mixers.NAME``. ``init_args`` are its own arguments."""

    class_path: Required[str]
    init_args: dict[str, Any]


@dataclass(frozen=True)
class BackboneConfig:
    """What a backbone is made of, as plain data: the same in YAML, JSON and Python.

    Args:
        d_model: model width d.
        n_layers: number of mixer blocks.
        mixers: a mixer for each letter of the pattern.
        pattern: letters, repeated to ``n_layers``: "m", "mmmmmmma" (one attention layer in eight), "a".
        mlp_ratio: width of a gated MLP after each mixer, as a multiple of d; 0 for none.
        bidirectional: read both ways with shared projections ("tied"), with two mixers ("untied"), or forward only.
            Attention looks both ways by itself.
        reverse_complement: treat the input, (b, l, 2d), as two strands with the same weights: equivariant, exactly.
        dropout: of each block's output.
        norm_eps: epsilon of the RMS norms.
        residual_in_fp32: keep the residual stream in float32 when the model is cast to 16 bit.
        checkpoint_activations: recompute each block in the backward pass: less memory, the same results. With
            ``tight`` less still where all blocks are Mamba's on a GPU, and results that are the same but for float32's
            rounding (:mod:`seqssm.mixers.mamba_stack`); elsewhere as with ``true``.
        backend: the kernels' backend.
    """

    d_model: int = 128
    n_layers: int = 4
    mixers: dict[str, MixerSpec] = field(default_factory=lambda: {"m": MixerSpec(class_path="Mamba")})
    pattern: str = "m"
    mlp_ratio: float = 0.0
    bidirectional: Literal["none", "tied", "untied"] = "none"
    reverse_complement: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    checkpoint_activations: bool | Literal["tight"] = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.d_model < 1 or self.n_layers < 1:
            raise UserError(f"backbone: d_model and n_layers must be positive, got {self.d_model} and {self.n_layers}")
        if self.mlp_ratio < 0 or not 0 <= self.dropout < 1 or not self.norm_eps > 0:
            raise UserError(
                "backbone: mlp_ratio must not be negative, dropout lie between 0 and 1, and norm_eps be positive; got "
                f"{self.mlp_ratio}, {self.dropout} and {self.norm_eps}"
            )
        if self.backend not in ("auto", *BACKENDS):
            raise UserError(f"backbone.backend must be auto or one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if not self.pattern or not set(self.pattern) <= set(self.mixers):
            known = ", ".join(self.mixers) or "none"
            raise UserError(f"backbone.pattern {self.pattern!r} must be letters of backbone.mixers (there: {known})")
        if self.bidirectional not in ("none", "tied", "untied"):
            raise UserError(f"backbone.bidirectional must be none, tied or untied, got {self.bidirectional!r}")
        if self.checkpoint_activations not in (False, True, "tight"):
            raise UserError(
                f"backbone.checkpoint_activations must be false, true or tight, got {self.checkpoint_activations!r}"
            )
        for letter, spec in self.mixers.items():
            if not isinstance(spec, Mapping) or "class_path" not in spec or set(spec) - {"class_path", "init_args"}:
                raise UserError(f"backbone.mixers.{letter} must have class_path and, if any, init_args; got {spec!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; :meth:`from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, trusted: bool = False) -> Self:
        """Read what :meth:`to_dict` gave.

        Args:
            config: the settings; those left out take their defaults.
            trusted: also take mixer classes from outside this package, whose code would run.

        Raises:
            UserError: a key is unknown, a value does not fit, or a class is not to be trusted.
        """
        unknown = set(config) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise UserError(f"backbone: unknown key {', '.join(sorted(unknown))}; was it written by another version?")
        result = cls(**config)
        for letter, spec in result.mixers.items():
            path = spec["class_path"]
            if "." in path and not path.startswith("seqssm.") and not trusted:
                raise UserError(
                    f"backbone.mixers.{letter}: class {path} is not one of seqssm's; "
                    "load it in Python with trusted=True if you trust its code"
                )
        return result


class GatedMLP(nn.Module):
    """SwiGLU: out(silu(gate) · value) (Shazeer, 2020)."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * value)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP."""

    def __init__(self, mixer: Mixer, config: BackboneConfig) -> None:
        super().__init__()
        d = config.d_model
        self.strands = 2 if config.reverse_complement else 1
        self.recompute = bool(config.checkpoint_activations)
        self.norm = RMSNorm(d, config.norm_eps, config.backend)
        self.mixer = mixer
        self.dropout = nn.Dropout(config.dropout)
        self.mlp: GatedMLP | None = None
        if config.mlp_ratio > 0:
            self.mlp_norm = RMSNorm(d, config.norm_eps, config.backend)
            self.mlp = GatedMLP(d, round(config.mlp_ratio * d))

    def forward(
        self, x: Tensor, added: Tensor | None, state: State | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor | None, State]:
        """Run the block on the residual stream x + ``added``.

        The sum is left to the norm that reads it: what comes back is again the stream and what is to be added to it, if
        anything is.
        """
        recompute = self.recompute and torch.is_grad_enabled()
        if recompute and self.mlp is None and self.mixer.recomputes(x):
            x, y = self.norm(x, added, dtype=_product_dtype(x))
            source = Normed(x.detach(), self.norm.weight.detach(), self.norm.eps, self.norm.backend)
            y, state = self.mixer.forward_recomputed(y, source, state, seq_idx=seq_idx)
            return x, self.dropout(y), state
        if recompute:
            x = x if added is None else (x + added).to(x.dtype)
            return checkpoint(
                self._run, x, None, state, seq_idx,
                use_reentrant=False, preserve_rng_state=self.dropout.p > 0,
            )  # fmt: skip
        return self._run(x, added, state, seq_idx)

    def _run(
        self, x: Tensor, added: Tensor | None, state: State | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor | None, State]:
        dtype = _product_dtype(x)
        y: Tensor | None
        inference = not self.training and not torch.is_grad_enabled()
        if state is not None and inference and self.mixer.chunks(x):
            x = x if added is None else (x + added).to(x.dtype)
            (x, state), y = self.mixer.residual_chunk(x, self.norm, state, seq_idx), None
        else:
            x, y = self.norm(x, added, strands=self.strands, dtype=dtype)
            y, state = self.mixer(y, state, seq_idx=seq_idx)
            y = self.dropout(y)
        if self.mlp is not None:
            x, y = self.mlp_norm(x, y, strands=self.strands, dtype=dtype)
            y = self.dropout(per_strand(self.mlp, y, self.strands))
        return x, y, state

    def feed_forward(self, x: Tensor) -> Tensor:
        """What follows the mixer, on the residual stream that has its output: x + mlp(norm(x)), or x without an MLP."""
        if self.mlp is None:
            return x
        x, y = self.mlp_norm(x, strands=self.strands)
        return x + self.dropout(per_strand(self.mlp, y, self.strands))

    def step(self, x: Tensor, state: State) -> Tensor:
        x = self.mixer.residual_step(x, self.norm, state)
        return self.feed_forward(x)


def _product_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast a product's operand to on a GPU: the norm may as well leave in it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if x.is_cuda and torch.is_autocast_enabled(device) else None


def per_strand(module: nn.Module, x: Tensor, strands: int) -> Tensor:
    """Apply a module of width d to x (..., strands·d)."""
    return module(x) if strands == 1 else module(x.unflatten(-1, (strands, -1))).flatten(-2)


class Backbone(nn.Module):
    """Blocks of mixers with a final norm: (b, l, d) -> (b, l, d), or (b, l, 2d) -> (b, l, 2d) with two strands.

    A causal backbone carries a state: fed chunk by chunk, for any chunking, it gives the output of one pass. Its state
    is flat, with keys such as ``layers.3.scan``.

    Attributes:
        config: its :class:`BackboneConfig`.
        causal: whether it can carry a state.
        d_out: width of its input and output: d, or 2d with two strands.

    Raises:
        UserError: a mixer's class or arguments do not exist.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        letters = [config.pattern[i % len(config.pattern)] for i in range(config.n_layers)]
        self.layers = nn.ModuleList(Block(_make_layer(letter, config), config) for letter in letters)
        self.norm = RMSNorm(config.d_model, config.norm_eps, config.backend)
        residuals = config.n_layers * (2 if config.mlp_ratio > 0 else 1)
        with torch.no_grad():
            # Each block adds to the residual stream: as in GPT-2, its growth with depth is taken back at the start.
            for name, parameter in self.named_parameters():
                if name.endswith("out_proj.weight"):
                    parameter.div_(math.sqrt(residuals))

    @property
    def causal(self) -> bool:
        return all(block.mixer.causal for block in self.blocks)

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    @property
    def d_out(self) -> int:
        return self.config.d_model * (2 if self.config.reverse_complement else 1)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token, as in :meth:`Mixer.init_state`.

        Raises:
            UserError: the backbone is not causal.
        """
        if not self.causal:
            raise UserError(NO_STATE)
        return {
            f"layers.{i}.{key}": value
            for i, block in enumerate(self.blocks)
            for key, value in block.mixer.init_state(batch, device, dtype).items()
        }

    def rows_are_apart(self, x: Tensor) -> bool:
        """Whether a row of the chunk x, run with a state and without gradients, gives the same bits in any batch."""
        return all(block.mixer.chunks(x) and block.mlp is None for block in self.blocks)

    def forward(self, x: Tensor, state: State | None = None, *, seq_idx: Tensor | None = None) -> tuple[Tensor, State]:
        """Run a chunk, or a whole sequence.

        Args:
            x: (b, l, d), or (b, l, 2d) with two strands.
            state: what the previous chunk returned; None at the start.
            seq_idx: (b, l) integers; nothing flows across a change of the index. Give padding its own.

        Returns:
            y, of x's shape, and the state (empty for a backbone that is not causal).

        Raises:
            UserError: a state is given to a backbone that is not causal.
        """
        if state and not self.causal:
            raise UserError(NO_STATE)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        added: Tensor | None = None  # what the block before yields, still to be added to x
        past = [_layer_state(state, i, block.mixer) if state else None for i, block in enumerate(self.blocks)]
        states: list[State] = []
        if self.config.checkpoint_activations == "tight" and torch.is_grad_enabled() and self._is_stack(x):
            layers = [mamba_stack.Layer(block.norm, cast(Mamba, block.mixer)) for block in self.blocks]
            x, states = mamba_stack.run(layers, x, past, seq_idx)
        else:
            for block, entering in zip(self.blocks, past, strict=True):
                x, added, leaving = block(x, added, entering, seq_idx)
                states.append(leaving)
        new_state = {f"layers.{i}.{key}": value for i, own in enumerate(states) for key, value in own.items()}
        return self.norm(x, added, strands=self.d_out // self.config.d_model)[1], new_state

    def _is_stack(self, x: Tensor) -> bool:
        """Whether nothing but Mamba layers and their norms stands between input and output."""
        return all(
            type(block) is Block  # and not what shards one
            and block.mlp is None
            and block.strands == 1
            and (block.dropout.p == 0 or not block.training)
            and mamba_stack.available(block, x)
            for block in self.blocks
        )

    def step(self, x: Tensor, state: State) -> Tensor:
        """One token, x (b, d) -> y (b, d), updating ``state`` in place: the fastest decoding, without gradients."""
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        for i, block in enumerate(self.blocks):
            past = _layer_state(state, i, block.mixer)
            x = block.step(x, past)
            for key, value in past.items():
                state[f"layers.{i}.{key}"] = value
        return self.norm(x)[1]


def _layer_state(state: State, layer: int, mixer: Mixer) -> State:
    try:
        return {key: state[f"layers.{layer}.{key}"] for key in mixer.state_keys}
    except KeyError as error:
        raise ValueError(f"the state has no {error.args[0]}: it belongs to another model") from None


def _make_layer(letter: str, config: BackboneConfig) -> Mixer:
    def make() -> Mixer:
        mixer = make_mixer(config.mixers[letter], config.d_model, f"backbone.mixers.{letter}")
        mixer.backend = config.backend
        return mixer

    mixer = make()
    if config.bidirectional != "none":
        if mixer.recurrent:
            mixer = Bidirectional(mixer, make(), tied=config.bidirectional == "tied")
        else:
            mixer.causal = False
    return ReverseComplement(mixer) if config.reverse_complement else mixer


def make_mixer(spec: MixerSpec, d_model: int, name: str = "mixer") -> Mixer:
    """Build a mixer from its spec.

    Raises:
        UserError: there is no such class, or it takes other arguments; ``name`` says where the spec stands.
    """
    path = spec["class_path"]
    module, _, attribute = (path if "." in path else f"seqssm.mixers.{path}").rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name}: there is no class {path} ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, Mixer)):
        raise UserError(f"{name}: {path} is not a seqssm.mixers.Mixer")
    try:
        return cls(d_model, **spec.get("init_args", {}))
    except TypeError as error:
        raise UserError(f"{name}: {path} does not take these init_args ({error})") from error


class LanguageModel(nn.Module):
    """Embedding, causal backbone and a head over the vocabulary.

    Args:
        vocab_size: number of tokens.
        config: the backbone; forward only, one strand.
        tie: use the embedding as the head.
    """

    def __init__(self, vocab_size: int, config: BackboneConfig, tie: bool = True) -> None:
        super().__init__()
        self.vocab_size, self.tie = vocab_size, tie
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.backbone = Backbone(config)
        if not self.backbone.causal:
            raise UserError("a language model predicts from the past: bidirectional: none, reverse_complement: false")
        self.head = None if tie else nn.Linear(config.d_model, vocab_size, bias=False)

    def init_args(self) -> dict[str, Any]:
        """The arguments that build this model again, as plain data."""
        return {"vocab_size": self.vocab_size, "config": self.backbone.config.to_dict(), "tie": self.tie}

    @classmethod
    def from_init_args(cls, init_args: Mapping[str, Any]) -> Self:
        """Build a model, with fresh weights, from what :meth:`init_args` gave."""
        return cls(**{**init_args, "config": BackboneConfig.from_dict(init_args["config"])})

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token."""
        return self.backbone.init_state(batch, device, dtype)

    def forward(
        self, tokens: Tensor, state: State | None = None, *, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """tokens (b, l) integers -> logits (b, l, vocab_size) and the state."""
        y, state = self.backbone(self.embedding(tokens), state, seq_idx=seq_idx)
        return self.logits(y), state

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """tokens (b,) -> logits (b, vocab_size), updating ``state`` in place. No gradients."""
        return self.logits(self.backbone.step(self.embedding(tokens), state))

    def logits(self, y: Tensor) -> Tensor:
        """y (..., d) of the backbone -> logits (..., vocab_size)."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(y.to(weight.dtype), weight)
