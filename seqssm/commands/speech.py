"""Make what helps a recogniser: an n-gram model of its transcripts, and synthetic speech of the same kind.

Both read the transcripts of the data set's train split, as `seqssm fit` would divide it, and nothing of the others.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

from seqssm.commands.arguments import seed
from seqssm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="{ngram,synthesise}", required=True)
    ngram = actions.add_parser("ngram", help="make an n-gram model (ARPA) of transcripts, for beam searches")
    _add_sources(ngram)
    ngram.add_argument("--output", "-o", type=Path, required=True, help="the .arpa or .arpa.gz to write")
    ngram.add_argument("--order", type=int, default=4, help="the longest n (default: 4)")
    ngram.add_argument("--unit", choices=("word", "token"), default="word", help="words or characters (default: word)")
    synthesise = actions.add_parser(
        "synthesise",
        help="have flite and espeak-ng say sentences that are drawn from an n-gram model of the transcripts",
    )
    _add_sources(synthesise)
    synthesise.add_argument("--output", "-o", type=Path, required=True, help="the folder to write, for data.extra")
    synthesise.add_argument("--sentences", type=int, default=1000, help="how many (default: 1000)")
    synthesise.add_argument("--order", type=int, default=3, help="of the model they are drawn from (default: 3)")
    synthesise.add_argument("--as-written", action="store_true", help="say the texts as they are, one after another")
    synthesise.add_argument("--spell", action="store_true", help="words of one letter are the names of letters")
    synthesise.add_argument(
        "--voices", help="PROGRAM:VOICE between commas, such as espeak-ng:de+f2; default: English ones of both programs"
    )
    synthesise.add_argument("--workers", type=int, default=os.cpu_count(), help="programs at once (default: a core's)")
    synthesise.add_argument("--seed", type=seed, default=0, help="of sentences, voices, speeds and levels (default: 0)")


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, nargs="?", help="a manifest or a folder of speech, as data.path")
    parser.add_argument("--extra", type=Path, action="append", default=[], help="more of the kind, for train alone")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a file with a sentence a line")
    parser.add_argument(
        "--split-seed", type=seed, default=0, help="data.seed of the training: what it holds out (default: 0)"
    )


def run(args: argparse.Namespace) -> None:
    for name in ("order", "sentences", "workers"):
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: it must be positive")
    {"ngram": _ngram, "synthesise": _synthesise}[args.action](args)


def train_texts(data: Path | None, extra: list[Path], text_files: list[Path], split_seed: int = 0) -> list[list[str]]:
    """The words of each sentence to learn from, in the form that recognisers are trained with by default.

    Args:
        data: a manifest or a folder, of which validation and test are left out.
        extra: more of the kind, all of whose utterances are train's.
        text_files: with a sentence a line.
        split_seed: of the held-out validation utterances, where the data have no validation split of their own.

    Raises:
        UserError: a file cannot be read, or there are no texts.
    """
    from seqssm.data.speech.manifests import SpeechLayout, extra_utterances, list_utterances
    from seqssm.data.speech.splits import SpeechSplitPlan, split_utterances
    from seqssm.data.speech.text import TextConfig

    written: list[str] = []
    if data is not None:
        utterances = list_utterances(SpeechLayout(data)).utterances
        split, _ = split_utterances(utterances, SpeechSplitPlan(seed=split_seed))
        written += [one.written for one, name in zip(utterances, split, strict=True) if name == "train"]
    for path in extra:
        written += [one.written for one in extra_utterances(path)]
    for path in text_files:
        try:
            written += path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {path} cannot be read ({error}); give a text file in UTF-8") from error
    form = TextConfig()
    sentences = [words for words in (form.normalise(one).split() for one in written) if words]
    if not sentences:
        raise UserError("there are no sentences: give a manifest with a train split, --extra or --text")
    return sentences


def _ngram(args: argparse.Namespace) -> None:
    from seqssm.tasks.decoding.ngram import NGram

    sentences = train_texts(args.data, args.extra, args.text, args.split_seed)
    units = sentences
    if args.unit == "token":
        units = [["<space>" if one == " " else one for one in " ".join(words)] for words in sentences]
    model = NGram.estimate(units, args.order)
    model.write(args.output)
    print(
        f"wrote {args.output}: order {args.order}, {len(model.words) - 3:,} {args.unit}s, of {len(sentences):,} "
        f"sentences; use it with --decode beam --ngram {args.output}"
        + (" --ngram-unit token" if args.unit == "token" else "")
    )


def _synthesise(args: argparse.Namespace) -> None:
    from seqssm.data.progress import progress_bar
    from seqssm.data.speech.synthesis import VOICES, plan_sayings, synthesise
    from seqssm.tasks.decoding.ngram import NGram

    sentences = [" ".join(words) for words in train_texts(args.data, args.extra, args.text, args.split_seed)]
    if args.as_written:
        said = [sentences[i % len(sentences)] for i in range(args.sentences)]
    else:
        model, rng = NGram.estimate((one.split() for one in sentences), args.order), random.Random(args.seed)
        said = []
        while len(said) < args.sentences:
            words = model.draw(rng)
            said += [" ".join(words)] if words else []
    voices = VOICES if args.voices is None else [one.strip() for one in args.voices.split(",")]
    sayings = plan_sayings(said, voices, args.seed)
    about = {"command": args.command_line, "sentences_known": len(set(sentences) & set(said))}
    with progress_bar("speaking", len(sayings)) as advance:
        seconds = synthesise(sayings, args.output, spell=args.spell, workers=args.workers, advance=advance, about=about)
    print(
        f"wrote {args.output}: {len(sayings):,} sentences ({len(set(said)):,} different ones), "
        f"{seconds / 3600:.2f} hours; train with --data.extra '[{args.output}/manifest.tsv]'"
    )
