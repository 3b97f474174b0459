"""Time the kernels and models on this machine, beside their peers and the hardware's limit."""

from __future__ import annotations

import argparse
from pathlib import Path

from seqssm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cases",
        nargs="*",
        help="case names, families such as model, or patterns such as 'cpu-*'; default: all of this device",
    )
    parser.add_argument("--json", type=Path, help="file for the figures; cases in it that are not run again stay")
    parser.add_argument("--seconds", type=float, help="time to spend on each implementation and pass")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")


def run(args: argparse.Namespace) -> None:
    from seqssm.benchmarks import CASES
    from seqssm.kernels.bench import main
    from seqssm.tasks.benchmarks import ClassifierCase, TaggingCase

    if args.seconds is not None and args.seconds <= 0:
        raise UserError(f"--seconds is {args.seconds:g}: it must be positive")
    options = {"seconds": args.seconds, "peers": not args.no_peers, "memory": not args.no_memory}
    main(args.cases or None, args.json, families=(*CASES, ClassifierCase, TaggingCase), **options)
