from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _cache_in_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def random_dna() -> Callable[..., str]:
    def make(length: int, seed: int = 0, letters: str = "ACGT") -> str:
        return "".join(np.random.default_rng(seed).choice(list(letters), length))

    return make


@pytest.fixture
def write_fasta(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, records: dict[str, str], width: int = 60) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for title, letters in records.items():
            lines.append(f">{title} described")
            lines += [letters[at : at + width] for at in range(0, len(letters), width)]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
