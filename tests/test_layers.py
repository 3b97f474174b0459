"""Imports point one way: kernels <- seqssm <- tasks <- the command line; data stands apart."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"seqssm": "seqssm", "kernels": "seqssm.kernels", "tasks": "seqssm.tasks", "data": "seqssm.data"}
# What each layer may import of the project. The command line may import everything.
ALLOWED = {
    "leaf": {"leaf"},
    "kernels": {"kernels", "leaf"},
    "data": {"data", "leaf"},
    "model": {"kernels", "model", "leaf"},
    "tasks": {"kernels", "model", "tasks", "data", "leaf"},
    "cli": {"kernels", "model", "tasks", "data", "leaf", "cli"},
}


def layer(module: str) -> str:
    """Layer of a dotted module name of the project."""
    parts = module.split(".")
    if parts == ["seqssm"]:  # the front door
        return "cli"
    if len(parts) > 1 and parts[1] in ("kernels", "tasks", "data"):
        return parts[1]
    if len(parts) > 1 and parts[1] in ("errors", "files"):
        return "leaf"
    if len(parts) > 1 and parts[1] in ("cli", "commands", "serving", "__main__"):
        return "cli"
    return "model"


def project_imports(path: Path, module: str) -> set[str]:
    """Dotted names of the project's modules that a file imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "seqssm" else {base}
    return {name for name in found if name.split(".")[0] == "seqssm" and name != "seqssm.__version__"}


MODULES = {
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for folder, package in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    back = {
        name
        for name in project_imports(MODULES[module], module)
        if layer(name) not in ALLOWED[layer(module)] and name != "seqssm"
    }
    assert not back, f"{module} ({layer(module)}) imports {sorted(back)}"


def test_the_walk_sees_imports(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import seqssm.tasks.dna\nfrom seqssm import cli\ndef f():\n    from ..data import x\n")
    assert project_imports(file, "seqssm.kernels.ssd.op") == {"seqssm.tasks.dna", "seqssm.cli", "seqssm.kernels.data"}
    assert layer("seqssm.tasks.dna") not in ALLOWED["kernels"]


def test_every_package_is_shipped() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    code = {m for m, path in MODULES.items() if path.name == "__init__.py"}
    assert listed == code | {"seqssm.configs"}
