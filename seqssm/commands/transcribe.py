"""Write down what is said in audio files of any length, or in a live stream, with a trained recogniser.

Text goes to standard output, a line a segment; --format and --folder write JSON lines or subtitles. `-` reads WAV or
raw PCM as it comes, and prints text while it is spoken:
`arecord -f S16_LE -r 16000 - | seqssm transcribe - --checkpoint NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from seqssm import hub
from seqssm.commands.arguments import add_device_argument, chunk_ms, positive, threads
from seqssm.commands.interrupts import until_interrupted
from seqssm.data.audio.live import ENCODINGS, LiveAudio, standard_input
from seqssm.data.audio.reading import blocks, open_audio
from seqssm.errors import UserError
from seqssm.files import atomic_write, make_folder, refuse_to_overwrite
from seqssm.tasks.asr_decoding import METHODS, DecodingConfig, decoders
from seqssm.tasks.asr_network import ASRNetwork
from seqssm.tasks.asr_stream import Transcriber
from seqssm.tasks.network import add_checkpoint_argument, checkpoint_or_default, load_network
from seqssm.tasks.transcripts import FORMATS, EndpointRules, Result, TranscriptWriter

BLOCK_S = 10.0
SUFFIXES = {"text": "txt", "json": "jsonl", "srt": "srt", "vtt": "vtt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", help="WAV, FLAC, MP3, OGG or Opus; or -, a live stream on standard input")
    add_checkpoint_argument(parser)
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: %(default)s; json is JSON lines")
    parser.add_argument("--output", "-o", type=Path, help="file to write; default: standard output")
    parser.add_argument(
        "--folder", type=Path, help="write a file for each recording here, NAME.txt, .jsonl, .srt, .vtt"
    )
    add_device_argument(parser)
    parser.add_argument("--skip-bad", action="store_true", help="go on past files that cannot be read, and count them")
    add_stream_arguments(parser)
    add_decoding_arguments(parser)
    segments = parser.add_argument_group("segments end")
    segments.add_argument("--silence-s", type=float, default=2.4, help="after so much silence (default: 2.4)")
    segments.add_argument("--after-text-s", type=float, default=1.2, help="so long after some text (default: 1.2)")
    segments.add_argument("--longest-s", type=float, default=20.0, help="when so long, between words (default: 20)")
    live = parser.add_argument_group("live, from -")
    live.add_argument("--rate", type=int, help="Hz, of raw PCM")
    live.add_argument("--channels", type=int, default=1, help="of raw PCM (default: 1)")
    live.add_argument("--encoding", choices=list(ENCODINGS), default="s16le", help="of raw PCM (default: s16le)")
    live.add_argument(
        "--partials", action="store_true", help="tell what is heard of a segment before it ends, on standard error"
    )


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    """How the model hears: the same for all commands that run it."""
    group = parser.add_argument_group("hearing")
    group.add_argument(
        "--lookahead-ms", type=int, help="wait so long before each word; default: as the checkpoint was validated"
    )
    group.add_argument("--chunk-ms", type=chunk_ms, default=160.0, help="heard at once (default: 160)")
    group.add_argument(
        "--threads", type=threads, default=1, help="on a CPU; a stream's steps are too small for more (default: 1)"
    )


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """How text is found: the same for all commands that do."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--decode", choices=METHODS, default="greedy", help="default: %(default)s")
    group.add_argument("--beam-size", type=positive, default=16, help="hypotheses of a beam (default: 16)")
    group.add_argument("--hotwords", type=Path, help="a file with a word or phrase a line that a beam is to prefer")
    group.add_argument("--hotword-boost", type=float, default=1.0, help="nats a character of them (default: 1)")
    group.add_argument(
        "--ngram",
        help="an ARPA language model that a beam is to use, or none; default: the checkpoint's, if it has one",
    )
    group.add_argument("--ngram-unit", choices=("word", "token"), help="of it (default: word)")
    group.add_argument(
        "--ngram-weight", type=float, help="of its log-probabilities (default: the checkpoint's, or 0.5)"
    )
    group.add_argument("--ngram-bonus", type=float, help="nats a word of it (default: the checkpoint's, or 0)")


