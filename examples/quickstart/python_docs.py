"""An instruction data set from the documentation that every Python includes.

It has three sources:

- the language reference that `help()` shows (`pydoc_data.topics`);
- docstrings of the standard library, parsed because importing some modules opens windows or prints poems;
- docstrings of a few modules written in C, which have no source to parse and are safe to import.

A pair is a question about one name and its documented answer. The pairs depend on the Python that runs this. All other
choices depend on hashes, so that the same Python writes the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_dist.errors import UserError

MIN_ANSWER_CHARS, MAX_ANSWER_CHARS = 30, 900
"""Limits on the characters of an answer, because short ones have no content and long ones fill a training row."""
MIN_PAIRS = 1500
EVAL_FRACTION = 0.05
MAX_EVAL_NAMES = 48
"""Number of held-out names. They fill 12 packed rows of 512 tokens, so an evaluation takes seconds on a CPU."""

SKIPPED_MODULES = frozenset(
    {
        *("test", "tests", "idlelib", "lib2to3", "distutils", "turtledemo", "turtle", "tkinter", "ensurepip"),
        *("antigravity", "this", "encodings", "msilib", "pydoc_data", "site-packages", "nturl2path", "ntpath"),
    }
)
"""Tests, tools, and modules with the docstrings of another one, such as ntpath and posixpath."""
C_MODULES = (
    *("builtins", "sys", "math", "cmath", "itertools", "functools", "operator", "collections", "time", "array"),
    *("binascii", "zlib", "struct", "unicodedata", "os", "re", "gc", "select", "signal", "bisect", "heapq"),
    "datetime",
)

DocKind = Literal["function", "class", "module", "topic"]

QUESTION_TEMPLATES: dict[DocKind, tuple[str, ...]] = {
    "function": (
        "What does `{name}` do?",
        "What is `{name}` for in Python?",
        "How do I use Python's `{name}`?",
        "Explain `{name}`.",
        "I saw a call of `{name}` in some code. What does it do?",
        "Describe the function `{name}` of the standard library.",
    ),
    "class": (
        "What is the class `{name}`?",
        "What is `{name}` in Python?",
        "When would I use `{name}`?",
        "Explain the class `{name}`.",
    ),
    "module": (
        "What is the module `{name}` for?",
        "What does Python's `{name}` module offer?",
        "Introduce the module `{name}`.",
    ),
    "topic": (
        "Explain this topic of the Python language: {name}",
        "What does the Python reference say about this: {name}",
        "Tell me about Python: {name}",
        "In Python, how does this work: {name}",
    ),
}


@dataclass(frozen=True)
class DocEntry:
    """A documented name with its signature (`header`, empty for a topic) and its documentation (`body`)."""

    kind: DocKind
    name: str
    header: str
    body: str

    @property
    def question(self) -> str:
        """Return one of the kind's questions, always the same for a name."""
        templates = QUESTION_TEMPLATES[self.kind]
        return templates[int(_digest(self.name)[:8], 16) % len(templates)].format(name=self.name)

    @property
    def answer(self) -> str:
        """Return the signature and the documentation."""
        return f"`{self.header}`\n\n{self.body}" if self.header else self.body


@dataclass(frozen=True)
class PairCounts:
    """Numbers of pairs written."""

    train: int
    held_out: int


def build_python_docs(folder: Path) -> PairCounts:
    """Write `train.jsonl` and `eval.jsonl` into `folder`, and replace existing files.

    Raises:
        UserError: This Python has no documentation.
    """
    train, eval_entries = split_doc_entries(collect_doc_entries())
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "eval.jsonl", eval_entries)
    _write(folder / "train.jsonl", train)
    return PairCounts(len(train), len(eval_entries))


