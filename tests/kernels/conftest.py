import pytest
from guarded import guard_launches
from interpreter import INTERPRET


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, a kernel that reads or writes behind a tensor's memory ends the process."""
    if INTERPRET:
        guard_launches(monkeypatch, "end")
