"""If this fails, a library has dropped a private name that a file of `compat` uses, or another file uses one."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qlora_dist"
COMPAT = PACKAGE / "compat"
LIBRARIES = {"torch", "transformers", "peft", "bitsandbytes", "deepspeed"}
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
ALLOWED_ATTRIBUTES = {"os._exit", "sys._current_frames"}
"""Names of the standard library, which documents both."""


def declared_names(path: Path, *, optional: bool) -> list[str]:
    """Return what a file declares, without importing it, because an import may fail for lack of a name."""
    names: list[str] = []
    for node in TREES[path].body:
        constant = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if constant.endswith("PRIVATE_NAMES") and (optional or not constant.startswith("OPTIONAL")):
            names += ast.literal_eval(node.value)
    return names


DECLARED = [(path, name) for path in TREES if path.parent == COMPAT for name in declared_names(path, optional=False)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def library_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the module and the name of each import from one of the libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from ((module, name) for module, name in imported if module.partition(".")[0] in LIBRARIES)


def own_names(tree: ast.AST) -> set[str]:
    """Return the names that a file defines, attributes of `self` included."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return own


OWN_NAMES = {path: own_names(tree) for path, tree in TREES.items()}
NAMES_OF_THE_PACKAGE = set().union(*OWN_NAMES.values())


def foreign_private_attributes(path: Path) -> Iterator[str]:
    """Yield private attributes, also those given as strings, that are not the package's own.

    An attribute of `self` may be defined in another file, where the parent class is.
    """
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            own = NAMES_OF_THE_PACKAGE if ast.unparse(node.value) == "self" else OWN_NAMES[path]
            if node.attr not in own:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield ast.unparse(node)


def provides(name: str) -> bool:
    """Whether a library has a dotted name: as an attribute, or in the source of the module or class before it."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
            break
        except ImportError:
            continue
    for part in parts[length:-1]:
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    if hasattr(owner, parts[-1]):
        return True
    try:
        words = ast.walk(ast.parse(inspect.cleandoc("\n" + inspect.getsource(owner))))
    except (OSError, TypeError):
        return False
    used = {
        getattr(node, "attr", getattr(node, "value", None))
        for node in words
        if isinstance(node, ast.Attribute | ast.Constant)
    }
    return parts[-1] in used


@pytest.mark.parametrize(("path", "name"), DECLARED, ids=[name for _, name in DECLARED])
def test_the_library_has_the_private_name(path: Path, name: str) -> None:
    library = name.partition(".")[0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    assert provides(name), (
        f"{library} {metadata.version(library)}: {name} is gone; change {path.relative_to(PACKAGE.parent)}"
    )


@pytest.mark.parametrize("path", [path for path in TREES if path.parent == COMPAT], ids=lambda path: path.name)
def test_a_file_declares_the_private_names_that_it_uses(path: Path) -> None:
    declared = declared_names(path, optional=True)
    used = {name.rpartition(".")[2] for name in foreign_private_attributes(path) if "(" not in name}
    assert used <= {name.rpartition(".")[2] for name in declared}
    for module, name in library_imports(TREES[path]):
        if any(map(is_private, [*module.split("."), name])):
            assert f"{module}.{name}" in declared


def test_other_files_use_no_private_name_of_a_library() -> None:
    uses = []
    for path, tree in TREES.items():
        if path.parent == COMPAT:
            continue
        place = path.relative_to(PACKAGE)
        uses += [f"{place}: {name}" for name in foreign_private_attributes(path) if name not in ALLOWED_ATTRIBUTES]
        uses += [
            f"{place}: {module} {name}"
            for module, name in library_imports(tree)
            if any(map(is_private, [*module.split("."), name]))
        ]
    assert not uses


def test_only_compat_imports_peft_bitsandbytes_and_deepspeed() -> None:
    """PEFT imports bitsandbytes, which `compat/bitsandbytes.py` has to import first."""
    wrapped = ("peft", "bitsandbytes", "deepspeed")
    users = [
        f"{path.relative_to(PACKAGE)}: {module}"
        for path, tree in TREES.items()
        if path.parent != COMPAT
        for module, _ in library_imports(tree)
        if module.partition(".")[0] in wrapped
    ]
    assert not users


@pytest.mark.parametrize("name", ["torch._no_such_name", "torch.nn.Module._no_such_name", "torch._no_such.module.name"])
def test_a_name_that_is_gone_is_noticed(name: str) -> None:
    assert not provides(name)
