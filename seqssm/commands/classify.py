"""Label the sequences of a FASTA file with a trained DNA classifier: one TSV row a window.

With --tracks or --embeddings, along whole chromosomes, each row with all of the record as context; with --vcf, the
effect of variants.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from seqssm.commands import classify_tracks, classify_variants
from seqssm.data.dna.prediction import FastaWindows
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.network import (
    Loaded,
    add_checkpoint_argument,
    build_network,
    checkpoint_or_default,
    read_checkpoint,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", type=Path, help="FASTA file: plain, gz or bgzip, any number of records, any size")
    add_checkpoint_argument(parser)
    parser.add_argument("--window-bp", type=int, help="bases a window; default: as trained; 0: each record whole")
    parser.add_argument("--stride-bp", type=int, help="bases between window starts; default: the window, no overlap")
    parser.add_argument("--output", "-o", type=Path, help="TSV file to write; default: standard output")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a forward pass (default: 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    classify_tracks.add_arguments(parser)
    classify_variants.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    along = args.tracks is not None or args.embeddings is not None
    if args.picture is not None and args.tracks is None:
        raise UserError("--picture draws what --tracks PREFIX writes: give both")
    if args.vcf is not None and along:
        raise UserError("--vcf scores variants, --tracks and --embeddings go along the sequence: run them one by one")
    if along and args.output is not None:
        raise UserError("--tracks and --embeddings name their own files: leave --output out")
    args.checkpoint = checkpoint_or_default(args.checkpoint, DNANetwork)
    loaded = read_checkpoint(args.checkpoint)
    if along:
        classify_tracks.run(args, loaded)
    elif args.vcf is not None:
        classify_variants.run(args, loaded)
    else:
        _windows(args, loaded)


def _windows(args: argparse.Namespace, loaded: Loaded) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    network = build_network(loaded, DNANetwork, args.checkpoint).to(args.device)
    if args.fasta.is_file():
        network.prepare_for(args.fasta.stat().st_size)
    trained_bp = network.trained_on.get("window_bp")
    window_bp = (trained_bp if args.window_bp is None else args.window_bp) or None
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    output = nullcontext(sys.stdout) if args.output is None else atomic_write(args.output)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, output as out:
        total = args.fasta.stat().st_size if args.fasta.is_file() else None
        bar = progress.add_task(args.fasta.name, total=total)
        windows = FastaWindows(args.fasta, window_bp, args.stride_bp, on_read=lambda size: progress.advance(bar, size))
        header_written = False
        for window in network.label_windows(windows, args.batch_size):
            if not header_written:  # only now is the input known to be readable
                print("record", "start_bp", "end_bp", "label", *network.labels, sep="\t", file=out)
                header_written = True
            # A window of nothing but N gets a row, and no label.
            scores = ["NA"] * len(network.labels)
            if window.probabilities is not None:
                scores = [f"{p:.4f}" for p in window.probabilities]
            print(window.record, window.start_bp, window.end_bp, window.label or "NA", *scores, sep="\t", file=out)
