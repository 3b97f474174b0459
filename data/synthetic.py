"""Simulated genomes, written as real files: what tells the species apart is order, which counting cannot see.

Every genome is a chain of tracts with neutral spacers between them. A tract is rich in one base; all four kinds are
equally common in every species. The species differ in which kind follows which: one cyclic order each, of the four (of
six) that equal their own reverse complement, so that either strand tells the same. Spacers are longer than a k-mer, so
that no k-mer sees two tracts: up to chance, k-mer counts differ between species only through the spacers' GC content,
which is shifted a little from species to species (`gc_step`). A network has to see about 80 bp at once.
"""

import json
import os
import shutil
import tempfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seqssm.data.dna.datamodule import DNADataModule
from seqssm.errors import UserError

# Cyclic orders of A C G T (as 0 1 2 3) that are their own reverse complement: GCAT, GCTA, GATC, GTAC.
ORDERS = {"albidus": (2, 1, 0, 3), "borealis": (2, 1, 3, 0), "cinereus": (2, 0, 3, 1), "dorsalis": (2, 3, 0, 1)}
LINE_BP = 80


@dataclass(frozen=True)
class Simulation:
    """The knobs of the simulated genomes.

    chromosomes, chromosome_bp: of every species. tract_bp, spacer_bp: shortest and longest, both included.
    purity: share of a tract's bases that are its own base. fidelity: share of tracts whose successor follows the
    species' order; the others are followed by any kind. gc_step: difference in spacer GC content between species.
    """

    seed: int = 0
    chromosomes: int = 10
    chromosome_bp: int = 25_000
    tract_bp: tuple[int, int] = (20, 30)
    spacer_bp: tuple[int, int] = (40, 56)
    purity: float = 0.9
    fidelity: float = 0.95
    gc_step: float = 0.015


def simulate_chromosome(simulation: Simulation, species: int, chromosome: int) -> np.ndarray:
    """Tokens (chromosome_bp,) uint8, a function of the seed, the species' and the chromosome's number."""
    rng = np.random.default_rng([simulation.seed, species, chromosome])
    order = list(ORDERS.values())[species]
    successor = np.empty(4, np.int64)
    successor[list(order)] = np.roll(order, -1)
    length = simulation.chromosome_bp
    count = length // (simulation.tract_bp[0] + simulation.spacer_bp[0]) + 1
    strays = rng.random(count) >= simulation.fidelity
    anywhere = rng.integers(0, 4, count)
    kinds = np.empty(count, np.int64)
    kind = int(rng.integers(0, 4))
    for i in range(count):
        kinds[i] = kind
        kind = int(anywhere[i] if strays[i] else successor[kind])
    lengths = np.empty(2 * count, np.int64)  # tract, spacer, tract, spacer, ...
    lengths[::2] = rng.integers(*simulation.tract_bp, count, endpoint=True)
    lengths[1::2] = rng.integers(*simulation.spacer_bp, count, endpoint=True)
    owner = np.repeat(np.arange(2 * count), lengths)[:length]
    in_tract = owner % 2 == 0
    tract = np.where(rng.random(length) < simulation.purity, kinds[owner // 2], rng.integers(0, 4, length))
    gc = 0.5 + simulation.gc_step * (species - (len(ORDERS) - 1) / 2)
    is_gc, second = rng.random(length) < gc, rng.integers(0, 2, length)
    spacer = np.where(is_gc, 1 + second, 3 * second)
    return np.where(in_tract, tract, spacer).astype(np.uint8)


def write_genomes(folder: Path, simulation: Simulation) -> None:
    """Write one FASTA file a species and `samples.tsv` (path, species), all at once or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(f"cannot write simulated genomes in {folder.parent}: {error.strerror}; set data_dir") from error
    try:
        rows = ["path\tspecies"]
        for number, species in enumerate(ORDERS):
            rows.append(f"{species}.fa\t{species}")
            with open(temporary / f"{species}.fa", "wb") as file:
                for chromosome in range(1, simulation.chromosomes + 1):
                    tokens = simulate_chromosome(simulation, number, chromosome)
                    letters = np.frombuffer(b"ACGT", np.uint8)[tokens].tobytes()
                    lines = [letters[at : at + LINE_BP] for at in range(0, len(letters), LINE_BP)]
                    file.write(f">chr{chromosome} simulated {species}\n".encode() + b"\n".join(lines) + b"\n")
        (temporary / "samples.tsv").write_text("\n".join(rows) + "\n")
        (temporary / "simulation.json").write_text(json.dumps(asdict(simulation), indent=2) + "\n")
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "samples.tsv").exists():  # unless another process was first, with the same content
                raise
    except OSError as error:
        raise UserError(f"cannot write simulated genomes in {folder.parent}: {error.strerror}; set data_dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class SimulatedGenomes(DNADataModule):
    """`DNADataModule` over genomes that are simulated where they do not exist yet; four species, split by chromosome.

    The last fifth of the chromosomes is the test split, the fifth before it validation. The knobs are those of
    `Simulation`; the others go to `DNADataModule`. Files lie in a folder of `data_dir` named by the knobs, by default
    under `$XDG_CACHE_HOME/seqssm/simulated`.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        simulation_seed: int = 0,
        chromosomes: int = 10,
        chromosome_bp: int = 25_000,
        tract_bp: tuple[int, int] = (20, 30),
        spacer_bp: tuple[int, int] = (40, 56),
        purity: float = 0.9,
        fidelity: float = 0.95,
        gc_step: float = 0.015,
        **kwargs: Any,
    ) -> None:
        self.simulation = Simulation(
            simulation_seed, chromosomes, chromosome_bp, tract_bp, spacer_bp, purity, fidelity, gc_step
        )
        if chromosomes < 5:
            raise UserError(f"chromosomes is {chromosomes}: five at least, to hold some out")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqssm" / "simulated"
        key = zlib.crc32(json.dumps(asdict(self.simulation), sort_keys=True).encode())
        self.folder = (Path(data_dir) if data_dir else cache) / f"genomes-{key:08x}"
        fifth = chromosomes // 5
        test = "|".join(str(n) for n in range(chromosomes - fifth + 1, chromosomes + 1))
        val = "|".join(str(n) for n in range(chromosomes - 2 * fifth + 1, chromosomes - fifth + 1))
        super().__init__(
            path=str(self.folder / "samples.tsv"),
            label_column="species",
            classes=sorted(ORDERS),
            split_rules=[
                {"split": "test", "record": f"chr({test})"},
                {"split": "val", "record": f"chr({val})"},
                {"split": "train"},
            ],
            group_column="record",
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Simulate the genomes unless their files are there, then index them."""
        if not (self.folder / "samples.tsv").exists():
            write_genomes(self.folder, self.simulation)
        super().prepare_data()
