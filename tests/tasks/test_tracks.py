"""Rows along a record: what one pass over the whole record says, from any chunks and after a real SIGKILL."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from seqssm import hub
from seqssm.backbone import BackboneConfig, MixerSpec
from seqssm.data.dna.alphabet import reverse_complement
from seqssm.data.dna.indexing import Sequences
from seqssm.errors import UserError
from seqssm.tasks.dna import DNAClassification
from seqssm.tasks.track_files import BedGraphs, EmbeddingFile, ProbabilityTable, Stretches
from seqssm.tasks.tracks import Rows, TrackPlan, Tracks

MAMBA = {"m": MixerSpec(class_path="Mamba", init_args={"d_state": 4})}
MODELS = {
    "causal": {"kmer": 3},
    "causal, one strand": {"motif": 4, "pooling": "mean_max", "average_strands": False},
    "last": {"pooling": "last"},
    "two-way": {"bidirectional": "tied", "kmer": 3, "motif": 5, "motif_layers": 2, "pooling": "mean_max"},
    "strands": {"bidirectional": "tied", "reverse_complement": True, "kmer": 3, "pooling": "mean_max"},
    "composition": {"composition": 3, "average_strands": False},
    "patches": {"bidirectional": "tied", "kmer": 3, "patch": 4, "standardize": True, "pooling": "max"},
}


def make_task(bidirectional: str = "none", reverse_complement: bool = False, **changes) -> DNAClassification:
    torch.manual_seed(0)
    config = BackboneConfig(
        d_model=8,
        n_layers=2,
        mixers=MAMBA,
        bidirectional=bidirectional,
        reverse_complement=reverse_complement,
        backend="torch",
    )
    task = DNAClassification(labels=["a", "b", "c"], backbone=config, **changes)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if name.startswith(("embedding.", "head.")):
                torch.nn.init.normal_(parameter)
            if name.endswith("out_proj.weight"):
                parameter.mul_(4)
        if task.composition is not None:
            torch.nn.init.normal_(task.composition.table[:-1])
            torch.nn.init.normal_(task.composition.bias)
    return task.eval()


def records(seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    letters = {name: rng.choice(list("ACGTacgt"), size) for name, size in (("one", 300), ("two", 37), ("three", 96))}
    letters["one"][100:165] = "N"
    letters["two"][5] = "R"
    return Sequences.from_records((name, "".join(row).encode()) for name, row in letters.items())


class Kept:
    """Keeps rows; what one block said replaces what an interrupted run said."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []

    def write(self, rows: Rows) -> None:
        self.rows.append(rows)

    def mark(self) -> int:
        return len(self.rows)

    def rewind(self, mark: int) -> None:
        del self.rows[mark:]


def rows_of(task, plan: TrackPlan, folder: Path, sequences: Sequences | None = None) -> list[Rows]:
    kept = Kept()
    folder.mkdir(exist_ok=True)
    assert not Tracks(task, sequences or records(), plan, folder, {}).run([kept], snapshot_s=0)
    return kept.rows


