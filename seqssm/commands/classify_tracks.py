"""`seqssm classify --tracks` and `--embeddings`: what a model says along every record of a FASTA file."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import seqssm
from seqssm.commands.arguments import positive
from seqssm.data.dna.indexing import Sequences, checksum, open_sequences
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.streaming import fingerprint
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.network import Loaded, Network, build_network
from seqssm.tasks.track_files import BedGraphs, EmbeddingFile, ProbabilityTable, Stretches
from seqssm.tasks.tracks import STATE, TrackPlan, Tracks

DEFAULT_BIN_BP = 128
LOCK = "lock"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "tracks",
        "Along every record, with the whole record as context and memory for a piece of it. A killed run goes on where "
        "it was when the same command is given again.",
    )
    group.add_argument(
        "--tracks",
        metavar="PREFIX",
        type=Path,
        help="write PREFIX.tsv, PREFIX.bed (stretches of one class) and PREFIX.CLASS.bedgraph",
    )
    group.add_argument(
        "--picture", metavar="FILE.png", type=Path, help="with --tracks: draw the longest records, class by class"
    )
    group.add_argument(
        "--embeddings",
        metavar="FILE",
        type=Path,
        help="write the backbone's mean output for each row to FILE.npy or FILE.zarr, and where each record's rows "
        "are to FILE.npy.tsv",
    )
    group.add_argument("--embeddings-dtype", choices=("float16", "float32"), help="of them (default: float32)")
    group.add_argument(
        "--bin-bp",
        type=positive,
        help=f"bases a row (default: {DEFAULT_BIN_BP}, or the next multiple of the model's patch); the model's pooling "
        "then covers --window-bp around it",
    )
    group.add_argument(
        "--one-strand", action="store_true", help="do not average with the other strand, which takes as long again"
    )
    group.add_argument(
        "--chunk", type=positive, default=1 << 16, help="positions at once: memory grows with it (default: %(default)s)"
    )


def run(args: argparse.Namespace, loaded: Loaded) -> None:
    if args.picture is not None and args.picture.suffix.lower() != ".png":
        raise UserError(f"--picture {args.picture}: the name must end in .png")
    task = _build(args, loaded).to(args.device)
    sequences = open_sequences(args.fasta)
    target: Path = args.embeddings if args.tracks is None else args.tracks
    if not target.name:
        raise UserError(
            f"--tracks {target}: give what the names of the files are to begin with, such as {target}/tracks"
        )
    folder = target.with_name(target.name + ".partial")
    settings = {
        "version": seqssm.__version__,
        "FASTA": checksum(args.fasta),
        "checkpoint": fingerprint(task),
        "device": args.device,
        "outputs": [str(path) for path in (args.tracks, args.embeddings) if path is not None],
        "embeddings_dtype": args.embeddings_dtype or "float32",
    }
    with _claimed(folder):
        _run(args, loaded, task, sequences, folder, settings)
    if args.picture is not None:
        _draw(args, sequences)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """A folder for what is unfinished, this process's alone while the block lasts; gone where it is complete.

    Raises:
        UserError: another process works in it, it was there before and is not of such a run, or it cannot be made.
    """
    lock = folder / LOCK
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (lock.exists() or (folder / STATE).exists()):
            raise UserError(f"{folder} is in the way, and not of an interrupted run: move it, or choose another name")
        folder.mkdir(parents=True, exist_ok=True)
        file = open(lock, "ab")  # noqa: SIM115 - closed below, and with the process, which gives it up
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another place") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is at work in {folder}: wait for it, or choose another name") from error
        yield


def _run(
    args: argparse.Namespace, loaded: Loaded, task: Any, sequences: Sequences, folder: Path, settings: dict[str, Any]
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    made = not (folder / STATE).exists()
    if made:  # nothing that is in it could be gone on with
        for one in folder.iterdir():
            if one.is_dir():
                shutil.rmtree(one)
            elif one.name != LOCK:
                one.unlink()
    try:
        tracks = Tracks(task, sequences, _plan(args, loaded, task), folder, settings, args.device.startswith("cuda"))
        if made:
            _check_space(tracks, folder)
        files = _files(args, task, tracks, folder)
    except UserError:
        if made:
            shutil.rmtree(folder)
        raise
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(args.fasta.name, total=tracks.work_bp())
        if not made:
            print(f"going on with the run in {folder}", file=sys.stderr)
        try:
            tracks.run(files, lambda bases: progress.advance(bar, bases))
        except KeyboardInterrupt:
            print(f"stopped: the same command goes on from {folder}", file=sys.stderr)
            raise
    _finish(args, files, folder)
    shutil.rmtree(folder)


def _draw(args: argparse.Namespace, sequences: Sequences) -> None:
    from seqssm.tasks.track_plots import tracks_png

    lengths = dict(zip(sequences.names, sequences.lengths.tolist(), strict=True))
    picture = tracks_png(args.tracks.with_name(args.tracks.name + ".tsv"), lengths)
    with atomic_write(args.picture, "wb") as file:
        file.write(picture)
    print(f"wrote {args.picture}", file=sys.stderr)


def _build(args: argparse.Namespace, loaded: Loaded) -> Network:
    if args.tracks is not None:
        return build_network(loaded, DNANetwork, args.checkpoint)
    task: Network = build_network(loaded, Network, args.checkpoint)
    if not isinstance(task, DNANetwork) and not _is_pretraining(task):
        raise UserError(f"{args.checkpoint} holds a {type(task).__name__}; --embeddings needs a model of DNA")
    return task


def _is_pretraining(task: Network) -> bool:
    from seqssm.tasks.pretraining import DNAPretraining  # with Lightning, which a classifier does without

    return isinstance(task, DNAPretraining)


def _plan(args: argparse.Namespace, loaded: Loaded, task: Any) -> TrackPlan:
    patch = task.embedding.patch
    bin_bp = args.bin_bp or -(-DEFAULT_BIN_BP // patch) * patch
    pool_bp = loaded.data.get("init_args", {}).get("window_bp") if args.window_bp is None else args.window_bp
    if not isinstance(task, DNANetwork) or task.pooling.mode == "last":
        pool_bp = args.window_bp or 0
    both = isinstance(task, DNANetwork) and task.average_strands and not args.one_strand
    return TrackPlan(bin_bp, pool_bp or 0, both, args.chunk)


def _check_space(tracks: Tracks, folder: Path) -> None:
    free, needed = shutil.disk_usage(folder).free, tracks.spilled_bytes()
    if needed > free:
        raise UserError(
            f"{folder} needs about {needed / 2**30:.1f} GiB while it works, and {free / 2**30:.1f} are free: choose "
            "another place, or longer rows with --bin-bp"
        )


def _files(args: argparse.Namespace, task: Any, tracks: Tracks, folder: Path) -> list[Any]:
    files: list[Any] = []
    if args.tracks is not None:
        files += [kind(folder, task.labels) for kind in (ProbabilityTable, BedGraphs, Stretches)]
    if args.embeddings is not None:
        d = task.backbone.config.d_model
        sequences, bin_bp, dtype = tracks.sequences, tracks.plan.bin_bp, args.embeddings_dtype or "float32"
        files.append(EmbeddingFile(args.embeddings, folder, sequences, tracks.bins, bin_bp, d, dtype))
    return files


def _finish(args: argparse.Namespace, files: list[Any], folder: Path) -> None:
    written = []
    (folder / STATE).unlink()  # from here on a killed run has to start again
    for file in files:
        if hasattr(file, "finish"):
            file.finish()
        if isinstance(file, EmbeddingFile):
            written.append(args.embeddings)
            continue
        for suffix, part in file.files.items():
            part.close()
            name = args.tracks.with_name(args.tracks.name + suffix)
            os.replace(part.path, name)
            written.append(name)
    print("wrote", ", ".join(map(str, written)), file=sys.stderr)
