"""List the checkpoints that come with seqssm; turn Lightning checkpoints into folders for a hub, and back; make cards.

Without a subcommand: the shipped checkpoints with task, size, score and licence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqssm.errors import UserError
from seqssm.files import atomic_write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    actions = parser.add_subparsers(dest="action", metavar="{export,import,mean,card,ngram}")
    export = actions.add_parser("export", help="write a checkpoint as a folder in hub format")
    export.add_argument("checkpoint", help="a Lightning .ckpt, a folder in hub format, or a shipped name")
    export.add_argument("folder", type=Path, help="to write; a checkpoint there is replaced, its card.yaml kept")
    export.add_argument("--half", action="store_true", help="store matrices as float16, where that changes no answer")
    export.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest change of a probability with --half (default: 0.001)"
    )
    export.add_argument("--notes", type=Path, help="a card.yaml: licences, hardware, what the model is not good for")
    export.add_argument("--metrics", type=Path, help="the metrics.json that `seqssm evaluate` wrote for these weights")
    back = actions.add_parser("import", help="write a checkpoint as a Lightning .ckpt, without an optimizer")
    back.add_argument("checkpoint", help="a folder in hub format or a shipped name")
    back.add_argument("path", type=Path, help="the .ckpt to write")
    mean = actions.add_parser("mean", help="write the mean of the weights of runs that began from the same ones")
    mean.add_argument("checkpoints", nargs="+", help="two or more: a Lightning .ckpt, a folder, or a shipped name")
    mean.add_argument("path", type=Path, help="the .ckpt to write")
    card = actions.add_parser("card", help="make a folder's README.md of its metrics.json, card.yaml and config.json")
    card.add_argument("folder", type=Path, help="a checkpoint in hub format")
    card.add_argument("--check", action="store_true", help="only say whether README.md is what it should be")
    ngram = actions.add_parser("ngram", help="give a recogniser's folder an n-gram model for its beam searches")
    ngram.add_argument("folder", type=Path, help="a checkpoint in hub format")
    ngram.add_argument("arpa", type=Path, help="the model, as `seqssm speech ngram` writes it")
    ngram.add_argument("--unit", choices=("word", "token"), default="word", help="of it (default: word)")
    ngram.add_argument("--weight", type=float, default=0.5, help="of its log-probabilities (default: 0.5)")
    ngram.add_argument("--bonus", type=float, default=0.0, help="nats a word of it (default: 0)")


def run(args: argparse.Namespace) -> None:
    {None: _list, "export": _export, "import": _import, "mean": _mean, "card": _card, "ngram": _ngram}[args.action](
        args
    )


def _list(args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from seqssm import hub

    rows = [describe(name, folder) for name, folder in hub.shipped().items()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("no checkpoints come with this version of seqssm")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("name", "task", "weights", "MB", "score, 95% interval", "licence"):
        table.add_column(heading, justify="right" if heading in ("weights", "MB") else "left", no_wrap=True)
    for row in rows:
        score = f"{row['metric']} {row['score']}" if row["metric"] else "-"
        score += "" if row["split"] == "test" else f" on {row['split']}"
        name = f"{row['name']}{' *' if row['default'] else ''}"
        table.add_row(
            name, row["task"], f"{row['parameters']:,}", f"{row['megabytes']:.2f}", score, row["license"] or "none"
        )
    console = Console()
    # A table that is cut off says less than one that is too wide.
    Console(width=max(console.width, 140)).print(table)
    print("* is used when no --checkpoint is given. Cards: README.md in", next(iter(hub.shipped().values())).parent)


def describe(name: str, folder: Path) -> dict[str, Any]:
    """What a list says of a checkpoint."""
    from safetensors import safe_open

    from seqssm import hub
    from seqssm.hub.cards import main_measure, task_title

    config, notes, reports = hub.read_config(folder), hub.read_notes(folder), hub.read_reports(folder)
    with safe_open(folder / hub.WEIGHTS, framework="np") as file:
        sizes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 - no dict
    parameters = sum(_product(shape) for shape in sizes)
    report = next(iter(reports.values()), None)
    metric, measure = main_measure(report, notes) if report else ("", None)
    data = report.get("data") if report else None
    split = data.get("split", "test") if isinstance(data, Mapping) else "test"
    return {
        "name": name,
        "task": task_title(config),
        "parameters": parameters,
        "megabytes": round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 3),
        "metric": metric,
        "score": measure.text() if measure else "",
        "split": split,
        "license": notes.license,
        "default": notes.default,
        "folder": str(folder),
    }


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _export(args: argparse.Namespace) -> None:
    from seqssm.tasks.exporting import export, refuse_to_replace

    notes = _text(args.notes) if args.notes else None
    try:
        metrics = json.loads(_text(args.metrics)) if args.metrics else None
    except ValueError as error:
        raise UserError(f"{args.metrics}: not JSON ({error}); write it with `seqssm evaluate`") from error
    refuse_to_replace(args.folder, args.checkpoint)
    folder = export(
        args.checkpoint, args.folder, half=args.half, tolerance=args.tolerance, notes=notes, metrics=metrics
    )
    from seqssm import hub

    storage = hub.read_config(folder).get("storage")
    size = (folder / hub.WEIGHTS).stat().st_size / 1e6
    rounded = (
        f", {storage['dtype']} changed no probability by more than {storage['largest_change']:.1g}" if storage else ""
    )
    print(f"wrote {folder}, {size:.2f} MB{rounded}")
    if metrics is None:
        print(
            f"next: seqssm evaluate --checkpoint {folder} -o REPORT, copy metrics.json from there, then "
            f"seqssm checkpoints card {folder}"
        )


def _import(args: argparse.Namespace) -> None:
    from seqssm.tasks.exporting import to_lightning

    print(f"wrote {to_lightning(args.checkpoint, args.path)}")


def _mean(args: argparse.Namespace) -> None:
    from seqssm.tasks.exporting import mean

    if len(args.checkpoints) < 2:
        raise UserError("a mean needs two checkpoints at least, and then the .ckpt to write")
    print(f"wrote {mean(args.checkpoints, args.path)}")


def _card(args: argparse.Namespace) -> None:
    from seqssm import hub

    folder = hub.resolve(args.folder)
    card, path = hub.make_card(folder), folder / hub.CARD
    if args.check:
        if not path.is_file() or path.read_text(encoding="utf-8") != card:
            raise UserError(
                f"{path} is not what its metrics.json, card.yaml and config.json say: run seqssm checkpoints card"
            )
        print(f"{path} says what the other files say")
        return
    with atomic_write(path) as file:
        file.write(card)
    print(f"wrote {path}")


def _ngram(args: argparse.Namespace) -> None:
    import tempfile

    from seqssm import hub
    from seqssm.tasks.asr_network import ASRNetwork
    from seqssm.tasks.decoding.ngram import NGram, NGramScorer
    from seqssm.tasks.network import load_network

    folder = hub.resolve(args.folder)
    task = load_network(folder, ASRNetwork)
    model = NGram.read(args.arpa)
    NGramScorer(model, task.tokenizer.tokens, args.unit)  # says so where the two do not go together
    with tempfile.TemporaryDirectory() as temporary:
        model.write(Path(temporary) / hub.NGRAM)
        content = (Path(temporary) / hub.NGRAM).read_bytes()
    hub.add_ngram(folder, content, args.unit, args.weight, args.bonus)
    print(f"{folder} has {args.arpa} for its beam searches, {len(content) / 1e6:.2f} MB")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); correct the path") from error
