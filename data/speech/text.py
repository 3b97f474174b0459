"""How transcripts are written: one declared form for training, decoding and scoring."""

from __future__ import annotations

import unicodedata
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from seqssm.errors import UserError

APOSTROPHES = {"\u2019": "'", "\u02bc": "'"}


@dataclass(frozen=True)
class TextConfig:
    """The written form of transcripts; it travels with the weights.

    The steps are, in this order: Unicode normalisation, `replace`, case, punctuation, `characters`, white space (each
    run becomes one space, none stands at either end).

    Args:
        unicode: the normalisation form; NFKC makes ligatures and full-width letters plain.
        replace: pieces of text to replace; typographic apostrophes become plain ones by default.
        case: all letters lower or upper, or as they are.
        punctuation: `remove` puts a space where there is punctuation or a symbol, except for those in `kept`.
        kept: punctuation that belongs to words.
        characters: the characters of the vocabulary beside the space; those of the training texts where None.
        unknown: what to do about a character outside the vocabulary: it is an `error`, or `remove`d.
    """

    unicode: Literal["NFC", "NFKC"] = "NFKC"
    replace: dict[str, str] = field(default_factory=lambda: dict(APOSTROPHES))
    case: Literal["lower", "upper", "keep"] = "lower"
    punctuation: Literal["remove", "keep"] = "remove"
    kept: str = "'"
    characters: str | None = None
    unknown: Literal["error", "remove"] = "error"

    def __post_init__(self) -> None:
        for name, choices in (
            ("unicode", ("NFC", "NFKC")),
            ("case", ("lower", "upper", "keep")),
            ("punctuation", ("remove", "keep")),
            ("unknown", ("error", "remove")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"text.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if "" in self.replace:
            raise UserError("text.replace has an empty piece of text to replace")
        if self.characters is not None:
            spoilt = [one for one in self.characters if not one.isspace() and self._written(one).strip() != one]
            if spoilt:
                raise UserError(
                    f"text.characters has {spoilt[0]!r}, which text.case, text.punctuation or text.replace change: "
                    "correct one of them"
                )

    def normalise(self, text: str) -> str:
        """A transcript in this form. Characters outside of `characters` are still there unless they are removed."""
        text = self._written(text)
        if self.characters is not None and self.unknown == "remove":
            text = "".join(one for one in text if one.isspace() or one in self.characters)
        return " ".join(text.split())

    def _written(self, text: str) -> str:
        text = unicodedata.normalize(self.unicode, text)
        for old, new in self.replace.items():
            text = text.replace(old, new)
        if self.case != "keep":
            text = unicodedata.normalize(self.unicode, text.lower() if self.case == "lower" else text.upper())
        if self.punctuation == "remove":
            text = "".join(" " if self._is_punctuation(one) else one for one in text)
        return text

    def _is_punctuation(self, character: str) -> bool:
        return unicodedata.category(character)[0] in "PSC" and character not in self.kept

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``TextConfig(**d)`` builds it again."""
        return asdict(self)
