"""Files that are written: whole or not at all, and never over what is no file or is being read."""

import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from seqssm.errors import UserError
from seqssm.files import atomic_write, refuse_to_overwrite


def write(path: Path, parts: Iterable[str]) -> None:
    with atomic_write(path) as file:
        for part in parts:
            file.write(part)


def test_a_file_is_replaced_when_it_is_whole_and_else_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / f"{'long' * 60}.tsv"  # 244 letters: a temporary name has room beside it
    with atomic_write(path) as file:
        file.write("first")
    with pytest.raises(ZeroDivisionError):
        write(path, (str(1 / divisor) for divisor in (1, 0)))
    assert path.read_text() == "first"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_of_a_link_the_file_is_written_that_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for text in ("made", "replaced"):
        with atomic_write(tmp_path / "link") as file:
            file.write(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "file").read_text() == text
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match=r"cannot write .*round: Too many levels of symbolic links"):
        write(tmp_path / "round", "")


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()), daemon=True)
    reader.start()
    with atomic_write(pipe) as file:
        file.write("through")
    reader.join(10)
    assert heard == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*device: No space left on device; choose another place"):
        write(device, "text")
    assert stat.S_ISCHR(device.stat().st_mode)


@pytest.mark.parametrize("name", ["", ".", "folder"])
def test_a_folder_is_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="it is a folder; give the name of a file"):
        write(tmp_path / name, "")


def test_what_is_read_is_not_overwritten_by_whatever_name(tmp_path: Path) -> None:
    read = tmp_path / "genome.fa"
    read.write_text(">a\nACGT\n")
    (tmp_path / "link").symlink_to(read)
    os.link(read, tmp_path / "other")
    for name in ("genome.fa", "link", "other", "./genome.fa"):
        with pytest.raises(UserError, match=r"--output .* is a file that is read \(.*genome.fa\): it would be lost"):
            refuse_to_overwrite(tmp_path / name, [None, read], "--output")
    refuse_to_overwrite(tmp_path / "new.tsv", [read, tmp_path / "absent"], "--output")
    refuse_to_overwrite(None, [read], "--output")
    refuse_to_overwrite("/dev/null", ["/dev/null"], "--output")
