"""`seqssm classify --vcf`: what variants do to a classifier's answer."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from seqssm.data.dna.indexing import open_sequences
from seqssm.data.dna.variants import HEADER, Variant, read_vcf, vcf_lines
from seqssm.data.progress import progress_bar
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.network import Loaded, build_network
from seqssm.tasks.variants import VariantScorer, log_odds_change

Scores = dict[int, np.ndarray]
"""By the line of the VCF file: probabilities (1 + usable alleles, c), the reference's first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "variants",
        "One TSV row an alternative allele: the probability of each class with the reference and with the alternative, "
        "and the change of its log-odds (nats). A causal model has all of the record before the variant as context, "
        "read once for all variants, and pools over --window-bp around it; one that reads both ways sees that window.",
    )
    group.add_argument("--vcf", metavar="FILE", type=Path, help="variants to score: .vcf, plain, gzip or bgzip")
    group.add_argument(
        "--vcf-out", metavar="FILE", type=Path, help="also write the VCF with the changes of log-odds as INFO fields"
    )


def run(args: argparse.Namespace, loaded: Loaded) -> None:
    task = build_network(loaded, DNANetwork, args.checkpoint).to(args.device)
    if args.one_strand:
        task.average_strands = False
    trained_bp = loaded.data.get("init_args", {}).get("window_bp")
    window_bp = args.window_bp or trained_bp
    if window_bp is None:
        raise UserError("this model was trained on whole sequences: say with --window-bp over how many to pool")
    if args.vcf_out is not None and args.vcf_out.suffix == ".gz":
        raise UserError(f"--vcf-out {args.vcf_out} is written plain: name it .vcf, and compress it with bgzip")
    sequences = open_sequences(args.fasta)
    variants, left_out = read_vcf(args.vcf, sequences, args.fasta)
    on_gpu = args.device.startswith("cuda")
    scorer = VariantScorer(task, sequences, window_bp, args.batch_size, args.chunk, on_gpu)
    if not task.backbone.causal:
        print(f"this model reads both ways: each variant is scored in its window of {window_bp} bp", file=sys.stderr)
    scores: Scores = {}
    strands = 2 if task.backbone.causal and task.average_strands else 1
    with progress_bar("scoring variants", strands * len(variants)) as advance:
        for record in sorted({variant.record for variant in variants}):
            own = [variant for variant in variants if variant.record == record]
            scores |= {v.line: s for v, s in zip(own, scorer.score(record, own, advance), strict=True)}
    _write_table(args.output, variants, scores, sequences.names, task.labels)
    if args.vcf_out is not None:
        _write_vcf(args.vcf, args.vcf_out, variants, scores, task.labels, Path(args.checkpoint).name)
    written = ", ".join(str(path) for path in (args.output, args.vcf_out) if path is not None)
    if written:
        print(f"wrote {written}: {sum(len(one.usable) for one in variants):,} alleles", file=sys.stderr)
    for reason, count in sorted(left_out.items()):
        print(f"left out: {count:,} alleles {reason}", file=sys.stderr)


def _write_table(
    path: Path | None, variants: list[Variant], scores: Scores, names: list[str], labels: list[str]
) -> None:
    output: Any = nullcontext(sys.stdout) if path is None else atomic_write(path)
    with output as out:
        columns = [f"{kind}_{label}" for kind in ("ref", "alt", "log_odds") for label in labels]
        print("record", "pos", "id", "ref", "alt", *columns, sep="\t", file=out)
        for variant in variants:
            probabilities = scores[variant.line]
            changes = log_odds_change(probabilities)
            for row, (allele, change) in enumerate(zip(variant.usable, changes, strict=True), start=1):
                numbers = [f"{p:.6f}" for p in (*probabilities[0], *probabilities[row])] + [f"{x:.6g}" for x in change]
                site = (names[variant.record], variant.start_bp + 1, variant.name, variant.ref, variant.alts[allele])
                print(*site, *numbers, sep="\t", file=out)


def _write_vcf(
    source: Path, target: Path, variants: list[Variant], scores: Scores, labels: list[str], checkpoint: str
) -> None:
    by_line = {variant.line: variant for variant in variants}
    keys = ["SEQSSM_" + re.sub(r"\W+", "_", label) for label in labels]
    if len(set(keys)) < len(keys):
        raise UserError(f"the classes {', '.join(labels)} do not give INFO fields of different names")
    with atomic_write(target) as out:
        for number, line in vcf_lines(source):
            if line.startswith(HEADER):
                for key, label in zip(keys, labels, strict=True):
                    about = f"Change of the log-odds (nats) of {label} by the allele, {checkpoint}".replace('"', "'")
                    print(f'##INFO=<ID={key},Number=A,Type=Float,Description="{about}">', file=out)
            if number in by_line:
                line = _annotated(line, by_line[number], log_odds_change(scores[number]), keys)
            print(line, file=out)


def _annotated(line: str, variant: Variant, changes: np.ndarray, keys: list[str]) -> str:
    cells = line.split("\t")
    fields = [] if cells[7] in (".", "") else [cells[7]]
    for column, key in enumerate(keys):
        values = ["."] * len(variant.alts)
        for allele, change in zip(variant.usable, changes, strict=True):
            values[allele] = f"{change[column]:.6g}"
        fields.append(f"{key}={','.join(values)}")
    cells[7] = ";".join(fields)
    return "\t".join(cells)
