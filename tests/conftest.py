from pathlib import Path

import lightning.pytorch  # noqa: F401 - here, or its log keeps the standard error of the test that imports it first
import pytest
import speller
import torch


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with spelled words and what `seqssm fit` learnt of them; see speller.py."""
    folder = tmp_path_factory.mktemp("speech")
    speller.train(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
