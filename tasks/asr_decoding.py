"""How a recogniser's output becomes tokens: the choice of decoder, and what helps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from seqssm.errors import UserError
from seqssm.tasks.asr_network import ASRNetwork
from seqssm.tasks.decoding.ctc import BeamConfig, BeamCTC, GreedyCTC
from seqssm.tasks.decoding.emissions import Decoder, Scorer
from seqssm.tasks.decoding.hotwords import Hotwords
from seqssm.tasks.decoding.ngram import NGram, NGramScorer
from seqssm.tasks.decoding.rnnt import BeamRNNT, GreedyRNNT, RNNTBeamConfig, Transducer

Method = Literal["greedy", "beam", "rnnt", "rnnt-beam"]
METHODS: tuple[Method, ...] = ("greedy", "beam", "rnnt", "rnnt-beam")


@dataclass(frozen=True)
class DecodingConfig:
    """The search for the text.

    Args:
        method: ``greedy`` and ``beam`` (prefix beam search) of the CTC head, ``rnnt`` (greedy) and ``rnnt-beam`` of the
            transducer.
        size: hypotheses of a beam.
        hotwords: words and phrases to prefer, in a beam; written as in the transcripts or not.
        hotword_boost: nats a character of them.
        ngram: an ARPA file whose log-probabilities are added in a beam.
        ngram_unit: whether its words are words or tokens.
        ngram_weight: of its log-probabilities.
        ngram_bonus: nats a word.
    """

    method: Method = "greedy"
    size: int = 16
    hotwords: list[str] = field(default_factory=list)
    hotword_boost: float = 1.0
    ngram: str | None = None
    ngram_unit: Literal["word", "token"] = "word"
    ngram_weight: float = 0.5
    ngram_bonus: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown decoding {self.method!r}: choose among {', '.join(METHODS)}")
        if self.size < 1:
            raise UserError(f"a beam of {self.size}: it needs a hypothesis at least")
        if (self.hotwords or self.ngram) and not self.method.endswith("beam"):
            raise UserError(
                f"hotwords and n-gram models help a beam search: decode with beam or rnnt-beam, not {self.method}"
            )

    def describe(self) -> str:
        """In words, for a report."""
        beam = f" of {self.size}" if self.method.endswith("beam") else ""
        helped = [f"{len(self.hotwords)} hotwords"] if self.hotwords else []
        helped += (
            [f"{Path(self.ngram).name} (weight {self.ngram_weight:g}, bonus {self.ngram_bonus:g})"]
            if self.ngram
            else []
        )
        return f"{self.method}{beam}" + (f" with {' and '.join(helped)}" if helped else "")


def decoders(task: ASRNetwork, config: DecodingConfig) -> Callable[[], Decoder]:
    """What makes a decoder for each stream; tables of words and n-grams are read once.

    Raises:
        UserError: the model has no transducer, a file is not readable, or a phrase cannot be spelled.
    """
    tokens = task.tokenizer.tokens
    scorers: list[Scorer] = []
    if config.hotwords:
        phrases = [task.text.normalise(phrase) for phrase in config.hotwords]
        scorers.append(Hotwords(phrases, tokens, config.hotword_boost))
    if config.ngram:
        model = NGram.read(config.ngram)
        scorers.append(NGramScorer(model, tokens, config.ngram_unit, config.ngram_weight, config.ngram_bonus))
    if config.method == "greedy":
        return GreedyCTC
    if config.method == "beam":
        return lambda: BeamCTC(BeamConfig(size=config.size), scorers)
    if task.predictor is None or task.joiner is None:
        raise UserError("this model has no transducer: decode with greedy or beam, or train with model.rnnt_weight")
    transducer = Transducer(task.predictor, task.joiner, task.predictor.context)
    if config.method == "rnnt":
        return lambda: GreedyRNNT(transducer)
    return lambda: BeamRNNT(transducer, RNNTBeamConfig(size=config.size), scorers)
