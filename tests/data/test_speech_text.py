import json
import pickle

import pytest

from seqssm.data.speech.text import TextConfig
from seqssm.data.speech.tokenizers import (
    CharacterTokenizer,
    SentencePieceTokenizer,
    TokenizerConfig,
    make_tokenizer,
    tokenizer_from_dict,
)
from seqssm.errors import UserError

TEXTS = ["the cat sat on the mat", "a cat and a rat", "the rat sat", "that cat ran at the rat"] * 5


@pytest.mark.parametrize(
    ("settings", "written", "normalised"),
    [
        ({}, "  Author of the danger-trail, Philip Steels, etc. ", "author of the danger trail philip steels etc"),
        ({}, "Don\u2019t — “stop”", "don't stop"),
        ({}, "\uff26\uff35ll ﬁne 5€", "full fine 5"),
        ({"unicode": "NFC"}, "e\u0301 ﬁ", "é ﬁ"),
        ({"case": "upper"}, "straße", "STRASSE"),
        ({"case": "keep", "punctuation": "keep"}, "Well, ok.", "Well, ok."),
        ({"kept": "'-"}, "twenty-one, o'clock", "twenty-one o'clock"),
        ({"replace": {"&": " and "}}, "R&B", "r and b"),
        ({"characters": "abc", "unknown": "remove"}, "Cab dabble", "cab abb"),
        ({"characters": "abc"}, "cab d", "cab d"),  # named by the data, with the line
        ({}, "...", ""),
    ],
)
def test_normalisation(settings: dict, written: str, normalised: str) -> None:
    config = TextConfig(**settings)
    assert config.normalise(written) == normalised
    assert config.normalise(normalised) == normalised
    assert TextConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"case": "title"}, "text.case is 'title': choose one of lower, upper, keep"),
        ({"characters": "abC"}, "text.characters has 'C'"),
        ({"characters": "ab."}, "text.characters has '.'"),
        ({"replace": {"": "x"}}, "text.replace has an empty"),
    ],
)
def test_settings_that_contradict_themselves(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextConfig(**settings)


def test_characters() -> None:
    tokenizer = CharacterTokenizer.of(["cab", "dad a"])
    assert tokenizer.characters == " abcd"
    assert tokenizer.size == 5
    assert tokenizer.encode("a cad") == [2, 1, 4, 2, 5]
    assert tokenizer.decode([2, 0, 1, 4, 2, 5]) == "a cad"
    assert tokenizer.tokens == list(" abcd")
    assert tokenizer.encode("") == []
    with pytest.raises(UserError, match=r"outside the vocabulary: 'x' 'z'"):
        tokenizer.encode("za x")
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_of_words(kind: str) -> None:
    pytest.importorskip("sentencepiece")
    tokenizer = SentencePieceTokenizer.train(TEXTS, 18, kind)
    assert tokenizer.size == 18
    for text in [*TEXTS[:4], "mat rat", ""]:
        ids = tokenizer.encode(text)
        assert all(1 <= number <= 18 for number in ids)
        assert tokenizer.decode([0, *ids, 0]) == text
        assert "".join(tokenizer.tokens[number - 1] for number in ids).strip() == text
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert SentencePieceTokenizer.train(TEXTS, 18, kind).model == tokenizer.model
    for again in (
        tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.encode("the cat ran") == tokenizer.encode("the cat ran")
    assert tokenizer.unknown("zz <unk> cat") == sorted("<>kuz")
    with pytest.raises(UserError, match="outside the vocabulary: 'z'"):
        tokenizer.encode("zz cat")


def test_which_tokenizer(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert make_tokenizer(TokenizerConfig(), ["ab"], None).tokens == [" ", "a", "b"]
    assert make_tokenizer(TokenizerConfig(), ["ab"], "xyz").tokens == [" ", "x", "y", "z"]
    stored = CharacterTokenizer("qr ").to_dict()
    assert make_tokenizer(TokenizerConfig(stored=stored), ["ab"], None).tokens == ["q", "r", " "]
    pytest.importorskip("sentencepiece")
    trained = make_tokenizer(TokenizerConfig("bpe", 18), TEXTS, None)
    (tmp_path / "m.model").write_bytes(trained.model)  # type: ignore[union-attr]
    again = make_tokenizer(TokenizerConfig(model=str(tmp_path / "m.model")), [], None)
    assert again.to_dict() == trained.to_dict()
    with pytest.raises(UserError, match=r"tokenizer.size 5000 does not fit the training texts: Vocabulary size"):
        make_tokenizer(TokenizerConfig("bpe", 5000), TEXTS, None)
    with pytest.raises(UserError, match=r"cannot read tokenizer.model"):
        make_tokenizer(TokenizerConfig(model=str(tmp_path / "none")), [], None)
    (tmp_path / "bad.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        make_tokenizer(TokenizerConfig(model=str(tmp_path / "bad.model")), [], None)
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(UserError, match="need the package sentencepiece: pip install"):
        make_tokenizer(TokenizerConfig("bpe", 18), TEXTS, None)


@pytest.mark.parametrize(
    "stored", [{}, {"kind": "words"}, {"kind": "characters"}, {"kind": "characters", "characters": "aa"}]
)
def test_what_is_no_stored_tokenizer(stored: dict) -> None:
    with pytest.raises(UserError):
        tokenizer_from_dict(stored)
