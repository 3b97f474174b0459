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
from seqssm.data.dna.prediction import FastaWindows, window_batches
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.base import Loaded, build_task, read_checkpoint
from seqssm.tasks.dna import DNAClassification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", type=Path, help="FASTA file: plain, gz or bgzip, any number of records, any size")
    parser.add_argument("--checkpoint", required=True, help="a Lightning .ckpt or a folder in hub format")
    parser.add_argument("--window-bp", type=int, help="bases a window; default: as trained; 0: each record whole")
    parser.add_argument("--stride-bp", type=int, help="bases between window starts; default: the window, no overlap")
    parser.add_argument("--output", "-o", type=Path, help="TSV file to write; default: standard output")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a forward pass (default: 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    classify_tracks.add_arguments(parser)
    classify_variants.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    along = args.tracks is not None or args.embeddings is not None
    if args.vcf is not None and along:
        raise UserError("--vcf scores variants, --tracks and --embeddings go along the sequence: run them one by one")
    if along and args.output is not None:
        raise UserError("--tracks and --embeddings name their own files: leave --output out")
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

    task = build_task(loaded, DNAClassification, args.checkpoint).to(args.device)
    trained_bp = loaded.data.get("init_args", {}).get("window_bp")
    window_bp = (trained_bp if args.window_bp is None else args.window_bp) or None
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    output = nullcontext(sys.stdout) if args.output is None else atomic_write(args.output)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, output as out:
        total = args.fasta.stat().st_size if args.fasta.is_file() else None
        bar = progress.add_task(args.fasta.name, total=total)
        windows = FastaWindows(args.fasta, window_bp, args.stride_bp, on_read=lambda size: progress.advance(bar, size))
        header_written = False
        for group, batch in window_batches(windows, args.batch_size):
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, args.device.startswith("cuda")):
                tokens, lengths = batch.tokens.to(args.device), batch.lengths.to(args.device)
                probabilities = task.predict_proba(tokens, lengths).float().cpu()
            if not header_written:  # only now is the input known to be readable
                print("record", "start_bp", "end_bp", "label", *task.labels, sep="\t", file=out)
                header_written = True
            for window, row, best in zip(group, probabilities.tolist(), probabilities.argmax(-1).tolist(), strict=True):
                # A window of nothing but N holds no evidence: it gets a row, and no label.
                label = task.labels[best] if window.n_fraction < 1 else "NA"
                scores = [f"{p:.4f}" for p in row] if window.n_fraction < 1 else ["NA"] * len(row)
                print(window.record, window.start_bp, window.end_bp, label, *scores, sep="\t", file=out)