def collect_doc_entries() -> list[DocEntry]:
    """Return every usable entry of this Python, no two with the same name or the same first paragraph."""
    chosen: list[DocEntry] = []
    seen: set[str] = set()
    # the first of two equal texts is kept, because the reference contains more than a docstring
    for source in (_topics(), _parsed_library(), _imported_library()):
        for entry in sorted(source, key=lambda entry: (entry.name, entry.header, entry.body)):
            # compare first paragraphs, because many methods share their summary and differ in a footnote. Training on
            # one would reveal the other in the held-out rows.
            first_paragraph = re.sub(r"\W+", " ", entry.body.split("\n\n")[0]).strip().lower()
            keys = {f"name {entry.name}", f"text {first_paragraph}"}
            if (
                keys & seen
                or not MIN_ANSWER_CHARS <= len(entry.answer) <= MAX_ANSWER_CHARS
                or len(entry.body) < MIN_ANSWER_CHARS
            ):
                continue
            seen |= keys
            chosen.append(entry)
    if len(chosen) < MIN_PAIRS:
        raise UserError(
            f"this Python ({sys.executable}) has only {len(chosen)} documented names, and {MIN_PAIRS} are needed, "
            "because its standard library was installed without sources; use a complete CPython"
        )
    return chosen


def split_doc_entries(pairs: Iterable[DocEntry]) -> tuple[list[DocEntry], list[DocEntry]]:
    """Return training and held-out entries, both in the order of a hash of their content."""
    ordered = sorted(pairs, key=lambda entry: _digest(entry.question + entry.answer))
    by_name = sorted(ordered, key=lambda entry: _digest(f"split {entry.name}"))
    eval_names = {entry.name for entry in by_name[: min(int(len(ordered) * EVAL_FRACTION), MAX_EVAL_NAMES)]}
    return (
        [entry for entry in ordered if entry.name not in eval_names],
        [entry for entry in ordered if entry.name in eval_names],
    )


