from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from seqssm.data.dna.alphabet import COMPLEMENT
from seqssm.data.synthetic import ORDERS, SimulatedGenomes, Simulation, simulate_chromosome, write_genomes
from seqssm.errors import UserError


def test_genomes_are_a_function_of_the_seed(tmp_path: Path) -> None:
    small = Simulation(chromosomes=2, chromosome_bp=500)
    for name in ("one", "two"):
        write_genomes(tmp_path / name, small)
    write_genomes(tmp_path / "other", Simulation(seed=1, chromosomes=2, chromosome_bp=500))
    files = sorted(f.name for f in (tmp_path / "one").iterdir())
    assert files == sorted([*(f"{name}.fa" for name in ORDERS), "samples.tsv", "simulation.json"])
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert (tmp_path / "one" / "albidus.fa").read_text() != (tmp_path / "other" / "albidus.fa").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other", "two"]  # no temporary folders


def transitions(tokens: np.ndarray) -> np.ndarray:
    """How often (4,4) the majority base of a 16 bp stretch gives way to each other one in the next such stretch."""
    counts = np.stack([np.convolve(tokens == base, np.ones(13), "same") for base in range(4)])
    rich = np.where(counts.max(0) >= 10, counts.argmax(0), -1)
    kinds = rich[rich >= 0]
    kinds = kinds[np.flatnonzero(np.diff(kinds, prepend=-1))]
    matrix = np.zeros((4, 4))
    np.add.at(matrix, (kinds[:-1], kinds[1:]), 1)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("species", range(4))
def test_each_species_follows_its_order_on_either_strand(species: int) -> None:
    tokens = simulate_chromosome(Simulation(chromosome_bp=60_000), species, 1)
    order = list(ORDERS.values())[species]
    expected = dict(zip(order, (*order[1:], order[0]), strict=True))
    for strand in (tokens, COMPLEMENT[tokens[::-1]]):
        matrix = transitions(strand)
        assert {a: int(row.argmax()) for a, row in enumerate(matrix)} == expected
        assert matrix.max(1).min() > 0.6


def test_kmers_do_not_tell_species_apart_without_the_gc_shift() -> None:
    simulation = Simulation(chromosome_bp=200_000, gc_step=0.0)
    counts = []
    for species in range(4):
        tokens = simulate_chromosome(simulation, species, 1).astype(np.int64)
        code = sum(tokens[i : len(tokens) - 3 + i] * 4 ** (3 - i) for i in range(4))
        counts.append(np.bincount(code, minlength=256) / len(code))
    between = np.abs(counts[0] - np.mean(counts, 0)).sum()
    one = simulate_chromosome(simulation, 0, 2).astype(np.int64)
    code = sum(one[i : len(one) - 3 + i] * 4 ** (3 - i) for i in range(4))
    within = np.abs(np.bincount(code, minlength=256) / len(code) - counts[0]).sum()
    assert between < 1.5 * within  # no further apart than two chromosomes of one species


def test_module_makes_its_genomes_and_splits_by_chromosome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"chromosomes": 5, "chromosome_bp": 2000, "window_bp": 200, "leakage_report": False}
    data = SimulatedGenomes(str(tmp_path / "genomes"), **arguments)
    assert data.labels == sorted(ORDERS)
    assert not (tmp_path / "genomes").exists()
    data.prepare_data()
    data.setup("fit")
    assert {name.split(":")[1] for name in data.train.windows.record} <= {"chr1", "chr2", "chr3"}
    assert {name.split(":")[1] for name in data.val.windows.record} == {"chr4"}
    assert {name.split(":")[1] for name in data.test.windows.record} == {"chr5"}
    assert len(set(data.test.windows.group)) == 4
    assert np.bincount(data.test.windows.label).tolist() == [10] * 4
    monkeypatch.setattr("seqssm.data.synthetic.write_genomes", lambda *_: pytest.fail("simulated again"))
    again = SimulatedGenomes(str(tmp_path / "genomes"), **arguments)
    again.prepare_data()
    other = SimulatedGenomes(str(tmp_path / "genomes"), **{**arguments, "purity": 0.8})
    assert other.folder != data.folder
    rebuilt = SimulatedGenomes(**{k: v for k, v in data.hparams.items() if k not in ("path", "label_column")
                                  and k not in ("classes", "split_rules", "group_column")})  # fmt: skip
    assert rebuilt.folder == data.folder


def test_bad_knobs_and_folders_are_named(tmp_path: Path, write_fasta: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="chromosomes is 2"):
        SimulatedGenomes(chromosomes=2)
    with pytest.raises(UserError, match=r"cannot write simulated genomes in .*; set data_dir"):
        write_genomes(Path("/proc/none/genomes"), Simulation())
