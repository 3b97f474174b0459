"""Which utterances a recogniser can learn from or be scored on: those whose text its tokens can spell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from seqssm.data.speech.manifests import Utterance
from seqssm.data.speech.text import TextConfig
from seqssm.data.speech.tokenizers import CharacterTokenizer, SentencePieceTokenizer
from seqssm.errors import UserError


def sayable(
    utterances: Sequence[Utterance],
    tokenizer: CharacterTokenizer | SentencePieceTokenizer,
    text: TextConfig,
    empty_text: Literal["error", "drop", "keep"],
    skip_bad: bool,
) -> tuple[list[Utterance], Counter[str]]:
    """The utterances whose text the tokens can spell, and that have one; and what was left out, by reason.

    Args:
        utterances: with normalised texts.
        tokenizer: of the recogniser.
        text: what to do about other characters.
        empty_text: what to do about utterances without text.
        skip_bad: leave out what would be an error.

    Raises:
        UserError: the first utterance that cannot be spelled, or that is empty.
    """
    chosen, left_out = list(utterances), Counter[str]()
    strange: Counter[str] = Counter()  # characters outside the vocabulary
    odd = []
    for one in chosen:
        if found := tokenizer.unknown(one.text):
            strange.update(found)
            odd.append(one)
    if odd and text.unknown == "error" and not skip_bad:
        named = ", ".join(f"{character!r} ({count})" for character, count in sorted(strange.items())[:20])
        raise UserError(
            f"{odd[0].where} ({odd[0].text!r}): characters outside the vocabulary of {tokenizer.size} tokens: "
            f"{named}; set text.unknown to remove, add them to text.characters, or rewrite them by text.replace"
        )
    if odd and text.unknown == "error":
        gone = set(map(id, odd))
        left_out["utterances with unknown characters"] += len(odd)
        chosen = [one for one in chosen if id(one) not in gone]
    elif odd:
        without = str.maketrans(dict.fromkeys(strange, ""))
        chosen = [replace(one, text=" ".join(one.text.translate(without).split())) for one in chosen]
    empty = [one for one in chosen if not one.text]
    if not empty or empty_text == "keep":
        return chosen, left_out
    if empty_text == "error" and not skip_bad:
        raise UserError(
            f"{empty[0].where}: the transcript {empty[0].written!r} is empty once normalised ({len(empty)} such): "
            "correct it, or set empty_text to drop or keep"
        )
    left_out["utterances without text"] += len(empty)
    return [one for one in chosen if one.text], left_out