def _write(path: Path, chosen: list[DocEntry]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for entry in chosen:
            messages = [{"role": "user", "content": entry.question}, {"role": "assistant", "content": entry.answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    temporary.replace(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- the language reference

_UNDERLINE = re.compile(r"^([*=\-~^#])\1{3,}$")
_DEFINITION = re.compile(r"^(?:class |static |classmethod |async )?([A-Za-z_][\w.]*)\((.*)\)$")


def _topics() -> Iterator[DocEntry]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # missing in some distributions of Python
        return
    for key in sorted(topics):
        lines = topics[key].splitlines()
        yield from _sections(lines)
        yield from _definitions(lines)


def _sections(lines: list[str]) -> Iterator[DocEntry]:
    """Yield each heading with the text up to the next heading or definition."""
    for index in range(len(lines) - 1):
        title = lines[index].strip()
        if not title or not _UNDERLINE.match(lines[index + 1]):
            continue
        text: list[str] = []
        for position in range(index + 2, len(lines)):
            following = lines[position + 1] if position + 1 < len(lines) else ""
            if _UNDERLINE.match(following) or _DEFINITION.match(lines[position]):
                break
            text.append(lines[position])
        yield DocEntry("topic", title, "", _leading_paragraphs("\n".join(text), 0))


def _definitions(lines: list[str]) -> Iterator[DocEntry]:
    """Yield each definition, such as `str.split(sep=None)` at the left margin, with the indented text below it."""
    for index, line in enumerate(lines):
        match = _DEFINITION.match(line)
        if not match:
            continue
        text: list[str] = []
        for below in lines[index + 1 :]:
            if below and not below.startswith("   "):
                break
            text.append(below)
        header = line if len(line) <= 100 else f"{match[1]}(...)"
        kind: DocKind = "class" if line.startswith("class ") else "function"
        yield DocEntry(kind, match[1], header, _leading_paragraphs(textwrap.dedent("\n".join(text)), len(header)))


# ---------------------------------------------------------------- docstrings in sources


def _parsed_library() -> Iterator[DocEntry]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not parts or parts[0] not in sys.stdlib_module_names:
            continue
        if any(part in SKIPPED_MODULES or part.startswith("_") for part in parts):
            continue
        name = "os.path" if parts == ("posixpath",) else ".".join(parts)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a deliberately broken file, or one for another version
            continue
        if text := ast.get_docstring(tree):
            yield DocEntry("module", name, f"import {name}", _leading_paragraphs(text, len(name) + 7))
        yield from _parsed_members(tree, name, is_class=False)


def _parsed_members(node: ast.Module | ast.ClassDef, prefix: str, *, is_class: bool) -> Iterator[DocEntry]:
    for child in node.body:
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        text = ast.get_docstring(child)
        if isinstance(child, ast.ClassDef):
            if text:
                yield DocEntry("class", name, f"class {name}", _leading_paragraphs(text, len(name) + 6))
            yield from _parsed_members(child, name, is_class=True)
        elif text:
            header = name if _is_property(child) else f"{name}({_arguments(child, is_class=is_class)})"
            header = header if len(header) <= 100 else f"{name}(...)"
            yield DocEntry("function", name, header, _leading_paragraphs(text, len(header)))


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {ast.unparse(decorator).split(".")[-1] for decorator in function.decorator_list}
    return bool(names & {"property", "cached_property", "setter", "DynamicClassAttribute"})


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef, *, is_class: bool) -> str:
    arguments = function.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None  # types make the line long, and the model would guess them
    for variadic in (arguments.vararg, arguments.kwarg):
        if variadic:
            variadic.annotation = None
    parts = ast.unparse(arguments).split(", ")
    if is_class and parts[0] in ("self", "cls"):
        parts = parts[1:]
    return ", ".join(parts[1:] if parts[:1] == ["/"] else parts)


# ---------------------------------------------------------------- docstrings of modules in C


def _imported_library() -> Iterator[DocEntry]:
    for module_name in C_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # not every platform has modules such as select
            continue
        public = getattr(module, "__all__", None) or dir(module)
        for attribute in sorted(set(public)):
            value = getattr(module, attribute, None)
            if attribute.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            if attribute != value.__name__:  # an alias, such as array.ArrayType and os.error
                continue
            name = attribute if module_name == "builtins" else f"{module_name}.{attribute}"
            yield from _imported(value, name)
            if inspect.isclass(value):
                for method, function in sorted(vars(value).items()):
                    if not method.startswith("_") and inspect.isroutine(function):
                        yield from _imported(function, f"{name}.{method}")


def _imported(value: object, name: str) -> Iterator[DocEntry]:
    text = value.__doc__
    if not isinstance(text, str):
        return
    text = inspect.cleandoc(text)
    if inspect.isclass(value):
        yield DocEntry("class", name, f"class {name}", _leading_paragraphs(text, len(name) + 6))
        return
    try:
        signature = str(inspect.signature(value)) if callable(value) else "(...)"
    except (ValueError, TypeError):
        signature = "(...)"
    signature = re.sub(r"\(\$?self, /(, )?|\(\$?self(, )?", "(", signature)
    header = name + signature if len(signature) <= 80 else f"{name}(...)"
    yield DocEntry("function", name, header, _leading_paragraphs(text, len(header)))


# ---------------------------------------------------------------- text

_SIGNATURE_LINES = re.compile(r"^(?:[\w.]+\([^\n]*\)(?: *->[^\n]*)?\n?)+$")


def _leading_paragraphs(text: str, header_chars: int) -> str:
    """Return the leading paragraphs that fit beside `header_chars` characters of header; empty if none fits."""
    kept: list[str] = []
    length = header_chars + 4  # two back ticks and a blank line
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n")):
        paragraph = paragraph.rstrip()
        if not kept and _SIGNATURE_LINES.match(paragraph):
            continue  # C docstrings repeat the signature
        if "::=" in paragraph:
            continue  # grammar
        if ">>>" in paragraph:
            break
        length += len(paragraph) + 2
        if length > MAX_ANSWER_CHARS:
            break
        kept.append(paragraph)
    while kept and kept[-1].endswith(":"):  # the text that it introduces was cut off
        kept.pop()
    return "\n\n".join(kept).strip()
