"""The picture of tracks: what is averaged, and that it stands where it should."""

import io
from pathlib import Path

import numpy as np
import pytest

from seqssm.cli import main
from seqssm.tasks import track_plots
from seqssm.tasks.track_plots import _averages, tracks_png

HEAD = "record\tstart_bp\tend_bp\tlabel\ta\tb\n"


def table(path: Path) -> Path:
    """400 bp in rows of 50, then 300 bp in rows of 200; the first record's bases 100 to 200 are N."""
    lines = []
    for start in range(0, 400, 50):
        p = start / 400
        cells = "NA\tNA\tNA" if 100 <= start < 200 else f"{'b' if p < 0.5 else 'a'}\t{p:.4f}\t{1 - p:.4f}"
        lines.append(f"one\t{start}\t{start + 50}\t{cells}\n")
    lines += ["two\t0\t200\ta\t1.0000\t0.0000\n", "two\t200\t300\tb\t0.0000\t1.0000\n"]
    path.write_text(HEAD + "".join(lines))
    return path


def test_rows_are_averaged_by_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, means = _averages(table(tmp_path / "t.tsv"), {"one": 400, "two": 300})
    assert labels == ["a", "b"]
    # A column each 100 bp: two rows a column, or a row over two columns.
    np.testing.assert_allclose(means["one"][:, 0], [0.0625, np.nan, 0.5625, 0.8125])
    np.testing.assert_allclose(means["one"].sum(1), [1, np.nan, 1, 1])
    np.testing.assert_allclose(means["two"][:, 1], [0, 0, 1])
    monkeypatch.setattr(track_plots, "COLUMNS", 2)
    np.testing.assert_allclose(_averages(tmp_path / "t.tsv", {"one": 400})[1]["one"][:, 0], [0.0625, 0.6875])


def test_colours_stand_for_classes(tmp_path: Path) -> None:
    from matplotlib.image import imread

    image = imread(io.BytesIO(tracks_png(table(tmp_path / "t.tsv"), {"one": 400, "two": 300})))
    blue, orange = (
        (np.abs(image[..., :3] - np.array(c) / 255).max(-1) < 0.01) for c in ((31, 119, 180), (255, 127, 14))
    )
    height = len(image) // 2
    # In the second record, the first class leads from 0 to 200 bp and the second from 200 to 300: twice the area.
    assert blue[height:].sum() == pytest.approx(2 * orange[height:].sum(), rel=0.05)
    assert 0.2 < blue[:height].sum() / orange[:height].sum() < 5


def test_only_tracks_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.fa").write_text(">x\nACGT\n")
    arguments = ["classify", str(tmp_path / "x.fa"), "--checkpoint", "dna-promoter-tata"]
    assert main([*arguments, "--picture", str(tmp_path / "x.png")]) == 2
    assert "--picture draws what --tracks PREFIX writes" in capsys.readouterr().err
    assert main([*arguments, "--tracks", str(tmp_path / "x"), "--picture", str(tmp_path / "x.gif")]) == 2
    assert "must end in .png" in capsys.readouterr().err
