"""The house: which way imports point, between the three packages, their folders and their modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from places import ROOT

PACKAGES = ("kernels", "model", "mtp_spec")  # from the lowest to the highest
# A module or folder of mtp_spec/ imports only what stands before it; "mtp_spec" is the package's face.
ORDER = """
    errors _version machine console shapes progress text option_checks sampling tree acceptance drafting speculation
    tree_shape stats results handle distributed keywords request cache sequence step scheduler planning host_memory
    memory cpu serving stream prompt analysis cuda weights load_checks backends api loading training mtp_spec evaluation
    chat bench cli __main__
""".split()  # noqa: SIM905  # forty quoted words are no easier to read


def imports(file: Path) -> Iterator[str]:
    """Yields the full names of the project's modules that a file imports, within functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mtp_spec":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mtp_spec")


def place(name: str) -> tuple[str, str]:
    """Returns the package of a module's full name, and its folder or module there."""
    _, *parts = name.split(".")
    package = parts.pop(0) if parts and parts[0] in ("kernels", "model") else "mtp_spec"
    first = parts[0] if parts else package
    known = (ROOT / package / first).is_dir() or (ROOT / package / f"{first}.py").is_file()
    return package, first if known else package


def edges(package: str) -> Iterator[tuple[str, tuple[str, str], Path]]:
    """Yields each import of a package: the folder or module it is in, its place, and the file."""
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT / package).with_suffix("").parts
        here = package if parts == ("__init__",) else parts[0]
        yield from ((here, place(name), file) for name in imports(file) if not name.startswith("mtp_spec.configs"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_to_lower_packages(package: str) -> None:
    for _, (other, _), file in edges(package):
        assert PACKAGES.index(other) <= PACKAGES.index(package), f"{file} imports {other}/"


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_and_modules_have_no_cycles(package: str) -> None:
    graph: dict[str, set[str]] = {}
    for here, (other, name), _ in edges(package):
        if other == package and name != here:
            graph.setdefault(here, set()).add(name)
    TopologicalSorter(graph).prepare()  # raises with the cycle


def test_mtp_spec_is_in_order() -> None:
    found = {file.stem for file in (ROOT / "mtp_spec").glob("*.py")} - {"__init__"}
    found |= {folder.name for folder in (ROOT / "mtp_spec").iterdir() if (folder / "__init__.py").is_file()}
    assert sorted(found) == sorted(set(ORDER) - {"mtp_spec"})
    for here, (other, name), file in edges("mtp_spec"):
        if other == "mtp_spec" and name != here:
            assert ORDER.index(name) < ORDER.index(here), f"{file.relative_to(ROOT)} imports {name}"


def test_the_map_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    folder = Path()
    for name in names:
        if name.startswith(("kernels/", "model/", "mtp_spec/")):
            path = Path(name)
            folder = path if name.endswith("/") and path.parent == Path() else path.parent
        else:
            path = folder / name  # beside the one before
        assert (ROOT / path).exists(), path
    listed = {Path(name).name for name in names}
    left_out = {"__init__", "__main__", "_version", "backends", "console", "errors", "evaluation", "host_memory",
                "keywords", "machine", "option_checks", "progress", "prompt", "shapes", "weights",
                "mtp_spec"}  # fmt: skip
    for name in set(ORDER) - left_out:
        assert name in listed or f"{name}.py" in listed, f"CONTRIBUTING.md does not name {name}"


def test_tests_stand_in_folders_of_the_house() -> None:
    tests, others = ROOT / "tests", {"api", "contract", "house", "loading", "support"}
    assert {file.name for file in tests.glob("*.py")} == {"conftest.py"}
    for folder in {file.parent.relative_to(tests) for file in tests.rglob("test_*.py")}:
        places = (ROOT / folder, ROOT / "mtp_spec" / folder)
        assert folder.name in others or any(place.is_dir() for place in places), f"tests/{folder}"


def test_test_files_import_no_other() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in names if name.split(".")[-1].startswith("test_")], file