def decoding_config(args: argparse.Namespace) -> DecodingConfig:
    """The arguments' settings; ``args.checkpoint`` names one."""
    hotwords: list[str] = []
    if args.hotwords is not None:
        try:
            lines = args.hotwords.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--hotwords {args.hotwords} cannot be read ({error}); give a text file") from error
        hotwords = [line.strip() for line in lines if line.strip()]
    ngram = {"path": args.ngram, "unit": "word", "weight": 0.5, "bonus": 0.0}
    if args.ngram is None and args.decode.endswith("beam") and not Path(args.checkpoint).is_file():
        ngram |= hub.find_ngram(hub.resolve(args.checkpoint)) or {}
    chosen = {"unit": args.ngram_unit, "weight": args.ngram_weight, "bonus": args.ngram_bonus}
    ngram |= {key: value for key, value in chosen.items() if value is not None}
    return DecodingConfig(
        method=args.decode,
        size=args.beam_size,
        hotwords=hotwords,
        hotword_boost=args.hotword_boost,
        ngram=None if ngram["path"] == "none" else ngram["path"],
        ngram_unit=ngram["unit"],
        ngram_weight=ngram["weight"],
        ngram_bonus=ngram["bonus"],
    )


def set_threads(args: argparse.Namespace) -> None:
    """Use as many threads as were asked for. Waiting for one another costs small steps more than they gain."""
    torch.set_num_threads(args.threads)


def run(args: argparse.Namespace) -> None:
    _check(args)
    set_threads(args)
    rules = EndpointRules(args.silence_s, args.after_text_s, args.longest_s)
    args.checkpoint = checkpoint_or_default(args.checkpoint, ASRNetwork)
    config = decoding_config(args)
    task = load_network(args.checkpoint, ASRNetwork).to(args.device)
    make_decoder = decoders(task, config)

    def transcriber(rate: int) -> Transcriber:
        return Transcriber(
            task, rate, lookahead_ms=args.lookahead_ms, chunk_ms=args.chunk_ms, decoder=make_decoder(), rules=rules
        )

    if args.lookahead_ms is not None:
        task.menu_position(args.lookahead_ms)
    if args.files == ["-"]:
        _live(args, transcriber)
        return
    task.prepare_for(round(_total_s(args.files) / task.token_s))
    skipped = []
    with _destination(args) as writer_of:
        for name in args.files:
            try:
                with writer_of(name) as write:
                    _transcribe_file(Path(name), transcriber, write)
            except UserError as error:
                if not args.skip_bad:
                    raise
                skipped.append(name)
                _note(f"skipped: {error}")
        if len(skipped) == len(args.files):
            raise UserError(f"none of the {len(skipped)} files could be read")
    if skipped:
        _note(f"skipped {len(skipped)} of {len(args.files)} files")
    _tell_written(args, [name for name in args.files if name not in skipped])


def _check(args: argparse.Namespace) -> None:
    if "-" in args.files and len(args.files) > 1:
        raise UserError("- is a live stream: give it alone")
    refuse_to_overwrite(args.output, args.files, "--output")
    if args.output is not None and args.folder is not None:
        raise UserError("--output is one file, --folder has one for each recording: give one of them")
    if args.rate is not None and args.files != ["-"]:
        raise UserError("--rate is of raw PCM from standard input: recordings say their own; give - in place of files")
    if args.partials and args.files != ["-"]:
        raise UserError("--partials are for a live stream: give - in place of files")
    if args.folder is None and len(args.files) > 1 and args.format in ("srt", "vtt"):
        raise UserError(f"subtitles of {len(args.files)} recordings need --folder, a file for each")
    if args.folder is not None:
        stems = [Path(name).stem for name in args.files]
        twice = next((stem for stem in stems if stems.count(stem) > 1), None)
        if twice is not None:
            raise UserError(f"two recordings are called {twice}: their transcripts would overwrite each other")
        make_folder(args.folder, "--folder")


def _total_s(files: list[str]) -> float:
    """Seconds of all recordings; those that cannot be read count nothing here, and are told of in their turn."""
    seconds = 0.0
    for name in files:
        with suppress(UserError), open_audio(Path(name)) as file:
            seconds += file.frames / file.samplerate
    return seconds


