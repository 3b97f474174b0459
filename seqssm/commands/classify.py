"""Label the sequences of a FASTA file with a trained DNA classifier: one TSV row a window.

With --tracks or --embeddings, along whole chromosomes, each row with all of the record as context; with --vcf, the
effect of variants.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from seqssm.commands import classify_tracks, classify_variants
from seqssm.commands.arguments import add_device_argument, positive
from seqssm.data.dna.prediction import FastaWindows
from seqssm.errors import UserError
from seqssm.files import atomic_write, refuse_to_overwrite
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.network import (
    Loaded,
    add_checkpoint_argument,
    build_network,
    checkpoint_or_default,
    read_checkpoint,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "fasta", type=Path, help="FASTA file: plain, gz or bgzip, any number of records, any size; - is standard input"
    )
    add_checkpoint_argument(parser)
    parser.add_argument("--window-bp", type=int, help="bases a window; default: as trained; 0: each record whole")
    parser.add_argument("--stride-bp", type=int, help="bases between window starts; default: the window, no overlap")
    parser.add_argument("--output", "-o", type=Path, help="TSV file to write; default: standard output")
    parser.add_argument("--batch-size", type=positive, default=8, help="windows a forward pass (default: 8)")
    add_device_argument(parser)
    classify_tracks.add_arguments(parser)
    classify_variants.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    along = args.tracks is not None or args.embeddings is not None
    _refuse_what_has_no_effect(args, along)
    if args.picture is not None and args.tracks is None:
        raise UserError("--picture draws what --tracks PREFIX writes: give both")
    if args.vcf is not None and along:
        raise UserError("--vcf scores variants, --tracks and --embeddings go along the sequence: run them one by one")
    if along and args.output is not None:
        raise UserError("--tracks and --embeddings name their own files: leave --output out")
    for option in ("output", "vcf_out", "picture", "embeddings"):
        refuse_to_overwrite(getattr(args, option), (args.fasta, args.vcf), f"--{option.replace('_', '-')}")
    if args.vcf_out is not None and args.vcf_out == args.output:
        raise UserError(f"--output and --vcf-out are both {args.output}: give them two names")
    if str(args.fasta) == "-":
        if along or args.vcf is not None:
            raise UserError(
                "standard input is read once, window by window: --tracks, --embeddings and --vcf need a file"
            )
        args.fasta = Path("/dev/stdin")
    args.checkpoint = checkpoint_or_default(args.checkpoint, DNANetwork)
    loaded = read_checkpoint(args.checkpoint)
    if along:
        classify_tracks.run(args, loaded)
    elif args.vcf is not None:
        classify_variants.run(args, loaded)
    else:
        _windows(args, loaded)


def _refuse_what_has_no_effect(args: argparse.Namespace, along: bool) -> None:
    """Raise UserError for options of another way to classify than the one that is asked for."""
    variants = args.vcf is not None
    for option, given, fits, way in (
        ("--vcf-out", args.vcf_out, variants, "--vcf"),
        ("--bin-bp", args.bin_bp, along, "--tracks and --embeddings"),
        ("--embeddings-dtype", args.embeddings_dtype, args.embeddings is not None, "--embeddings"),
        ("--one-strand", args.one_strand or None, along or variants, "--tracks, --embeddings and --vcf"),
        ("--stride-bp", args.stride_bp, not (along or variants), "windows, not for --tracks, --embeddings or --vcf"),
    ):
        if given is not None and not fits:
            raise UserError(f"{option} is for {way}, and would have no effect here: leave it out")


def _windows(args: argparse.Namespace, loaded: Loaded) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    network = build_network(loaded, DNANetwork, args.checkpoint).to(args.device)
    if os.path.isfile(args.fasta):
        network.prepare_for(args.fasta.stat().st_size)
    trained_bp = network.trained_on.get("window_bp")
    window_bp = (trained_bp if args.window_bp is None else args.window_bp) or None
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    output = nullcontext(sys.stdout) if args.output is None else atomic_write(args.output)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, output as out:
        total = args.fasta.stat().st_size if os.path.isfile(args.fasta) else None
        bar = progress.add_task(args.fasta.name, total=total)
        windows = FastaWindows(args.fasta, window_bp, args.stride_bp, on_read=lambda size: progress.advance(bar, size))
        count = 0
        for window in network.label_windows(windows, args.batch_size):
            if not count:  # only now is the input known to be readable
                print("record", "start_bp", "end_bp", "label", *network.labels, sep="\t", file=out)
            # A window of nothing but N gets a row, and no label.
            scores = ["NA"] * len(network.labels)
            if window.probabilities is not None:
                scores = [f"{p:.4f}" for p in window.probabilities]
            print(window.record, window.start_bp, window.end_bp, window.label or "NA", *scores, sep="\t", file=out)
            count += 1
    if args.output is not None:
        print(f"wrote {args.output}: {count:,} windows", file=sys.stderr)
