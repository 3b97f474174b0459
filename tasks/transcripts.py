"""From decoded tokens to what a user reads: words with times, segments that end at pauses, and subtitle formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

from seqssm.errors import UserError
from seqssm.tasks.decoding.emissions import Emission, emissions_of, plain
from seqssm.tasks.decoding.words import TimedToken, Word, span, timed_tokens, words

FORMATS = ("text", "json", "srt", "vtt")
Format = Literal["text", "json", "srt", "vtt"]


@dataclass(frozen=True)
class Result:
    """What is known of a segment: partial results of the open one replace one another, until its final one.

    Attributes:
        segment: number of the segment, from 0.
        is_final: whether it will change no more.
        text: the best text so far.
        stable: the part of ``text``, from its beginning, that later results of the stream only add to. Its last word
            may still grow, and may open the next segment where this one becomes too long.
        start_s, end_s: of the words, in seconds from the start of the stream, never past its end.
        words, tokens: what the text is made of.
    """

    segment: int
    is_final: bool
    text: str
    stable: str
    start_s: float
    end_s: float
    words: list[Word] = field(default_factory=list)
    tokens: list[TimedToken] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class _Partial(Result):
    """A result whose words and tokens are found when somebody asks: most partial results are shown as text alone."""

    def __init__(
        self,
        segment: int,
        text: str,
        stable: str,
        times: tuple[float, float],
        spelled: Callable[[], tuple[list[Word], list[TimedToken]]],
    ) -> None:
        known = {"segment": segment, "is_final": False, "text": text, "stable": stable}
        self.__dict__.update(known, start_s=times[0], end_s=times[1], _spelled=spelled)

    def __getattr__(self, name: str) -> Any:
        if name not in ("words", "tokens"):
            raise AttributeError(name)
        self.__dict__["words"], self.__dict__["tokens"] = self._spelled()
        return self.__dict__[name]


@dataclass(frozen=True)
class EndpointRules:
    """When a segment ends; whichever comes first. This cuts the text alone: model and decoder go on as they are.

    Args:
        silence_s: nothing emitted for so long, whether there is text or not.
        after_text_s: nothing emitted for so long behind some text.
        longest_s: a segment of this length is cut behind its last whole word.
    """

    silence_s: float = 2.4
    after_text_s: float = 1.2
    longest_s: float = 20.0

    def __post_init__(self) -> None:
        if min(self.silence_s, self.after_text_s, self.longest_s) <= 0:
            raise UserError(f"the endpoint rules must be positive times, got {self}")


class Segmenter:
    """Cuts a stream of emissions into segments and tells their results, in constant memory.

    Args:
        tokens: text of each token, that of id i at i - 1, with a space where a word begins.
        token_s: seconds a position.
        rules: the endpoints.
    """

    def __init__(self, tokens: Sequence[str], token_s: float, rules: EndpointRules) -> None:
        self._tokens, self._token_s, self._rules = list(tokens), token_s, rules
        self._segment = 0
        self._start = 0  # position where the open segment begins
        self._open: list[Emission] = []  # its stable emissions
        self._spelled = ""  # their text, with its spaces
        self._told = ("", "")
        self._seen: tuple[Any, ...] = ()  # what the last partial result was made of

    def state(self) -> dict[str, Any]:
        """Plain data for :meth:`load`."""
        return {
            "segment": self._segment,
            "start": self._start,
            "open": plain(self._open),
            "told": list(self._told),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._segment, self._start = state["segment"], state["start"]
        self._open = []
        self._add(emissions_of(state["open"]))
        self._told = (state["told"][0], state["told"][1])

    def must_settle(self, stable: Sequence[Emission], partial: Sequence[Emission], position: int) -> bool:
        """Whether an endpoint is due that needs the decoder to make up its mind about the partial part."""
        return bool(partial) and self._due([*stable, *partial], position) is not None

    def advance(self, stable: Sequence[Emission], partial: Sequence[Emission], position: int) -> list[Result]:
        """Take the newly stable emissions and the unstable rest behind them, with ``position`` positions decoded."""
        self._add(stable)
        results = []
        due, end_s = self._due(partial, position), position * self._token_s
        if due == "pause":
            results += self._close(len(self._open), end_s)
            self._start = position
        elif due == "length":
            count = self._whole_words()
            rest = self._open[count:]
            results += self._close(count, end_s)
            self._start = rest[0].frame if rest else position
        results += self._tell(partial, end_s)
        return results

    def finish(self, stable: Sequence[Emission], end_s: float) -> list[Result]:
        """The last result; no time in it lies behind ``end_s``."""
        self._add(stable)
        return self._close(len(self._open), end_s)

    def _add(self, stable: Sequence[Emission]) -> None:
        # A new list: partial results that were told keep theirs.
        self._open = [*self._open, *stable]
        self._spelled += self._raw(stable)

    def _raw(self, emissions: Sequence[Emission]) -> str:
        return "".join([self._tokens[one.id - 1] for one in emissions])

    def _text(self, emissions: Sequence[Emission]) -> str:
        return " ".join(self._raw(emissions).split())

    def _due(self, partial: Sequence[Emission], position: int) -> Literal["pause", "length"] | None:
        has_text = bool(self._spelled.strip() or self._raw(partial).strip())
        said = partial or self._open[-1:]
        last = said[-1].frame if said else self._start - 1
        silence = (position - 1 - last) * self._token_s
        rules = self._rules
        if silence >= rules.silence_s or (has_text and silence >= rules.after_text_s):
            return "pause"
        return "length" if (position - self._start) * self._token_s >= rules.longest_s else None

    def _whole_words(self) -> int:
        """Emissions in front of the last word that is begun; all where there is one word only."""
        said = self._open
        for i in range(len(said) - 1, 0, -1):
            if self._tokens[said[i].id - 1].startswith(" ") and self._text(said[:i]):
                return i
        return len(said)

    def _close(self, count: int, end_s: float) -> list[Result]:
        taken, rest = self._open[:count], self._open[count:]
        self._open, self._spelled = [], ""
        self._add(rest)
        self._told = ("", "")
        text = self._text(taken)
        if not text:
            return []
        result = self._result(taken, text, end_s)
        self._segment += 1
        return [result]

    def _tell(self, partial: Sequence[Emission], end_s: float) -> list[Result]:
        """The open segment's partial result, if it says something new."""
        seen = (self._segment, len(self._open), *partial)
        if seen == self._seen:
            return []
        self._seen = seen
        stable = " ".join(self._spelled.split())
        text = " ".join((self._spelled + self._raw(partial)).split()) if partial else stable
        if (text, stable) == self._told:
            return []
        self._told = (text, stable)
        said = [*self._open, *partial] if partial else self._open
        about = said, self._tokens, self._token_s, end_s
        times = span(*about) or (min(self._start * self._token_s, end_s),) * 2
        return [_Partial(self._segment, text, stable, times, lambda: (words(*about), timed_tokens(*about)))]

    def _result(self, emissions: Sequence[Emission], text: str, end_s: float) -> Result:
        """The final one, of some text."""
        about = emissions, self._tokens, self._token_s, end_s
        said = words(*about)
        return Result(self._segment, True, text, text, said[0].start_s, said[-1].end_s, said, timed_tokens(*about))