def _tell_written(args: argparse.Namespace, names: list[str]) -> None:
    if args.output is not None:
        _note(f"wrote {args.output}")
    elif args.folder is not None:
        stems = ("stdin" if name == "-" else Path(name).stem for name in names)
        _note(f"wrote {', '.join(str(args.folder / f'{stem}.{SUFFIXES[args.format]}') for stem in stems)}")


def _note(text: str) -> None:
    print(f"seqssm: {text}", file=sys.stderr)


Write = Callable[[list[Result]], None]


@contextmanager
def _destination(args: argparse.Namespace) -> Iterator[Callable[[str], Any]]:
    """What opens a writer of final results for a recording."""
    several = len(args.files) > 1

    @contextmanager
    def in_folder(name: str) -> Iterator[Write]:
        stem = "stdin" if name == "-" else Path(name).stem
        with atomic_write(args.folder / f"{stem}.{SUFFIXES[args.format]}") as file:
            yield _writing(TranscriptWriter(file, args.format, name if args.format == "json" else None))

    if args.folder is not None:
        yield in_folder
        return
    output = nullcontext(sys.stdout) if args.output is None else atomic_write(args.output)
    with output as out:

        @contextmanager
        def in_one(name: str) -> Iterator[Write]:
            if args.format == "text" and several:
                # A line a recording: its name, and all that is said.
                said: list[str] = []
                yield lambda results: said.extend(result.text for result in results if result.is_final)
                print(name, " ".join(said), sep="\t", file=out, flush=args.output is None)
            else:
                yield _writing(TranscriptWriter(out, args.format, name if args.format == "json" else None), out)

        yield in_one


def _writing(writer: TranscriptWriter, flushed: IO[str] | None = None) -> Write:
    def write(results: list[Result]) -> None:
        for result in results:
            if result.is_final:
                writer.write(result)
                if flushed is not None:
                    flushed.flush()

    return write


def _transcribe_file(path: Path, transcriber: Callable[[int], Transcriber], write: Write) -> None:
    from seqssm.data.progress import progress_bar

    begin = time.monotonic()
    with open_audio(path) as file:
        n_samples, rate = file.frames, file.samplerate
    stream = transcriber(rate)
    loudest = 0.0
    with progress_bar(path.name, n_samples) as advance:
        for samples, _ in blocks(path, BLOCK_S):
            write(stream.accept(samples))
            loudest = max(loudest, float(np.abs(samples).max()))
            advance(samples.shape[1])
        write(stream.finish())
    if not loudest:
        _note(f"{path} is silent")
    seconds, spent = stream.session.accepted_s, time.monotonic() - begin
    if seconds >= 60:
        _note(f"{path}: {seconds:,.1f} s heard in {spent:.1f} s (real-time factor {spent / seconds:.4f})")


# ---- live ------------------------------------------------------------------------------------------------------------


def _live(args: argparse.Namespace, transcriber: Callable[[int], Transcriber]) -> None:
    with standard_input() as stream:
        audio = LiveAudio(stream, "standard input", rate=args.rate, channels=args.channels, encoding=args.encoding)
        asr = transcriber(audio.rate)
        with _destination(args) as writer_of, writer_of("-") as write_final:

            def write(results: list[Result]) -> None:
                for result in results:
                    if args.partials:
                        _tell_partial(result)
                    write_final([result])

            with until_interrupted(audio) as packets:
                for samples in packets:
                    write(asr.accept(samples))
                write(asr.finish())
    for complaint in audio.complaints():
        _note(f"{audio.name}: {complaint}")
    _tell_written(args, ["-"])


def _tell_partial(result: Result) -> None:
    """Partial results go to standard error: a line that is written over on a terminal, JSON lines elsewhere."""
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        text = "" if result.is_final else result.text[-width:]
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif not result.is_final:
        row = {"segment": result.segment, "stable": result.stable, "text": result.text, "end_s": result.end_s}
        print(json.dumps(row, ensure_ascii=False), file=sys.stderr, flush=True)