def composition(task: DNAClassification, tokens: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """(c,) mean over the k-mers that end from ``start`` to ``end``, k-mer by k-mer."""
    if task.composition is None:
        return torch.zeros(3)
    k, found = task.composition.k, []
    for t in range(max(start, k - 1), min(end, len(tokens))):
        kmer = tokens[t - k + 1 : t + 1].tolist()
        if max(kmer) < 4:
            found.append(task.composition.table[sum(base * 4**i for i, base in enumerate(reversed(kmer)))])
    return (torch.stack(found).mean(0) if found else 0) + task.composition.bias


def expected(task: DNAClassification, tokens: torch.Tensor, plan: TrackPlan) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and embeddings from one pass over the record (1, l), position by position."""
    patch, size = task.patch, plan.bin_bp // task.patch
    length = torch.tensor([tokens.shape[1]])
    passes = []
    for other in (False, True) if plan.both_strands and not task.backbone_config.reverse_complement else (False,):
        read = reverse_complement(tokens) if other and patch == 1 else tokens
        x = task.embedding(read, length, other_strand=other and patch > 1)
        if other and patch > 1:
            x = x.flip(1)  # patches of the same bases, in the order of the other strand
        if task.backbone_config.reverse_complement:
            x = torch.cat([x, task.embedding(tokens, length, other_strand=True)], -1)
        y = task.backbone(x)[0][0].double()
        passes.append(y.flip(0) if other else y)
    positions = len(passes[0])
    bins = -(-positions // size)
    probabilities, embeddings = np.zeros((bins, 3)), np.zeros((bins, 8))
    for b in range(bins):
        own = slice(b * size, min((b + 1) * size, positions))
        near = slice(max(b - plan.side, 0) * size, min((b + plan.side + 1) * size, positions))
        for other, y in enumerate(passes):
            strands = y.chunk(2, -1) if task.backbone_config.reverse_complement else [y]
            vectors = []
            for number, strand in enumerate(strands):
                leftmost = bool(other) or number == 1
                parts = {
                    "mean": [strand[near].mean(0)],
                    "max": [strand[near].amax(0)],
                    "mean_max": [strand[near].mean(0), strand[near].amax(0)],
                    "last": [strand[own][0 if leftmost else -1]],
                }[task.pooling.mode]
                vectors.append(torch.cat(parts))
            pooled = torch.stack(vectors).mean(0).float()[None]
            logits = task.score(pooled) + composition(task, tokens[0], near.start * patch, near.stop * patch)
            probabilities[b] += logits.softmax(-1)[0].numpy() / len(passes)
            embeddings[b] += torch.stack([s[own].mean(0) for s in strands]).mean(0).numpy() / len(passes)
    return probabilities, embeddings


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_rows_are_those_of_one_pass_over_the_record(model: dict, tmp_path: Path) -> None:
    task, sequences = make_task(**model), records()
    pool_bp = 0 if task.pooling.mode == "last" else 40
    for chunk in (16, 40, 1000):
        plan = TrackPlan(bin_bp=8, pool_bp=pool_bp, both_strands=task.average_strands, chunk=chunk)
        rows = rows_of(task, plan, tmp_path / str(chunk))
        assert [r.record for r in rows] == ["one", "two", "three"]
        for record, row in enumerate(rows):
            length = int(sequences.lengths[record])
            tokens = torch.from_numpy(sequences.tokens(record, 0, length))[None]
            with torch.no_grad():
                probabilities, embeddings = expected(task, tokens, plan)
            np.testing.assert_allclose(row.probabilities, probabilities, atol=2e-5)
            np.testing.assert_allclose(row.embeddings, embeddings, atol=2e-5)
            assert row.start_bp.tolist() == list(range(0, length, 8))
            assert row.end_bp.tolist() == [min(a + 8, length) for a in range(0, length, 8)]
        assert np.flatnonzero(rows[0].empty).tolist() == list(range(13, 20))  # bases 104 to 160 are N
        assert not rows[1].empty.any()
        assert not rows[2].empty.any()
        assert sum(p.is_dir() for p in (tmp_path / str(chunk)).iterdir()) == 0


@pytest.mark.parametrize("model", [MODELS["causal"], MODELS["two-way"], MODELS["strands"]])
def test_one_window_over_all_is_what_classify_says_of_the_whole_record(model: dict, tmp_path: Path) -> None:
    task, sequences = make_task(**model), records()
    rows = rows_of(task, TrackPlan(bin_bp=8, pool_bp=10_000, both_strands=True, chunk=32), tmp_path)
    for record, row in enumerate(rows):
        length = int(sequences.lengths[record])
        tokens = torch.from_numpy(sequences.tokens(record, 0, length))[None]
        with torch.no_grad():
            whole = task.predict_proba(tokens, torch.tensor([length]))[0].numpy()
        np.testing.assert_allclose(row.probabilities, np.tile(whole, (len(row.start_bp), 1)), atol=1e-5)


def test_files(tmp_path: Path) -> None:
    files = [kind(tmp_path, ["x y", "z"]) for kind in (ProbabilityTable, BedGraphs, Stretches)]
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.25, 0.75], [0.3, 0.7]])
    empty = np.array([False, False, True, False, False])
    start = np.arange(0, 50, 10)
    end = np.array([10, 20, 30, 40, 45])
    nothing = np.zeros((5, 1))
    for first, last in ((0, 2), (2, 5)):  # a stretch may go on in the next block
        part = slice(first, last)
        block = Rows("r", first, start[part], end[part], p[part], empty[part], nothing[part])
        for file in files:
            file.write(block)
            if first == 0:
                again = file.mark()
                file.write(block)  # as a killed process may have
                file.rewind(again)
    other = Rows("s", 5, start[:1], end[:1], p[:1], empty[:1], nothing[:1])
    for file in files:
        file.write(other)
    files[2].finish()
    for file in files:
        file.mark()
    lines = (tmp_path / "tracks.tsv").read_text().splitlines()
    assert lines[0] == "record\tstart_bp\tend_bp\tlabel\tx y\tz"
    assert lines[1] == "r\t0\t10\tx y\t0.9000\t0.1000"
    assert lines[3] == "r\t20\t30\tNA\tNA\tNA"
    assert len(lines) == 7
    assert (tmp_path / "z.bedgraph").read_text().splitlines()[2] == "r\t30\t40\t0.7500"
    assert (tmp_path / "x_y.bedgraph").exists()
    # 0.75 over 10 bp and 0.7 over 5 are 0.7333 on average.
    assert (tmp_path / "tracks.bed").read_text() == ("r\t0\t20\tx y\t850\nr\t30\t45\tz\t733\ns\t0\t10\tx y\t900\n")


@pytest.mark.parametrize("name", ["e.npy", "e.zarr"])
def test_embeddings_of_all_records_are_one_array(name: str, tmp_path: Path) -> None:
    if name.endswith("zarr"):
        zarr = pytest.importorskip("zarr")
    task, sequences, folder = make_task(**MODELS["two-way"]), records(), tmp_path / "partial"
    folder.mkdir()
    tracks = Tracks(task, sequences, TrackPlan(8, 8, False, 64), folder, {})
    file, kept = EmbeddingFile(tmp_path / name, folder, sequences, tracks.bins, 8, 8, "float16"), Kept()
    tracks.run([file, kept])
    file.finish()
    array = np.load(tmp_path / name) if name.endswith("npy") else zarr.open_array(tmp_path / name, mode="r")[:]
    assert array.dtype == np.float16
    np.testing.assert_array_equal(array, np.concatenate([r.embeddings for r in kept.rows]).astype(np.float16))
    table = [line.split("\t") for line in (tmp_path / f"{name}.tsv").read_text().splitlines()]
    assert table == [
        ["record", "first_row", "rows", "bin_bp"],
        ["one", "0", "38", "8"],
        ["two", "38", "5", "8"],
        ["three", "43", "12", "8"],
    ]


def test_refusals(tmp_path: Path) -> None:
    def refuse(message: str, task: DNAClassification, **plan) -> None:
        with pytest.raises(UserError, match=message):
            Tracks(
                task, records(), TrackPlan(**{"bin_bp": 8, "pool_bp": 0, "both_strands": True, **plan}), tmp_path, {}
            )

    refuse("aligned windows", make_task(positions=64))
    refuse("aligned windows", make_task(pool_bins=2))
    refuse("multiple of the model's patch, 4 bp", make_task(patch=4), bin_bp=6)
    refuse("its last position's", make_task(pooling="last"), pool_bp=64)
    refuse("give a shorter one", make_task(), bin_bp=1 << 20)
    refuse("make the rows longer", make_task(), bin_bp=1, pool_bp=1 << 20)
    rows_of(make_task(), TrackPlan(8, 0, True), tmp_path / "run")
    with pytest.raises(UserError, match="another plan"):
        Tracks(make_task(), records(), TrackPlan(16, 0, True), tmp_path / "run", {}).run([Kept()])


# One process that imports everything and computes nothing; each run is a fork of it.
RUNS = """
import os, signal, sys, time
from pathlib import Path
import seqssm.tasks.tracks as tracks
from seqssm.cli import main
import seqssm.commands.classify

tracks.BLOCK_BINS = 64  # several blocks of rows a record
run = tracks.Tracks.run
tracks.Tracks.run = lambda self, files, advance=None, snapshot_s=None: run(self, files, advance, 0.0)
folder, arguments = Path(sys.argv[1]), sys.argv[2:]

def start(name):
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        code = main([*arguments, "--tracks", str(folder / name), "--embeddings", str(folder / f"{name}.npy")])
        sys.stdout.flush()
        os._exit(code)
    return process

assert os.waitpid(start("whole"), 0)[1] == 0
# In the second view, between sweeps; while rows are written; in the second record.
for wait_for in ("record0-1/x1-12.safetensors", "tracks.tsv", "record1-0/x1-12.safetensors"):
    process, path = start("killed"), folder / "killed.partial" / wait_for
    while os.waitpid(process, os.WNOHANG)[0] == 0:
        if path.exists() and path.stat().st_size > 0:
            os.kill(process, signal.SIGKILL)
            print("killed", os.waitpid(process, 0)[1] == signal.SIGKILL, flush=True)
            break
        time.sleep(0.001)
sys.exit(os.waitpid(start("killed"), 0)[1] != 0)
"""


def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    task = make_task(**MODELS["two-way"])
    checkpoint = hub.save(tmp_path / "model", task.describe() | {"data": {}}, task.state_dict())
    rng = np.random.default_rng(0)
    fasta = tmp_path / "genome.fa"
    fasta.write_text("".join(f">chr{i}\n{''.join(rng.choice(list('ACGTN'), 6000))}\n" for i in range(2)))
    arguments = ["classify", str(fasta), "--checkpoint", str(checkpoint), "--device", "cpu", "--bin-bp", "8"]
    arguments += ["--chunk", "256", "--window-bp", "64"]
    runs = subprocess.run(
        [sys.executable, "-c", RUNS, str(tmp_path), *arguments],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert runs.returncode == 0, runs.stderr
    assert runs.stdout.count("killed True") == 3, runs.stdout
    assert runs.stderr.count("going on with the run in") == 3
    for suffix in (".tsv", ".bed", ".a.bedgraph", ".b.bedgraph", ".c.bedgraph", ".npy", ".npy.tsv"):
        whole, killed = (tmp_path / f"{name}{suffix}" for name in ("whole", "killed"))
        assert whole.stat().st_size > 0
        assert whole.read_bytes() == killed.read_bytes(), suffix
    assert not (tmp_path / "killed.partial").exists()
