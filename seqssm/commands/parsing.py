"""What jsonargparse says of a setting that does not fit, in one line that a person can read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from seqssm.errors import UserError

SHOWS = "`--print_config` shows every setting"
_LAYOUT = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Given value: NestedArg(",
    "Given value: Namespace(",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Problem with given class_path",
    "Not a valid subclass of",
    "Subclass types expect one of",
    "a class path (str)",
    "a dict with",
)
"""Beginnings of lines that say how the parser went about it; what was wrong stands in the others."""
_KEY = re.compile(r'Parser key "([^"]*)":')


def check_keys(path: str, name: str) -> None:
    """Look through a YAML config for what its parser takes in silence, or not at all.

    Args:
        path: of the file.
        name: what messages call it.

    Raises:
        UserError: a key stands twice in a section, of which the parser would take the last; or an anchor refers to
            itself; or it is no YAML.
    """
    import yaml

    def look(node: yaml.Node | None, above: tuple[yaml.Node, ...]) -> None:
        if node in above:
            raise UserError(f"{name}: an anchor of its YAML refers to itself: write the value out")
        if isinstance(node, yaml.SequenceNode):
            for one in node.value:
                look(one, (*above, node))
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                    raise UserError(
                        f"{name}: {key.value} stands twice, in lines {lines[key.value]} and {line}: make it one section"
                    )
                look(value, (*above, node))

    try:
        with open(path, encoding="utf-8-sig") as file:
            look(yaml.compose(file, Loader=yaml.SafeLoader), ())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{name} cannot be read as YAML: {' '.join(str(error).split())}") from error


@contextmanager
def said_clearly() -> Iterator[None]:
    """Turns what the parser, and Lightning of the trainer's settings, say of a config into a UserError of one line."""
    from jsonargparse import ArgumentError
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        yield
    except ArgumentError as error:
        raise UserError(one_line(str(error.message))) from error
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    except ValueError as error:
        # The parser wraps what the data says while its class names are handed to the model.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def one_line(message: str) -> str:
    """The key, what was expected of it, and what was given.

    Args:
        message: of jsonargparse's ArgumentError, of one line or many, some for each type of a union.
    """
    lines = [line.strip(" -\t") for line in message.splitlines()]
    keys = [found[1] for line in lines if (found := _KEY.fullmatch(line))]
    said, given = [], ""
    for line in lines:
        if not line or _KEY.fullmatch(line) or line.startswith(_LAYOUT):
            continue
        if line.startswith("Given value: "):
            given = f", got {line.removeprefix('Given value: ')}"
        elif _plain(line) not in said:
            said.append(_plain(line))
    expected = [part.removeprefix("expected ") for part in said if part.startswith("expected ")]
    others = [part for part in said if not part.startswith("expected ")]
    text = "; ".join([*others, *([f"expected {' or '.join(expected)}{given}"] if expected else [])])
    unknown = any("is not accepted" in part or "unrecognized" in part or "not accept option" in part for part in others)
    where = ".".join(keys)
    return f"{where}: {text}"[0 if where else 2 :] + (f"; {SHOWS}" if unknown else "")


def _plain(line: str) -> str:
    line = line.replace("Expected a dot import path string: ", "there is no class ")
    line = re.sub(r"^Expected an? ", "expected ", line).replace(". Got value: ", ", got ")
    line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line)
    return re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", line)
