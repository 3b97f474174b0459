"""Train each kind of mixer on the same DNA with the same budget, and compare loss, speed and memory by length."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from seqssm.commands import arguments
from seqssm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fasta", type=Path, help="a genome to train on: FASTA (also gz), GenBank, EMBL, 2bit")
    parser.add_argument("--held-out", metavar="RECORD", help="record to validate on; default: the last long enough")
    parser.add_argument("--lengths", default="2^12,2^14,2^17", help="bases of a window, between commas")
    parser.add_argument("--models", default=None, help="between commas; default: all")
    parser.add_argument("--tokens", default="2^24", help="bases that each model trains on")
    parser.add_argument("--step-tokens", default="2^17", help="bases of a training step")
    parser.add_argument("--layers", type=arguments.positive, default=8, help="layers of each model")
    parser.add_argument("--width", type=arguments.positive, default=128, help="width of each model")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of each model")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of weights and windows")
    parser.add_argument(
        "--device", type=arguments.device, help="such as cuda or cpu; default: a GPU where there is one"
    )
    parser.add_argument("--json", type=Path, help="file for the figures, written after each model")


def run(args: argparse.Namespace) -> None:
    import torch

    from seqssm.commands.evaluate_synthetic import parse_lengths
    from seqssm.data.progress import progress_bar
    from seqssm.files import atomic_write
    from seqssm.kernels.bench_machine import describe_machine
    from seqssm.tasks.mixer_table import MODELS, Budget, Genome, Row, compare, table

    models = list(MODELS) if args.models is None else args.models.split(",")
    if unknown := [name for name in models if name not in MODELS]:
        raise UserError(f"--models: there is no {', '.join(unknown)}; there are {', '.join(MODELS)}")
    lengths = parse_lengths(args.lengths)
    (tokens,), (step_tokens,) = (parse_lengths(text) for text in (args.tokens, args.step_tokens))
    budget = Budget(tokens, step_tokens, args.layers, args.width, args.lr, args.seed)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    genome = Genome(args.fasta, max(lengths), args.held_out)
    rows: list[Row] = []
    about = {**describe_machine(), "budget": dataclasses.asdict(budget), "held_out": genome.held_out}

    def done(row: Row) -> None:
        rows.append(row)
        if args.json is not None:
            with atomic_write(args.json) as file:
                json.dump({**about, "rows": [dataclasses.asdict(row) for row in rows]}, file, indent=1)

    with progress_bar("training", len(models) * len(lengths) * budget.steps) as advance:
        compare(genome, lengths, models, budget, done, advance, device)
    print(table(rows))
