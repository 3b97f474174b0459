"""Types of arguments that several commands take; what does not fit is told of before any work begins."""

from __future__ import annotations

import argparse
import os

MOST_THREADS_A_CORE = 8
"""Beyond a few threads a core there is nothing to gain; where the system refuses one, the program would crash."""

MOST_CHUNK_MS = 60_000
DATA_HELP = (
    "a folder or table to use in the place of the checkpoint's own, or a YAML config whose `data` section to use; "
    "default: the data the checkpoint was trained with"
)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``, of commands that run one network by themselves."""
    import torch

    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device, default=default, help="such as cpu, cuda or cuda:1; default: %(default)s"
    )


def add_accelerator_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``, of commands that leave it to Lightning."""
    parser.add_argument("--device", type=accelerator, default="auto", help="auto, cpu or cuda (default: auto)")


def device(text: str) -> str:
    """The name of a device that is here."""
    import torch

    try:
        if torch.device(text).type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        # Torch also raises AssertionError, where it was built without the device.
        why = " ".join(str(error).splitlines()[:1]).rstrip(".")
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used here ({why}); choose cpu, or cuda on a GPU"
        ) from error
    return text


def accelerator(text: str) -> str:
    """``auto``, ``cpu`` or ``cuda``, the last where there is a GPU."""
    if text not in ("auto", "cpu", "cuda", "gpu"):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu or cuda")
    return text if text in ("auto", "cpu") else device("cuda")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def seed(text: str) -> int:
    """A whole number that every generator of random numbers takes."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return number


def chunk_ms(text: str) -> float:
    """Milliseconds heard at once: more than none, and not so many that a chunk takes all memory."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= MOST_CHUNK_MS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time of more than 0 and at most {MOST_CHUNK_MS:,} ms")
    return number


def threads(text: str) -> int:
    """How many threads of the CPU, as far as that makes sense."""
    number, most = positive(text), MOST_THREADS_A_CORE * (os.cpu_count() or 1)
    if number > most:
        raise argparse.ArgumentTypeError(f"{text} are too many for the cores of this machine; take {most} at most")
    return number
