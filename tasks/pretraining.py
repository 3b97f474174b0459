"""Pretraining on DNA without labels: the next base, or bases that were hidden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.data.dna.alphabet import MASK, N, decode, encode
from seqssm.data.dna.sampling import UnlabelledBatch
from seqssm.errors import UserError
from seqssm.longcontext.chunked import check_chunkable, next_token_loss
from seqssm.tasks.base import OptimizerConfig, Task
from seqssm.tasks.dna_layers import SequenceEmbedding

BASES = 4
MASKED_SHARE, HIDDEN_SHARE, REPLACED_SHARE = 0.15, 0.8, 0.1  # BERT's (Devlin et al., 2019, section 3.1)
PROMPT_CHUNK = 1 << 16

Objective = Literal["next_token", "masked"]


class Prediction(NamedTuple):
    """What was predicted, a base each: logits (n, 4), the true one (n,), and whether it is in lower case (n,).

    ``where`` (b, l) bool says which bases of the batch these are, row by row.
    """

    logits: Tensor
    target: Tensor
    lower: Tensor
    where: Tensor


class Perplexity(Metric):
    """exp of the mean negative log-likelihood of a base (in nats), over all that were predicted since the reset."""

    full_state_update = False
    nll: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor) -> None:
        """Take negative log-likelihoods (n,)."""
        self.nll += nll.double().sum()
        self.count += nll.numel()

    def compute(self) -> Tensor:
        return (self.nll / self.count).exp().float()


class DNAPretraining(Task):
    """Learn DNA by predicting it.

    N is never a target, nor ever drawn as a replacement. A :class:`~seqssm.tasks.dna.DNAClassification` with the same
    ``backbone``, ``kmer`` and ``motif`` starts from a checkpoint of this task through its ``init_from``.

    Args:
        objective: ``next_token`` (for causal backbones), or ``masked``: of 15% of the bases, drawn anew each step, 80%
            are hidden, 10% replaced by a base at random, and 10% left as they are; all 15% are predicted (Devlin et
            al., 2019).
        backbone: the model; with ``reverse_complement: true`` the prediction for one strand is, exactly, the complement
            of that for the other.
        kmer, motif: of the embedding, as for :class:`~seqssm.tasks.dna.DNAClassification`.
        lower_weight: weight in the loss of bases in lower case, repeats in a soft-masked genome; 1 treats all alike.
        chunk_length: for ``next_token``: run longer windows in chunks of so many bases, with the gradients of one pass
            in the memory of one chunk (:mod:`seqssm.longcontext.chunked`); 0 for one pass.
        optimizer: learning rate and its schedule.
        init_from: a checkpoint whose backbone and embedding to start from.

    Raises:
        UserError: ``next_token`` with a backbone that sees what follows, or chunks with one that cannot take them.
    """

    def __init__(
        self,
        objective: Objective = "next_token",
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 - frozen
        kmer: int = 1,
        motif: int = 0,
        lower_weight: float = 1.0,
        chunk_length: int = 0,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            backbone,
            optimizer,
            init_from,
            objective=objective,
            kmer=kmer,
            motif=motif,
            lower_weight=lower_weight,
            chunk_length=chunk_length,
        )
        if objective not in ("next_token", "masked"):
            raise UserError(f"model.objective is {objective!r}: it must be next_token or masked")
        if lower_weight < 0:
            raise UserError(f"model.lower_weight is {lower_weight}: it must not be negative")
        config = self.backbone_config
        self.objective, self.lower_weight, self.chunk_length = objective, lower_weight, chunk_length
        self.backbone = Backbone(config)
        if objective == "next_token" and not self.backbone.causal:
            raise UserError(
                "model.objective next_token needs a backbone that sees only the past (bidirectional: none, "
                "reverse_complement: false): this one would see the answer; use objective: masked"
            )
        if chunk_length:
            if objective != "next_token":
                raise UserError(
                    "model.chunk_length is for objective next_token: a masked base looks both ways; set it to 0"
                )
            check_chunkable(self.backbone, chunk_length, "model.chunk_length")
        self.embedding = SequenceEmbedding(config.d_model, kmer, motif, causal=self.backbone.causal)
        self.base_head = nn.Linear(config.d_model, BASES)
        names = [f"{split}_{name}" for split in ("val", "test") for name in ("perplexity", "perplexity_upper")]
        self.perplexities = nn.ModuleDict({name: Perplexity() for name in names})
        self.load_initial_weights()

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits of the four bases, float32.

        Args:
            tokens: (b, l) uint8 token ids, padded on the right; hidden ones are MASK.
            lengths: (b,) real tokens of each sequence.

        Returns:
            (b, l, 4): at each position for the base after it (``next_token``), or for its own (``masked``). Padding and
            neighbours in the batch do not change them.
        """
        if self._in_chunks(tokens) and not torch.is_grad_enabled():
            return self._run_chunks(tokens, lengths)
        x = self.embedding(tokens, lengths)
        if self.backbone_config.reverse_complement:
            x = torch.cat([x, self.embedding(tokens, lengths, other_strand=True)], dim=-1)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (b, l)
        # Padding precedes the real tokens of a backward scan: its own segment keeps it out of their state.
        seq_idx = None if self.backbone.causal or bool(real.all()) else (~real).to(torch.int32)
        y, _ = self.backbone(x, seq_idx=seq_idx)
        return self._logits(y)

    def _in_chunks(self, tokens: Tensor) -> bool:
        return 0 < self.chunk_length < tokens.shape[1]

    def _run_chunks(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        logits, state = [], None
        for start in range(0, tokens.shape[1], self.chunk_length):
            stop = min(start + self.chunk_length, tokens.shape[1])
            y, state = self.backbone(self.embedding.chunk(tokens, lengths, start, stop), state)
            logits.append(self._logits(y))
        return torch.cat(logits, dim=1)

    def _logits(self, y: Tensor) -> Tensor:
        with torch.autocast(device_type=y.device.type, enabled=False):
            y = y.to(self.base_head.weight.dtype)
            if not self.backbone_config.reverse_complement:
                return self.base_head(y)
            first, second = y.chunk(2, dim=-1)
            # Base x of one strand is 3 - x of the other.
            return (self.base_head(first) + self.base_head(second).flip(-1)) / 2

    def predict(self, batch: UnlabelledBatch, generator: torch.Generator | None = None) -> Prediction:
        """Predict the targets of a batch; ``generator`` draws which (``masked``), torch's own if None."""
        tokens, lengths, lower = batch
        if self.objective == "next_token":
            where = tokens < N  # padding is no base either
            where[:, 0] = False  # nothing comes before the first
            logits = self(tokens, lengths)[:, :-1][where[:, 1:]]
        else:
            visible, where = hide(tokens, generator)
            logits = self(visible, lengths)[where]
        return Prediction(logits, tokens[where].long(), lower[where], where)

    def probe(self, seed: int = 0) -> Tensor:
        tokens = torch.randint(BASES, (4, 1000), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            return self(tokens, torch.full((4,), 1000)).softmax(-1)

    def training_step(self, batch: UnlabelledBatch, batch_idx: int) -> Tensor:
        loss = self._chunked_loss(batch) if self._in_chunks(batch.tokens) else self._loss(self.predict(batch))
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.tokens))
        return loss

    def _loss(self, prediction: Prediction) -> Tensor:
        nll = F.cross_entropy(prediction.logits, prediction.target, reduction="none")
        weight = torch.where(prediction.lower, self.lower_weight, 1.0)
        # A batch may hold nothing to predict (Ns alone, or repeats of weight 0): it then teaches nothing.
        return (nll * weight).sum() / weight.sum().clamp_min(1e-9)

    def _chunked_loss(self, batch: UnlabelledBatch) -> Tensor:
        tokens, lengths, lower = batch
        weights = (tokens < N) * torch.where(lower, self.lower_weight, 1.0)
        loss, _ = next_token_loss(
            self.backbone,
            lambda start, stop: self.embedding.chunk(tokens, lengths, start, stop),
            self._logits,
            tokens.clamp(max=BASES - 1),  # what is no base weighs nothing
            chunk_length=self.chunk_length,
            modules=[self],
            weights=weights,
        )
        return loss

    def validation_step(self, batch: UnlabelledBatch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: UnlabelledBatch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: UnlabelledBatch, batch_idx: int, split: str) -> None:
        # The same bases are hidden in every epoch, so that epochs can be compared.
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        prediction = self.predict(batch, generator)
        nll = F.cross_entropy(prediction.logits, prediction.target, reduction="none")
        everything, upper = self.perplexities[f"{split}_perplexity"], self.perplexities[f"{split}_perplexity_upper"]
        everything.update(nll)  # type: ignore[operator]
        upper.update(nll[~prediction.lower])  # type: ignore[operator]
        options = {"on_step": False, "on_epoch": True, "batch_size": len(batch.tokens)}
        self.log(f"{split}_perplexity", everything, prog_bar=True, **options)  # type: ignore[arg-type]
        self.log(f"{split}_perplexity_upper", upper, **options)  # type: ignore[arg-type]


