"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from seqssm.errors import UserError

NAME_IN_TEMPORARY = 64
"""Letters of a file's name in that of its temporary file, which has to fit into the 255 bytes of a name, too."""


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing; it takes its name when the block ends, and nothing stays if the block raises.

    Args:
        path: the file; its folder must exist. An existing file is replaced, or left as it was; of a link, the file that
            it points to. A device or a pipe (``/dev/null``, ``/dev/stdout``) is written to as it comes.
        mode: ``"w"`` for text (UTF-8) or ``"wb"``.

    Raises:
        UserError: the folder or the disk does not take the file, or the path is a folder.
    """
    temporary: str | None = None
    try:
        # Names of files, which are written out, too, may be of any bytes.
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "surrogateescape")
        if not _takes_files(path):
            # Renaming a file onto a device would put the file in its place.
            with open(path, mode, encoding=encoding, errors=errors) as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:NAME_IN_TEMPORARY]}.")
        with os.fdopen(descriptor, mode, encoding=encoding, errors=errors) as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
        raise


def _takes_files(path: str | Path) -> bool:
    """Whether a new file can take this name: there is none yet, or a plain file."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(kind):
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    return stat.S_ISREG(kind)


def make_folder(folder: str | Path, option: str = "output folder") -> Path:
    """Make a folder to write to, where it is not there; raises UserError unless files can be made in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}; choose another {option}") from error
    return Path(folder)


def refuse_to_overwrite(output: str | Path | None, inputs: Iterable[str | Path | None], option: str) -> None:
    """Raise UserError where a file to be written is one of those that are read."""
    for one in inputs:
        if output is None or one is None:
            continue
        try:
            same = os.path.samefile(output, one)
        except OSError:  # one of them is not there: what cannot be read is told of where it is read
            continue
        if same and os.path.isfile(output):
            raise UserError(f"{option} {output} is a file that is read ({one}): it would be lost; choose another name")
