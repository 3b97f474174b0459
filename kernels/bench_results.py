"""Results of ``seqssm bench``: as lines of text, a JSON file, a Markdown table."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqssm.errors import UserError


def format_row(row: Mapping[str, Any]) -> str:
    """One result as a line of text."""
    peak = "" if row["peak_mib"] is None else f"  peak {row['peak_mib']:,.0f} MiB"
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    host = "" if row["host_ms"] is None else f"  host {row['host_ms']:.3g} ms"
    line = (
        f"  {row['pass']:<17} {row['dtype']}  {row['ms']:.4g} ms  {row['tokens_per_s']:,.0f} tokens/s"
        f"  roofline {row['roofline']:.0%}{peak}{host}{error}"
    )
    for name, ms in row["peers"].items():
        other = row["peers_peak_mib"].get(name)
        line += f"\n    {name}: {ms:.4g} ms ({ms / row['ms']:.2f}x)" + (f", peak {other:,.0f} MiB" if other else "")
    for name, reason in row["peers_failed"].items():
        line += f"\n    {name}: failed ({reason})"
    return line


def write_json(path: Path, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write results, keeping those of other cases that the file already has; a reader never sees half a file."""
    key = ("case", "pass", "dtype")
    try:
        kept = json.loads(path.read_text())["cases"] if path.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of benchmark results; choose another name") from error
    merged = {tuple(row[k] for k in key): dict(row) for row in [*kept, *rows]}
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            temporary = Path(file.name)
            json.dump({**machine, "cases": list(merged.values())}, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def table(path: str | Path) -> str:
    """A results file as a Markdown table."""
    results = json.loads(Path(path).read_text())
    lines = [
        f"{results['device']}, torch {results['torch']}, triton {results['triton']}",
        "",
        "| case | pass | dtype | ms | tokens/s | roofline | peak MiB | error | peers, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["cases"]:
        peers = ", ".join(f"{name} {ms:.4g} ({ms / row['ms']:.2f}x)" for name, ms in row["peers"].items())
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(
            f"| {row['case']} | {row['pass']} | {row['dtype']} | {row['ms']:.4g} | {row['tokens_per_s']:,.0f} "
            f"| {row['roofline']:.0%} | {peak} | {error} | {peers} |"
        )
    return "\n".join(lines)