def hide(tokens: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Hide bases for the masked objective.

    Args:
        tokens: (b, l) uint8 token ids.
        generator: on their device; torch's own if None.

    Returns:
        The tokens (b, l) with 80% of the chosen hidden and 10% replaced by a base drawn evenly from the four, and which
        were chosen (b, l) bool: 15% of the bases, never an N or padding.
    """
    draw = torch.rand(tokens.shape, device=tokens.device, generator=generator)
    chosen = (draw < MASKED_SHARE) & (tokens < N)
    fate = torch.rand(tokens.shape, device=tokens.device, generator=generator)
    random = torch.randint(0, BASES, tokens.shape, device=tokens.device, generator=generator, dtype=tokens.dtype)
    visible = tokens.masked_fill(chosen & (fate < HIDDEN_SHARE), MASK)
    replaced = chosen & (fate >= HIDDEN_SHARE) & (fate < HIDDEN_SHARE + REPLACED_SHARE)
    return torch.where(replaced, random, visible), chosen


# ---- generation ----------------------------------------------------------------------------------------------------


def generate(
    model: DNAPretraining,
    prompt: str,
    n: int,
    temperature: float = 1.0,
    seed: int = 0,
    samples: int = 1,
) -> list[str]:
    """Continue a sequence base by base, in memory that does not grow with it.

    Args:
        model: trained with ``next_token``.
        prompt: IUPAC letters, at least one.
        n: bases to draw.
        temperature: below 1 the likelier bases are drawn even more often; 0 always takes the likeliest.
        seed: of the draws.
        samples: continuations to draw.

    Returns:
        The continuations, each of n letters, without the prompt.

    Raises:
        UserError: the model was not trained to continue, the prompt is empty or no DNA, or a number is negative.
    """
    return ["".join(part) for part in zip(*generate_stream(model, prompt, n, temperature, seed, samples), strict=True)]


@torch.inference_mode()
def generate_stream(
    model: DNAPretraining, prompt: str, n: int, temperature: float = 1.0, seed: int = 0, samples: int = 1
) -> Iterator[list[str]]:
    """:func:`generate` as it goes: the next letter of every sample, n times."""
    if model.objective != "next_token":
        raise UserError("this model fills gaps and cannot continue a sequence; use one of objective: next_token")
    if not prompt or n < 0 or temperature < 0 or samples < 1:
        raise UserError("give a prompt of a base or more, n and temperature of 0 or more, and one sample or more")
    try:
        tokens = torch.from_numpy(encode(prompt).copy())
    except ValueError as error:
        raise UserError(f"the prompt is not DNA: {error}") from error
    was_training = model.training
    model.eval()
    try:
        yield from _draw(model, tokens, n, temperature, seed, samples)
    finally:
        model.train(was_training)


def _draw(
    model: DNAPretraining, prompt: Tensor, n: int, temperature: float, seed: int, samples: int
) -> Iterator[list[str]]:
    device, embedding = model.base_head.weight.device, model.embedding
    generator = torch.Generator(device).manual_seed(seed)
    reach = embedding.reach[0]  # a position's vector depends on so many bases before it
    state = None
    for start in range(0, len(prompt), PROMPT_CHUNK):
        end = min(start + PROMPT_CHUNK, len(prompt))
        y, state = model.backbone(embedding.span(lambda a, b: prompt[a:b], len(prompt), start, end), state)
    state = {key: value.repeat_interleave(samples, 0) for key, value in (state or {}).items()}
    logits = model._logits(y[:, -1]).expand(samples, -1)  # (s, 4)
    recent = prompt[len(prompt) - min(reach + 1, len(prompt)) :].to(device).expand(samples, -1)
    for i in range(n):
        if temperature == 0:
            drawn = logits.argmax(-1)
        else:
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        yield list(decode(drawn.to(torch.uint8).cpu()))
        if i + 1 == n:
            return
        recent = torch.cat([recent, drawn[:, None].to(torch.uint8)], dim=1)[:, -(reach + 1) :]
        lengths = torch.full((samples,), recent.shape[1], device=device)
        y = model.backbone.step(embedding(recent, lengths)[:, -1], state)
        logits = model._logits(y)
