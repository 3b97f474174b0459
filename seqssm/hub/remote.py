"""Checkpoints to and from a repository of a Hugging Face hub, or another folder; by the hub's own client."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import seqssm
from seqssm.errors import UserError
from seqssm.hub.folders import CARD, CONFIG, FILES, NOTES, WEIGHTS, load, read_files, resolve, write_folder

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def is_folder(place: str) -> bool:
    """Whether a place is a folder, not a repository: it is there, or begins as a path does (``./``, ``/``, ``~``)."""
    return place.startswith((".", "/", "~")) or Path(place).is_dir()


def check_repository(name: str) -> str:
    """The name of a repository, ``OWNER/NAME``.

    Raises:
        UserError: it is none.
    """
    if not _REPO.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        raise UserError(f"{name}: not the name of a hub repository, OWNER/NAME; begin the path of a folder with ./")
    return name


def push(
    checkpoint: str | Path, place: str, *, endpoint: str | None = None, private: bool = False, message: str = ""
) -> str:
    """Copy a checkpoint to a repository, which is made if it is not there, or to a folder.

    Args:
        checkpoint: a folder in hub format, or a shipped name.
        place: ``OWNER/NAME``, or a folder.
        endpoint: URL of the hub; ``HF_ENDPOINT``, else huggingface.co, by default. The token is the client's business.
        private: of a repository that is made.
        message: of the commit.

    Returns:
        Where it is now.

    Raises:
        UserError: the checkpoint is not whole, the name is none, or the hub refuses.
    """
    source = resolve(checkpoint)
    if not is_folder(place):
        check_repository(place)
    files = read_files(source)
    if is_folder(place):
        return str(write_folder(Path(place).expanduser(), files))
    client = _client()
    with _said_clearly(place), tempfile.TemporaryDirectory() as staging:
        for name, content in files.items():
            (Path(staging) / name).write_bytes(content)
        api = client.HfApi(endpoint=endpoint, library_name="seqssm", library_version=seqssm.__version__)
        # None leaves the visibility of a repository to its owner's default.
        api.create_repo(place, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=place, folder_path=staging, commit_message=message or f"seqssm {seqssm.__version__}: {source.name}"
        )
    return str(commit.commit_url)


def pull(place: str, folder: str | Path, *, endpoint: str | None = None, revision: str | None = None) -> Path:
    """Copy a checkpoint from a repository or a folder, checked before it takes its place.

    Only the files of a checkpoint are fetched, whatever else the repository holds.

    Args:
        place: ``OWNER/NAME``, or a folder.
        folder: where it is to be.
        endpoint: as of :func:`push`.
        revision: branch, tag or commit; the main branch by default.

    Returns:
        The folder.

    Raises:
        UserError: there is no such repository or revision, what it holds is not a whole checkpoint, or the folder holds
            something else.
    """
    if is_folder(place):
        return write_folder(Path(folder), read_files(resolve(Path(place).expanduser())))
    check_repository(place)
    client = _client()
    with tempfile.TemporaryDirectory() as staging:
        with _said_clearly(place):
            client.snapshot_download(
                place,
                revision=revision,
                local_dir=staging,
                allow_patterns=[CONFIG, WEIGHTS, CARD, NOTES, "metrics*.json"],
                endpoint=endpoint,
                library_name="seqssm",
                library_version=seqssm.__version__,
            )
        try:
            load(staging)
        except UserError as error:
            raise UserError(f"{place}: {str(error).replace(f'{staging}/', '')}") from error
        files = {path.name: path.read_bytes() for path in sorted(Path(staging).iterdir()) if FILES.fullmatch(path.name)}
    return write_folder(Path(folder), files)


def _client() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("hub repositories need huggingface_hub: pip install 'seqssm[hub]'") from error
    return huggingface_hub


@contextmanager
def _said_clearly(place: str) -> Iterator[None]:
    """The client's errors in one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{place}: no such repository, or none that you may use; `hf auth login` says who you are"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{place}: it has no such revision") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise UserError(f"{place}: the hub refuses ({str(error).splitlines()[0]})") from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:  # the base of what the transport raises
        raise UserError(
            f"{place}: the hub cannot be reached; check the connection, --endpoint and HF_ENDPOINT"
        ) from error
    except OSError as error:
        raise UserError(f"{place}: {error.strerror or ' '.join(str(error).split())}") from error
