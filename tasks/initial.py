"""Starting from the weights of another checkpoint: what fits, what does not, and what must."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from seqssm.errors import UserError
from seqssm.tasks.network import Loaded, Network

CLASSES = ("labels", "multi_label", "tokenizer")
"""Arguments that say what the outputs mean."""
_MEMBER = re.compile(r"^others\.\d+\.")
NAMED = 6
"""More names than this are counted."""


def start_from(network: Network, source: Loaded, name: str) -> str:
    """Copy the weights of ``source`` that fit into ``network``, and say in a few lines what was done.

    Of a head with other outputs, the rows of those are copied that both have: the same labels, the same characters.

    Args:
        network: just built.
        source: what :func:`~seqssm.tasks.network.read_checkpoint` gave.
        name: of the source, for the text.

    Raises:
        UserError: a weight of the body is missing, or one outside the head is of another shape.
    """
    own, theirs = network.state_dict(), source.weights
    old, new = source.description["init_args"], network.init_args()
    # What only training needs says nothing about what fits.
    training = (source.description.get("network") or {}).get("training_args", ["optimizer"])
    old = {key: value for key, value in old.items() if key not in training}
    renamed = [key for key in CLASSES if key in new and old.get(key) != new[key]]
    heads = tuple(f"{part}." for part in network.head_parts)
    in_head = {key for key in own if _MEMBER.sub("", key).startswith(heads)}
    fits = {key for key, value in own.items() if key in theirs and theirs[key].shape == value.shape}
    body = tuple(f"{part}." for part in network.body_parts)
    misfits = [key for key in own if key in theirs and key not in fits and key not in in_head]
    misfits += [key for key in own if key.startswith(body) and key not in theirs]
    if misfits:
        first = misfits[0]
        shapes = (
            f"{tuple(theirs[first].shape)} there, {tuple(own[first].shape)} here" if first in theirs else "not there"
        )
        settings = _differences(old, new)
        raise UserError(
            f"init_from {name}: {_count(misfits, 'weight')} not fit this model, the first {first} ({shapes}); use the "
            f"settings that it was trained with" + (f": {', '.join(settings)}" if settings else "")
        )
    taken = {key: theirs[key] for key in fits if not (renamed and key in in_head)}
    names = network.output_names(old), network.output_names(new)
    there = {output: i for i, output in enumerate(names[0])}
    rows = [(there[output], i) for i, output in enumerate(names[1]) if renamed and output in there]
    sizes = tuple(map(len, names))
    partly = {
        key: _with_rows(own[key], theirs[key], rows)
        for key in own
        if rows and key in in_head and key in theirs and own[key].shape[1:] == theirs[key].shape[1:]
        if (len(theirs[key]), len(own[key])) == sizes
    }
    network.load_state_dict(taken | partly, strict=False)
    lines = [f"init_from {name}: {len(taken)} of {len(own)} tensors loaded"]
    if partly:
        lines.append(f"  for {len(rows)} of {sizes[1]} outputs, which both have: {_names(partly)}")
    taken |= partly
    fresh, unused = [key for key in own if key not in taken], [key for key in theirs if key not in taken]
    if fresh:
        reason = f" (other {' and '.join(renamed)})" if renamed else ""
        lines.append(f"  new, at their random start{reason}: {_names(fresh)}")
    if unused:
        lines.append(f"  in the checkpoint, not used: {_names(unused)}")
    if settings := _differences(old, new):
        lines.append(f"  other settings: {', '.join(settings)}")
    return "\n".join(lines)


def _with_rows(own: Tensor, theirs: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """``own`` with some rows of ``theirs``: (row there, row here) each."""
    there, here = (list(side) for side in zip(*rows, strict=True))
    result = own.clone()
    result[here] = theirs[there].to(own)
    return result


def _count(keys: list[str], what: str) -> str:
    return f"{len(keys)} {what}{'s do' if len(keys) > 1 else ' does'}"


def _names(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys) if len(keys) <= NAMED else f"{', '.join(keys[:NAMED])} and {len(keys) - NAMED} more"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings that both have with other values, as ``name before -> now``."""
    found: list[str] = []
    for key, value in new.items():
        if key in (*CLASSES, "thresholds") or key not in old or old[key] == value:
            continue
        if isinstance(value, Mapping) and isinstance(old[key], Mapping):
            found += _differences(old[key], value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key} {_plain(old[key])} -> {_plain(value)}")
    return found


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
