"""Say what is heard in audio files of any length, or in a live stream, with a trained tagger.

The best tags of each file go to standard output; --events and --report write files beside it. With --live, events are
printed as they begin and end: `ffmpeg ... -f wav - | seqssm tag - --live --checkpoint NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqssm import hub
from seqssm.commands.arguments import add_device_argument, chunk_ms, positive, threads
from seqssm.commands.interrupts import until_interrupted
from seqssm.data.audio.live import ENCODINGS, LiveAudio, standard_input
from seqssm.data.audio.reading import blocks, cut_off, open_audio
from seqssm.errors import UserError
from seqssm.files import atomic_write, make_folder, refuse_to_overwrite
from seqssm.tasks.events import FORMATS, Change, EventWriter, ended
from seqssm.tasks.network import add_checkpoint_argument, checkpoint_or_default, class_path, load_network
from seqssm.tasks.tag_report import Overview, overview_png, playable, report_html
from seqssm.tasks.tagging_network import TaggingNetwork
from seqssm.tasks.tagging_stream import Listener, LiveTagger, Tagger, make_tagger

BLOCK_S = 10.0
CLIPPED_SHARE = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", help="WAV, FLAC, MP3, OGG or Opus; with --live one WAV file that grows, or -"
    )
    add_checkpoint_argument(parser)
    parser.add_argument("--top-k", type=positive, default=5, help="tags a file (default: 5)")
    parser.add_argument("--output", "-o", type=Path, help="TSV file for the tags; default: standard output")
    add_device_argument(parser)
    parser.add_argument(
        "--threads", type=threads, help="of the CPU; default: one with --live, whose chunks are small, else all"
    )
    parser.add_argument("--skip-bad", action="store_true", help="go on past files that cannot be read, and count them")
    parser.add_argument("--window-s", type=float, default=30.0, help="of a model that reads both ways (default: 30)")
    files = parser.add_argument_group("files beside the tags")
    files.add_argument("--events", action="store_true", help="write NAME.events.txt (Audacity labels), .csv and .jsonl")
    files.add_argument("--report", action="store_true", help="write NAME.html, a page with playback, and NAME.png")
    files.add_argument("--folder", type=Path, default=Path("."), help="where they go (default: here)")
    events = parser.add_argument_group("events")
    events.add_argument("--threshold", type=float, help="of all classes; default: those tuned on validation")
    events.add_argument(
        "--off-ratio", type=float, default=0.6, help="an event lasts while it stays above so much of the threshold"
    )
    events.add_argument("--min-duration-s", type=float, default=0.2, help="shorter events are dropped (default: 0.2)")
    events.add_argument("--max-gap-s", type=float, default=0.3, help="events so close are one (default: 0.3)")
    events.add_argument(
        "--smooth-s", type=float, default=0.5, help="probabilities are averaged over so much first (default: 0.5)"
    )
    live = parser.add_argument_group("live")
    live.add_argument("--live", action="store_true", help="print events as they begin and end")
    live.add_argument("--rate", type=int, help="Hz, of raw PCM")
    live.add_argument("--channels", type=int, default=1, help="of raw PCM (default: 1)")
    live.add_argument("--encoding", choices=list(ENCODINGS), default="s16le", help="of raw PCM (default: s16le)")
    live.add_argument(
        "--chunk-ms", type=chunk_ms, default=480.0, help="heard at once, the delay of answers (default: 480)"
    )
    live.add_argument("--idle-s", type=float, default=5.0, help="a file that has not grown for so long has ended")
    live.add_argument("--jsonl", action="store_true", help="print JSON lines, not text")


def run(args: argparse.Namespace) -> None:
    refuse_to_overwrite(args.output, args.files, "--output")
    if args.events or args.report:
        _check_names(args.files, args.folder)
    if args.threads or args.live:
        torch.set_num_threads(args.threads or 1)
    args.checkpoint = args.checkpoint or (_causal_default() if args.live else None)
    args.checkpoint = checkpoint_or_default(args.checkpoint, TaggingNetwork)
    network = load_network(args.checkpoint, TaggingNetwork).to(args.device)
    if args.live:
        _live(args, network)
        return
    if "-" in args.files:
        raise UserError("- is read with --live")
    if args.rate is not None:
        raise UserError("--rate is of raw PCM, which is read with --live: recordings say their own")
    skipped = []
    output = nullcontext(sys.stdout) if args.output is None else atomic_write(args.output)
    with output as out:
        print("file", "label", "probability", "threshold", sep="\t", file=out)
        for name in args.files:
            try:
                for label, p, threshold in _tag_file(args, network, Path(name)):
                    print(name, label, f"{p:.4f}", f"{threshold:.4f}", sep="\t", file=out, flush=args.output is None)
            except UserError as error:
                if not args.skip_bad:
                    raise
                skipped.append(name)
                _note(f"skipped: {error}")
        if skipped and len(skipped) == len(args.files):
            raise UserError(f"none of the {len(skipped)} files could be read")
    if skipped:
        _note(f"skipped {len(skipped)} of {len(args.files)} files")
    if args.output is not None:
        _note(f"wrote {args.output}")


def _causal_default() -> str | None:
    """The shipped tagger that can run live, where there is one alone."""
    found = []
    for name, folder in hub.shipped().items():
        config = hub.read_config(folder)
        network = (config.get("network") or {}).get("class_path")
        if network == class_path(TaggingNetwork) and config["init_args"]["backbone"]["bidirectional"] == "none":
            found.append(name)
    return found[0] if len(found) == 1 else None


def _check_names(files: list[str], folder: Path) -> None:
    stems = [Path(name).stem for name in files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise UserError(f"two recordings are called {twice}: their events and reports would overwrite each other")
    make_folder(folder, "--folder")


def _note(text: str) -> None:
    print(f"seqssm: {text}", file=sys.stderr)


def _listener(args: argparse.Namespace, network: TaggingNetwork) -> Listener:
    return Listener(
        network,
        threshold=args.threshold,
        off_ratio=args.off_ratio,
        min_duration_s=args.min_duration_s,
        max_gap_s=args.max_gap_s,
        smooth_s=args.smooth_s,
    )


@contextmanager
def _event_files(args: argparse.Namespace, name: str) -> Iterator[Callable[[list[Change]], None]]:
    """Writes events to all formats, when asked to; the files appear when all is done."""
    with ExitStack() as stack:
        stem = "stdin" if name == "-" else Path(name).stem
        writers = []
        for form in FORMATS if args.events else ():
            file = stack.enter_context(atomic_write(args.folder / f"{stem}.events.{form}"))
            writers.append(EventWriter(file, form, name))

        def write(changes: list[Change]) -> None:
            for event in ended(changes):
                for writer in writers:
                    writer.write(event)

        yield write


def _tag_file(args: argparse.Namespace, network: TaggingNetwork, path: Path) -> list[tuple[str, float, float]]:
    from seqssm.data.progress import progress_bar

    begin = time.monotonic()
    with open_audio(path) as file:
        n_samples, rate, channels = file.frames, file.samplerate, file.channels
    listener = _listener(args, network)
    overview = Overview(n_samples / rate, network.features, len(network.labels)) if args.report else None
    network.prepare_for(round(n_samples / rate / network.token_s))
    tagger: Tagger = make_tagger(network, rate, args.window_s)
    hop_s = network.features.hop_samples / network.features.sample_rate
    heard = clipped = 0
    loudest = 0.0

    def note(changes: list[Change]) -> None:
        write(changes)
        if overview is not None:
            overview.add_frames(tagger.frames.numpy(), hop_s)
            overview.add_scores(listener.last, network.token_s)
            overview.add_events(ended(changes))

    with torch.inference_mode(), _event_files(args, str(path)) as write, progress_bar(path.name, n_samples) as advance:
        for samples, _ in blocks(path, BLOCK_S):
            note(listener.hear(tagger.accept(samples)))
            level = np.abs(samples)
            loudest = max(loudest, float(level.max()))
            clipped += int((level >= 1.0).sum())
            heard += samples.shape[1]
            if overview is not None:
                overview.add_samples(samples, rate)
            advance(samples.shape[1])
        note(listener.hear(tagger.flush()))
        changes = listener.detector.flush()
        write(changes)
        if overview is not None:
            overview.add_events(ended(changes))
    missing = cut_off(path)
    if missing:
        _note(f"{path} is cut off: its header promises {missing:,} more bytes")
    if not loudest:
        _note(f"{path} is silent")
    if clipped > CLIPPED_SHARE * heard * channels:
        _note(f"{path}: {clipped / heard / channels:.1%} of its samples are clipped")
    seconds, spent = heard / rate, time.monotonic() - begin
    tags = listener.tags(args.top_k)
    if overview is not None:
        facts = [
            ("duration", f"{seconds:,.2f} s, {rate:,} Hz, {channels} channel{'s' * (channels > 1)}"),
            ("checkpoint", str(args.checkpoint)),
            ("command", args.command_line),
        ]
        png = overview_png(overview, network.labels, path.name)
        page = report_html(png, playable(path, args.folder), title=path.name, facts=facts, tags=tags, overview=overview)
        with atomic_write(args.folder / f"{path.stem}.png", "wb") as file:
            file.write(png)
        with atomic_write(args.folder / f"{path.stem}.html") as file:
            file.write(page)
    kinds = [f"events.{form}" for form in FORMATS if args.events] + ["html", "png"] * args.report
    if kinds:
        _note(f"wrote {', '.join(str(args.folder / f'{path.stem}.{kind}') for kind in kinds)}")
    if seconds >= 60:
        _note(f"{path}: {seconds:,.1f} s heard in {spent:.1f} s (real-time factor {spent / seconds:.4f})")
    return tags


# ---- live ----------------------------------------------------------------------------------------------------------


def _live(args: argparse.Namespace, network: TaggingNetwork) -> None:
    if len(args.files) != 1:
        raise UserError("--live listens to one stream: give - or one file")
    if args.report:
        raise UserError("--report needs the whole recording: tag it again without --live once it has ended")
    if args.output is not None:
        raise UserError("--output is for the tags of files: with --live, redirect standard output, or write --events")
    (name,) = args.files
    options: dict[str, Any] = {"rate": args.rate, "channels": args.channels, "encoding": args.encoding}
    with ExitStack() as stack:
        if name == "-":
            stream: Any = stack.enter_context(standard_input())
        else:
            stream = stack.enter_context(_open_growing(name))
            # The end of a pipe is the end; a file may still be written to.
            options["follow_s"] = args.idle_s if os.path.isfile(name) else 0.0
        audio = LiveAudio(stream, "standard input" if name == "-" else name, **options)
        listener = _listener(args, network)
        tagger = LiveTagger(network, audio.rate, args.chunk_ms / 1000)
        write = stack.enter_context(_event_files(args, name))
        for samples in stack.enter_context(until_interrupted(audio)):
            _tell(listener.hear(tagger.accept(samples)), write, args.jsonl)
        _tell(listener.hear(tagger.flush()), write, args.jsonl)
        _tell(listener.detector.flush(), write, args.jsonl)
    for complaint in audio.complaints():
        _note(f"{audio.name}: {complaint}")
    if args.events:
        stem = "stdin" if name == "-" else Path(name).stem
        _note(f"wrote {', '.join(str(args.folder / f'{stem}.events.{form}') for form in FORMATS)}")
    for label, p, threshold in listener.tags(args.top_k):
        _note(f"of all that was heard: {label} {p:.4f} (threshold {threshold:.4f})")


def _open_growing(name: str) -> Any:
    try:
        return open(name, "rb", buffering=0)
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist: correct the path") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}; give - or one file that grows") from error


def _tell(changes: list[Change], write: Callable[[list[Change]], None], jsonl: bool) -> None:
    write(changes)
    for change in changes:
        if jsonl:
            row: dict[str, Any] = {"change": change.kind, "label": change.label, "time_s": change.time_s}
            if change.event is not None:
                row |= {"start_s": change.event.start_s, "peak": change.event.peak, "mean": change.event.mean}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            print(f"{change.time_s:10.3f}  {change.kind:<5}  {change.label}", flush=True)
