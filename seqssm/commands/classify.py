"""Label the sequences of a FASTA file with a trained DNA classifier: one TSV row a window."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from seqssm.data import FastaWindows
from seqssm.files import atomic_write
from seqssm.tasks.base import build_task, read_checkpoint
from seqssm.tasks.dna import DNAClassification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", type=Path, help="FASTA file: plain, gz or bgzip, any number of records, any size")
    parser.add_argument("--checkpoint", required=True, help="a Lightning .ckpt or a folder in hub format")
    parser.add_argument("--window-bp", type=int, help="bases a window; default: as trained; 0: each record whole")
    parser.add_argument("--stride-bp", type=int, help="bases between window starts; default: the window, no overlap")
    parser.add_argument("--output", "-o", type=Path, help="TSV file to write; default: standard output")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a forward pass (default: 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--index-dir", type=Path, help="where the 1 byte/base index goes; default: the user's cache")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    loaded = read_checkpoint(args.checkpoint)
    task = build_task(loaded, DNAClassification, args.checkpoint).to(args.device)
    trained_bp = loaded.data.get("init_args", {}).get("window_bp")
    window_bp = (trained_bp if args.window_bp is None else args.window_bp) or None
    windows = FastaWindows(args.fasta, window_bp=window_bp, stride_bp=args.stride_bp, index_dir=args.index_dir)
    batches = windows.batches(args.batch_size)
    progress = track(
        batches, f"classify {args.fasta.name}", total=-(-len(windows) // args.batch_size),
        console=Console(stderr=True), disable=not sys.stderr.isatty(),
    )  # fmt: skip
    output = nullcontext(sys.stdout) if args.output is None else atomic_write(args.output)
    with output as out, torch.inference_mode():
        print("record", "start_bp", "end_bp", "label", *task.labels, sep="\t", file=out)
        for places, batch in progress:
            autocast = torch.autocast("cuda", torch.bfloat16, enabled=args.device.startswith("cuda"))
            with autocast:
                tokens, lengths = batch.tokens.to(args.device), batch.lengths.to(args.device)
                probabilities = task.predict_proba(tokens, lengths).cpu()
            for place, row in zip(places, probabilities.tolist(), strict=True):
                label = task.labels[max(range(len(row)), key=row.__getitem__)]
                print(place.record, place.start_bp, place.end_bp, label, *(f"{p:.4f}" for p in row), sep="\t", file=out)
