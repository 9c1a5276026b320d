"""Rules of plain English for docs, docstrings, comments and messages, as a checker.

Run `python tests/helpers/prose.py [path ...]` to print the violations in some files or folders.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MOST_WORDS = 25
"""Words that a sentence may have. A code span counts as one word."""

FOLDERS = ("qlora_dist", "tests", "benchmarks", "examples", "docs", "configs", "launch", "slurm")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")
SKIPPED = ("tests/helpers/prose.py", "tests/test_prose.py")

DENIED = re.compile(
    r"\b(so many|so-and-so\w*|without a word|nobody|those of|what it has|what they have|"
    r"(?:is|are|was|were|be|been) told|for people|hand in hand|gets? on no|still at it|by and by|"
    r"in so far|of theirs|of its own accord)\b",
    re.IGNORECASE,
)
PERSONIFIED = re.compile(
    r"\b(ranks?|process(?:es)?|nodes?|workers?)\b (?:that |which |then |also |never |all |0 |1 )?"
    r"(speaks?|spoke|tells?|knows?|knew|goes|go|went|comes?|came|says?|said|hears?|heard|asks?|meets?)\b",
    re.IGNORECASE,
)
FRAGMENT = re.compile(
    r"(Of|For|As|By|Those|The same|Its|Or|What|Who|Where|How|Times|From|With|Per|In the)\b", re.IGNORECASE
)
"""First words that no docstring of a class or a field and no entry of arguments begins with."""
LOOSE_FRAGMENT = re.compile(r"(?:(?:Of|Those)\b|The same\b(?!\s+\w+\s+(?:is|are|as|applies|holds|goes)\b))")
"""First words of sentences in comments and pages that are fragments."""
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|approx|No|resp|al)\.")


class Violation(NamedTuple):
    """A place in a file and what is wrong there."""

    path: str
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.text[:160]}"


class Text(NamedTuple):
    """A paragraph with the kind of its place: docstring, class, field, argument, comment, message, page, name."""

    line: int
    kind: str
    text: str


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph into sentences, with each code span as one word."""
    text = re.sub(r"``.+?``|`[^`]+`", "CODE", paragraph)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = ABBREVIATIONS.sub(lambda found: found[0].replace(".", ""), text)
    text = re.sub(r"https?://\S+", "URL", text)
    parts = re.split(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_]*[A-Z0-9])|\s+\|\s+", " ".join(text.split()))
    return [part for part in parts if part.strip()]


def words(sentence: str) -> int:
    """Count the words of a sentence."""
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


def check_text(path: str, item: Text) -> Iterator[Violation]:
    """Yield the violations of one paragraph."""
    plain = re.sub(r"`[^`]+`", "CODE", item.text)
    for rule, pattern in (("denied phrase", DENIED), ("personified", PERSONIFIED)):
        for found in pattern.finditer(plain):
            yield Violation(path, item.line, rule, f"{found[0]!r} in: {' '.join(plain.split())}")
    if item.kind in ("class", "field", "argument") and FRAGMENT.match(item.text):
        yield Violation(path, item.line, f"fragment ({item.kind})", item.text)
    if item.kind in ("message", "name", "table"):
        return
    for sentence in sentences(item.text):
        if words(sentence) > MOST_WORDS:
            yield Violation(path, item.line, f"{words(sentence)} words", sentence)
        if item.kind in ("comment", "page", "docstring") and LOOSE_FRAGMENT.match(sentence):
            yield Violation(path, item.line, "fragment", sentence)


# --- where texts are --------------------------------------------------------------------------------------------------


def paragraphs(text: str, line: int, kind: str) -> Iterator[Text]:
    """Split a docstring or a page into paragraphs and list items; leave out code blocks and headings."""
    fenced, held, start, section, kept = False, [], line, "", kind
    for number, row in enumerate([*text.split("\n"), ""], line):
        stripped = row.strip()
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
            stripped = ""
        elif fenced:
            continue
        table = stripped.startswith("|")
        heading = stripped.startswith(("#", "<")) or stripped in SECTIONS
        item = re.match(r"(?:[-*+]|\d+[.)])\s+", stripped)
        entry = section and re.match(r"(\w[\w, *|.]*): (?=\S)", stripped)
        if held and (not stripped or item or heading or table or entry):
            yield Text(start, kept, " ".join(held))
            held = []
        if stripped in SECTIONS:
            section = stripped
        elif stripped and not row.startswith(" ") and kind != "page" and section and not entry:
            section = ""
        if not stripped or heading:
            continue
        if table:
            for cell in stripped.strip("|").split(" | "):
                yield Text(number, "table", cell.strip())
            continue
        if not held:
            start, kept = number, kind
            if entry and section == "Args:":
                kept = "argument"
            elif entry or section:
                kept = "docstring"
        cut = item.end() if item else entry.end() if entry else 0
        held.append(stripped[cut:])


SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:", "Attributes:", "Note:", "Example:", "Examples:")


def python_texts(source: str) -> Iterator[Text]:
    """Yield docstrings, docs of fields, comments, messages and names of functions of a Python file."""
    tree = ast.parse(source)
    seen: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield Text(node.lineno, "name", node.name.replace("_", " "))
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for before, statement in zip([None, *body], body, strict=False):
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                continue
            if not isinstance(statement.value.value, str):
                continue
            seen.add(id(statement.value))
            kind = "field"
            if before is None:
                kind = "class" if isinstance(node, ast.ClassDef) else "docstring"
            text = statement.value.value
            lines = text.split("\n")
            first = [text] if len(lines) == 1 else [lines[0]]
            rest = "\n".join(lines[1:])
            indent = min((len(row) - len(row.lstrip()) for row in lines[1:] if row.strip()), default=0)
            dedented = "\n".join([*first, *(row[indent:] for row in rest.split("\n"))]) if len(lines) > 1 else text
            found = list(paragraphs(dedented, statement.lineno, "docstring"))
            for number, item in enumerate(found):
                yield item._replace(kind=kind) if number == 0 and item.kind == "docstring" else item
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)) or id(node) in seen:
            continue
        if node.value.count(" ") >= 2:
            yield Text(node.lineno, "message", node.value)
    yield from comments(source)


def comments(source: str) -> Iterator[Text]:
    """Yield the comments of a Python file; comments on lines that follow one another are one paragraph."""
    held: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("#! ").strip()
        alone = token.line.strip().startswith("#")
        if held and not (alone and token.start[0] == last + 1):
            yield Text(start, "comment", " ".join(held))
            held = []
        if re.match(r"(---|noqa|type:|pragma|ruff:|%%)", text) or not text:
            continue
        if not held:
            start = token.start[0]
        held.append(text)
        last = token.start[0] if alone else -1
    if held:
        yield Text(start, "comment", " ".join(held))


def script_texts(source: str) -> Iterator[Text]:
    """Yield the comments of a shell script, a YAML file or a Makefile."""
    held: list[str] = []
    start = 0
    for number, row in enumerate([*source.split("\n"), ""], 1):
        found = re.match(r"\s*#+(?!!|SBATCH)\s?(.*)", row)
        text = found[1].strip() if found else ""
        code = bool(re.match(r"[\w./-]+: |[\w-]+=|\$ |--", text))
        if held and (not text or code):
            yield Text(start, "comment", " ".join(held))
            held = []
        if text and not code and not text.startswith("---"):
            start = start if held else number
            held.append(text)


def texts(path: Path) -> Iterable[Text]:
    """Yield the texts of a file by its suffix."""
    source = path.read_text()
    if path.suffix == ".py":
        return python_texts(source)
    if path.suffix == ".md":
        return paragraphs(
            re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), source, flags=re.S), 1, "page"
        )
    return script_texts(source)


def files(root: Path, chosen: Iterable[str] = ()) -> Iterator[Path]:
    """Yield the files with prose, of the whole repository or below some paths."""
    for name in chosen or (*FOLDERS, *PAGES):
        path = root / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:
            known = file.suffix in (".py", ".md", ".sh", ".yaml") or file.name == "Makefile"
            if file.is_file() and known and str(file.relative_to(root)) not in SKIPPED:
                yield file


def violations(root: Path, chosen: Iterable[str] = ()) -> Iterator[Violation]:
    """Yield every violation of the rules."""
    for file in files(root, chosen):
        for item in texts(file):
            yield from check_text(str(file.relative_to(root)), item)


if __name__ == "__main__":
    all_found = list(violations(Path.cwd(), sys.argv[1:]))
    for one in all_found:
        print(one)
    print(f"{len(all_found)} violations")