# ---- files -----------------------------------------------------------------------------------------------------------


def clock(seconds: float, decimal: str) -> str:
    """``HH:MM:SS,mmm``, with the given mark before the milliseconds."""
    ms = round(1000 * seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{decimal}{ms % 1000:03}"


class TranscriptWriter:
    """Writes final results as they come: plain text, JSON lines, SubRip (srt) or WebVTT (vtt).

    JSON is one object a line, with the file's name where one is given.
    """

    def __init__(self, file: IO[str], form: Format, name: str | None = None) -> None:
        if form not in FORMATS:
            raise UserError(f"unknown format {form!r}: choose among {', '.join(FORMATS)}")
        self._file, self._form, self._name, self._count = file, form, name, 0
        if form == "vtt":
            file.write("WEBVTT\n\n")

    def write(self, result: Result) -> None:
        """Write a segment."""
        self._count += 1
        if self._form == "text":
            self._file.write(f"{result.text}\n")
        elif self._form == "json":
            row = {"file": self._name} if self._name is not None else {}
            self._file.write(json.dumps({**row, **result.to_dict()}, ensure_ascii=False) + "\n")
        else:
            decimal = "," if self._form == "srt" else "."
            number = f"{self._count}\n" if self._form == "srt" else ""
            # "-->" ends a cue's times in both formats, and WebVTT reads tags; no vocabulary of speech needs either.
            text = result.text.replace("-->", "->")
            if self._form == "vtt":
                text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            self._file.write(f"{number}{clock(result.start_s, decimal)} --> {clock(result.end_s, decimal)}\n{text}\n\n")
