"""Text to token ids and back. Id 0 is the blank of CTC and RNN-T everywhere and no token; tokens begin at 1."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from seqssm.errors import UserError

BLANK = 0


class Tokenizer(Protocol):
    """What encodes the transcripts of a model and decodes what it says; kept in its checkpoint as plain data."""

    @property
    def size(self) -> int:
        """Number of tokens, the blank not counted: ids run from 1 to `size`."""

    @property
    def tokens(self) -> Sequence[str]:
        """The text of each token, that of id i at i - 1, with a space where a word begins."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a normalised text; raises UserError for characters outside the vocabulary."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; blanks are skipped."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which `tokenizer_from_dict` builds it again."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokens, made from the training texts.

    Args:
        kind: `characters`, the choice below some ten hours; `bpe` are sentencepiece's byte pair encodings (needs the
            package sentencepiece), `unigram` its unigram pieces.
        size: pieces of `bpe` and `unigram`, the blank not counted.
        model: a sentencepiece model file to use as it is.
        stored: a tokenizer's `to_dict()`, such as a checkpoint's, to use as it is.
    """

    kind: Literal["characters", "bpe", "unigram"] = "characters"
    size: int = 500
    model: str | None = None
    stored: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("characters", "bpe", "unigram"):
            raise UserError(f"tokenizer.kind is {self.kind!r}: choose characters, bpe or unigram")
        if self.size < 1:
            raise UserError(f"tokenizer.size is {self.size}: it must be positive")


class CharacterTokenizer:
    """A token a character, the space among them.

    Args:
        characters: each once; id i is the i-th of them, counted from 1.
    """

    def __init__(self, characters: str) -> None:
        if len(set(characters)) != len(characters) or not characters:
            raise UserError(f"the vocabulary {characters!r} is empty or has a character twice")
        self.characters = characters
        self._ids = {character: number for number, character in enumerate(characters, 1)}

    @classmethod
    def of(cls, texts: Iterable[str]) -> CharacterTokenizer:
        """The vocabulary of these texts and the space, in order."""
        return cls("".join(sorted({" "}.union(*texts))))

    @property
    def size(self) -> int:
        return len(self.characters)

    @property
    def tokens(self) -> Sequence[str]:
        return list(self.characters)

    def unknown(self, text: str) -> list[str]:
        """Characters of a text outside the vocabulary, each once, in order."""
        return sorted({character for character in text if character not in self._ids})

    def encode(self, text: str) -> list[int]:
        if unknown := self.unknown(text):
            raise UserError(f"{text!r} has characters outside the vocabulary: {' '.join(map(repr, unknown))}")
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[number - 1] for number in ids if number != BLANK)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "characters", "characters": self.characters}


class SentencePieceTokenizer:
    """Pieces of words by a sentencepiece model; its id i is i + 1 here.

    Args:
        model: the model file's bytes.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        try:
            self._processor = _sentencepiece().SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError("this is not a sentencepiece model: train it, or correct tokenizer.model") from error
        special = (self._processor.is_unknown, self._processor.is_control)
        self._tokens = [
            "" if any(one(number) for one in special) else self._processor.id_to_piece(number).replace("\u2581", " ")
            for number in range(self._processor.get_piece_size())
        ]
        self._characters = set("".join(self._tokens))

    @classmethod
    def train(cls, texts: Sequence[str], size: int, kind: str = "bpe") -> SentencePieceTokenizer:
        """Train on normalised texts; the same texts give the same model.

        Raises UserError when the texts are too few for so many pieces.
        """
        written = io.BytesIO()
        sentencepiece = _sentencepiece()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=written,
                model_type=kind,
                vocab_size=size,
                character_coverage=1.0,
                normalization_rule_name="identity",  # `TextConfig` has done it
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                unk_id=0,
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).rpartition(")] ")[2] or "sentencepiece cannot be trained on them"
            raise UserError(f"tokenizer.size {size} does not fit the training texts: {reason}") from error
        return cls(written.getvalue())

    @property
    def size(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> Sequence[str]:
        return self._tokens

    def unknown(self, text: str) -> list[str]:
        """Characters of a text outside the vocabulary, each once, in order."""
        return sorted({character for character in text if character not in self._characters and character != " "})

    def encode(self, text: str) -> list[int]:
        if unknown := self.unknown(text):
            raise UserError(f"{text!r} has characters outside the vocabulary: {' '.join(map(repr, unknown))}")
        return [number + 1 for number in self._processor.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._tokens[number - 1] for number in ids if number != BLANK).strip()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "sentencepiece", "model": base64.b64encode(self.model).decode()}

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            "pieces of words need the package sentencepiece: pip install 'seqssm[bpe]', or set tokenizer.kind to "
            "characters"
        ) from error
    return sentencepiece


def tokenizer_from_dict(stored: dict[str, Any]) -> CharacterTokenizer | SentencePieceTokenizer:
    """The tokenizer that `to_dict` described; raises UserError for anything else."""
    try:
        if stored["kind"] == "characters":
            return CharacterTokenizer(stored["characters"])
        if stored["kind"] == "sentencepiece":
            return SentencePieceTokenizer(base64.b64decode(stored["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"this is not a stored tokenizer: {stored!r:.80}") from error
    raise UserError(f"unknown kind of stored tokenizer {stored['kind']!r}: characters and sentencepiece are known")


def make_tokenizer(
    config: TokenizerConfig, texts: Sequence[str], characters: str | None
) -> CharacterTokenizer | SentencePieceTokenizer:
    """The tokenizer of a configuration, from normalised training texts or, where given, these characters."""
    if config.stored is not None:
        return tokenizer_from_dict(config.stored)
    if config.model is not None:
        try:
            return SentencePieceTokenizer(Path(config.model).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read tokenizer.model {config.model}: {error.strerror}") from error
    if config.kind == "characters":
        return CharacterTokenizer.of(texts if characters is None else [characters])
    return SentencePieceTokenizer.train(texts, config.size, config.kind)
