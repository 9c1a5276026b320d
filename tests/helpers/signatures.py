"""Limits on the size of functions and on their signatures, as a checker.

Run `python -m tests.helpers.signatures [path ...]` to print the violations in some files or folders.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

MOST_LINES = 80
MOST_PARAMETERS = 7
MOST_FIELDS = 4
"""Fields of a dataclass that may be given by position."""

OPERATORS = ("custom_op", "register_fake", "staticmethod", "command", "callback")
"""Decorators of operators, of autograd functions and of commands, whose signatures others prescribe."""
PRESCRIBED = (
    "attention_forward",
    "__call__",
    "forward",
    "all_gather",
    "on_finalized_text",
    "apply_chat_template",
    "loglikelihood",
    "loglikelihood_rolling",
    "generate_until",
    "construct_object",
    "construct_mapping",
)
"""Ends of the names of functions that torch, transformers, DeepSpeed, PyYAML or lm-evaluation-harness call."""


def is_prescribed(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a library, the command line or pytest prescribes the signature."""
    text = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return any(name in text for name in OPERATORS) or node.name.endswith(PRESCRIBED) or node.name.startswith("test_")


def violations(root: Path, chosen: Iterable[str] = ("qlora_dist",)) -> Iterator[str]:
    """Yield a line for each function or dataclass that exceeds a limit."""
    for name in chosen:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                place = f"{file.relative_to(root)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield from (f"{place}: {node.name}: {problem}" for problem in function_problems(node))
                elif isinstance(node, ast.ClassDef) and (problem := dataclass_problem(node)):
                    yield f"{place}: {node.name}: {problem}"


def function_problems(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield what is wrong with one function."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if lines > MOST_LINES:
        yield f"{lines} lines"
    if is_prescribed(node):
        return
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    if positional and positional[0].arg in ("self", "cls", "ctx"):
        positional = positional[1:]
    if len(positional) + len(arguments.kwonlyargs) > MOST_PARAMETERS:
        yield f"{len(positional) + len(arguments.kwonlyargs)} parameters"
    if len(positional) > 1:
        yield from (
            f"boolean by position: {argument.arg}"
            for argument in positional
            if argument.annotation is not None and ast.unparse(argument.annotation) == "bool"
        )


def dataclass_problem(node: ast.ClassDef) -> str | None:
    """Return what is wrong with a dataclass; None if nothing is, or if it is not one."""
    for decorator in node.decorator_list:
        text = ast.unparse(decorator)
        if not text.startswith(("dataclass", "dataclasses.dataclass")):
            continue
        fields = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
        fields = [field for field in fields if "ClassVar" not in ast.unparse(field.annotation)]
        if len(fields) > MOST_FIELDS and "kw_only=True" not in text:
            return f"{len(fields)} fields by position"
    return None


if __name__ == "__main__":
    found = list(violations(Path.cwd(), sys.argv[1:] or ("qlora_dist",)))
    print("\n".join(found))
    print(f"{len(found)} violations")
