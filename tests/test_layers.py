"""If this fails, a room imports one that stands above it, and the next change of either drags the other along."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qlora_dist"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def rooms() -> list[str]:
    """Return the rooms in the order of the table in docs/architecture.md, the lowest first."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## Rooms")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([\w.]+)` \|", table, re.M)


def room_of(path: Path) -> str:
    """Return the folder of a file; a file beside the folders is a room of its own."""
    return path.relative_to(PACKAGE).parts[0]


def imports(path: Path, *, top_only: bool = False) -> Iterator[Path]:
    """Yield the files of the package that a file imports, those within functions and conditions included."""
    nodes = TREES[path].body if top_only else list(ast.walk(TREES[path]))
    for node in nodes:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] != "qlora_dist":
                continue
            while not (file := ROOT.joinpath(*parts).with_suffix(".py")).exists():
                file = ROOT.joinpath(*parts) / "__init__.py"
                if file.exists():
                    break
                parts.pop()
            yield file


def test_the_table_lists_the_rooms() -> None:
    existing = {room_of(path) for path in FILES} - {"__main__.py"}
    listed = rooms()
    assert len(listed) == len(set(listed))
    assert set(listed) == existing


def test_rooms_import_only_rooms_below_themselves() -> None:
    rank = {room: number for number, room in enumerate(rooms())} | {"__main__.py": 10_000}
    upward = [
        f"{path.relative_to(PACKAGE)} -> {target.relative_to(PACKAGE)}"
        for path in FILES
        for target in imports(path)
        if rank[room_of(target)] > rank[room_of(path)]
    ]
    assert not upward


def test_no_files_import_each_other_in_a_circle() -> None:
    waiting = {path: {file for file in imports(path) if file != path} for path in FILES}
    while ready := [path for path, needed in waiting.items() if not needed & waiting.keys()]:
        for path in ready:
            del waiting[path]
    assert not [str(path.relative_to(PACKAGE)) for path in waiting]


def test_kernels_of_the_cpu_are_imported_where_a_tensor_is_on_the_cpu() -> None:
    """Files outside `cpu` and `trace` import them within a function, behind a test of the device."""
    early = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if room_of(path) not in ("cpu", "trace")
        and any(room_of(file) == "cpu" for file in imports(path, top_only=True))
    ]
    assert not early
    fakes = [path for path in FILES if "FakeTensor" in path.read_text()]
    assert {room_of(path) for path in fakes} == {"compat", "trace"}


def test_no_public_name_or_constant_is_defined_twice() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            names: list[str] = []
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                places[name].append(str(path.relative_to(PACKAGE)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


@pytest.mark.parametrize("folder", ["qlora_dist"])
def test_no_two_files_have_one_name(folder: str) -> None:
    stems = Counter(path.stem for path in (ROOT / folder).rglob("*.py") if not path.stem.startswith("__"))
    assert not [stem for stem, count in stems.items() if count > 1]
