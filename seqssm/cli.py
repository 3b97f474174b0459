"""The `seqssm` command: Lightning's fit, validate, test, predict, and tools for people with a file and a question."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import math
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import seqssm
from seqssm.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

# Each tool is a module of seqssm.commands with add_arguments(parser) and run(args); imported only when it is called.
TOOLS = {
    "classify": "label the sequences of a FASTA file with a trained DNA classifier",
    "tag": "say what is heard in audio files or a live stream, and when, with a trained tagger",
    "transcribe": "write down what is said in audio files or a live stream, with a trained recogniser",
    "serve": "transcribe live clients over WebSockets, with a page for the microphone",
    "evaluate": "score a checkpoint on held-out data, with intervals, beside honest baselines",
    "calibrate": "fit the scale and the bias of a DNA classifier's answers on its validation windows",
    "plan": "predict the memory, speed and longest length of a training run",
    "speech": "make an n-gram model of transcripts, or synthetic speech, for a recogniser",
    "checkpoints": "list the checkpoints that come with seqssm; export, import and describe them",
    "hub": "copy checkpoints to and from a hub repository",
    "bench": "time the kernels and models on this machine",
    "mixers": "train each kind of mixer with the same budget, and compare them",
}
TRAINER_COMMANDS = {
    "fit": "train a task from a config",
    "validate": "run a task over its validation split",
    "test": "run a task over its test split",
    "predict": "run a task over its prediction split",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 130 when interrupted.

    Args:
        args: the command line without the program's name; ``sys.argv`` when None.
    """
    args = list(sys.argv[1:] if args is None else args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    # What Lightning does within itself, and what its makers advertise, is nothing that a user can act upon.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*is deprecated")
    for package in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{package}.utilities.rank_zero").addFilter(_no_advertisement)
    try:
        with _ended_by_exceptions():
            code = _dispatch(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk is told of here, not by the interpreter on its way out
        return code
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        print("seqssm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; leave without a second error at interpreter shutdown.
        _let_go_of_stdout()
        return 141
    except OSError as error:
        if error.strerror is None:
            raise  # not the system's: a fault of ours
        # A place where nobody expected one: still the user's file or disk, not a fault of the program.
        _let_go_of_stdout()
        return _complain(
            f"{'reading or writing failed' if error.filename is None else error.filename}: {error.strerror}"
        )


@contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """Have the signals that end a program do so by an exception, after which nothing half-written stays."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    changed = {}
    if threading.current_thread() is threading.main_thread():  # where alone signals arrive
        for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")):
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
                changed[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, before in changed.items():
            signal.signal(number, before)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in str(record.msg)


def _complain(message: str) -> int:
    print(f"seqssm: error: {message}", file=sys.stderr)
    return 2


def _let_go_of_stdout() -> None:
    """Send what standard output does not take nowhere, or the interpreter complains of it at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if args[0] == "--version":
        print(f"seqssm {seqssm.__version__}")
        return 0
    command, rest = args[0], args[1:]
    if command in TRAINER_COMMANDS:
        run_trainer(command, rest)
        return 0
    if command not in TOOLS:
        raise UserError(f"unknown command {command!r}; the commands are {', '.join([*TRAINER_COMMANDS, *TOOLS])}")
    module = importlib.import_module(f"seqssm.commands.{command}")
    parser = _Parser(f"seqssm {command}", description=module.__doc__)
    module.add_arguments(parser)
    namespace = parser.parse_args(rest)
    namespace.command_line = shlex.join(["seqssm", *args])  # reports say how they were made
    return module.run(namespace) or 0


class _Parser(argparse.ArgumentParser):
    """One that reports a bad argument as every other bad input is reported, and takes finite numbers alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", float, _finite)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the arguments")


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _overview() -> str:
    lines = ["usage: seqssm COMMAND ...    (seqssm COMMAND --help tells more)", "", "Train and test:"]
    lines += [f"  {name:<10} {text}" for name, text in TRAINER_COMMANDS.items()]
    lines += ["", "Use:"] + [f"  {name:<10} {text}" for name, text in TOOLS.items()]
    lines += ["", "Shipped configs (give them to --config by name):"]
    lines += [f"  {name}" for name in shipped_configs()]
    return "\n".join(lines)


# ---- configs -------------------------------------------------------------------------------------------------------


def shipped_configs() -> list[str]:
    """Names of the configs inside the package, such as ``dna/quickstart``."""
    root = resources.files("seqssm.configs")
    names = [f"{f.name}/{c.name.removesuffix('.yaml')}" for f in root.iterdir() if f.is_dir() for c in f.iterdir()
             if c.name.endswith(".yaml")]  # fmt: skip
    return sorted(names)


def find_config(name: str, option: str = "--config") -> str:
    """Path of a config: a file as given, else one of the shipped ones.

    Args:
        name: as the user wrote it behind ``option``.
        option: for the message.

    Raises:
        UserError: neither.
    """
    if Path(name).is_file():
        return name
    shipped = resources.files("seqssm.configs").joinpath(f"{name.removesuffix('.yaml')}.yaml")
    if not shipped.is_file():
        raise UserError(f"{option} {name}: no such file, nor a shipped config ({', '.join(shipped_configs())})")
    return str(shipped)


def names_data(text: str) -> bool:
    """Whether what stands behind ``--data`` is data themselves, a folder or a table, and not a config."""
    return Path(text).is_dir() or Path(text).suffix.lower() not in ("", ".yaml", ".yml")


def config_section(name: str, section: str, option: str) -> dict[str, Any]:
    """A section of a config, which is given by path or by name.

    Args:
        name: as the user wrote it behind ``option``.
        section: such as ``data``.
        option: for messages.

    Raises:
        UserError: there is no such config, it is no YAML, or it has no such section.
    """
    import yaml

    from seqssm.commands.parsing import check_keys

    path = find_config(name, option)
    check_keys(path, f"{option} {name}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{option} {name} cannot be read as YAML: {' '.join(str(error).split())}") from error
    found = content.get(section) if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{option} {name} has no `{section}` section; name a config that seqssm fit could use")
    return found


def _resolve_configs(args: list[str]) -> list[str]:
    from seqssm.commands.parsing import check_keys

    def found(name: str) -> str:
        path = find_config(name)
        check_keys(path, f"--config {name}")
        return path

    resolved, expect_name = [], False
    for arg in args:
        if expect_name:
            arg = found(arg)
        elif arg.startswith("--config="):
            arg = "--config=" + found(arg.removeprefix("--config="))
        expect_name = arg in ("-c", "--config")
        resolved.append(arg)
    return resolved


# ---- Lightning -----------------------------------------------------------------------------------------------------


def run_trainer(command: str, args: list[str]) -> LightningCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` as the Lightning CLI does, in subclass mode."""
    from seqssm.commands.parsing import said_clearly
    from seqssm.commands.trainer import TaskCLI

    # torchmetrics says so for every epoch of a split in which a class is missing; the report before step 1 has said it.
    warnings.filterwarnings("ignore", message=".*No (positive|negative) samples in targets.*")
    # main() hands the arguments over explicitly, whatever sys.argv holds.
    warnings.filterwarnings("ignore", message="LightningCLI.s args parameter.*")
    with said_clearly():
        return TaskCLI(args=[command, *_resolve_configs(args)])


if __name__ == "__main__":
    sys.exit(main())
