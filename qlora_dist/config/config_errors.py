"""Messages that report all errors of a configuration at once, with file and line, key, problem and remedy."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qlora_dist.config.other_trainers import KEY_ADVICE, MIGRATION_PAGE, detect_trainer

KeyPath = tuple[str, ...]
_NUMBER_ERROR_TYPES = ("int_type", "float_type", "bool_type")


class ConfigProblem(NamedTuple):
    """Problem in a configuration."""

    location: str
    """Location as 'FILE, line N', 'override KEY=VALUE', or the file alone."""
    key: KeyPath
    problem: str
    suggestions: tuple[KeyPath, ...] = ()
    """Keys that the user most likely meant."""

    def __str__(self) -> str:
        name = ".".join(self.key)
        return f"{self.location}: {name}: {self.problem}" if name else f"{self.location}: {self.problem}"


def list_item_key(index: int) -> str:
    """Return a list index as a part of a `KeyPath`. It equals no key of a user, because YAML allows no NUL."""
    return f"\0{index}"


def explain_validation_error(
    config_class: type[BaseModel],
    error: ValidationError,
    tree: dict[str, Any],
    path: Path,
    locations: Mapping[KeyPath, str],
    loader: type[yaml.SafeLoader],
) -> str:
    """Return a message about all problems. A single one is one sentence, and several have a line each.

    `tree` is the content of the file, with the overrides. The file's loader reads text without its quotes.
    """
    known = known_keys(config_class)
    problems = _find_key_problems(error.errors(), tree, path, locations, known, loader)
    suggested = {key for problem in problems for key in problem.suggestions}
    # a missing key and its misspelt name are one problem
    problems = [
        problem
        for problem in problems
        if problem.problem != _MISSING or not any(key[: len(problem.key)] == problem.key for key in suggested)
    ]
    problems += _find_contradictions(config_class, error, tree, path, locations, known)
    problems.sort(key=_sort_key)
    unknown = [problem.key[0] for problem in problems if len(problem.key) == 1 and problem.key not in known]
    trainer = detect_trainer(unknown)
    if trainer is not None:
        problems = _group_unknown_foreign_keys(problems)
    lines = list(dict.fromkeys(map(str, problems)))
    if trainer is not None:
        return "\n".join([f"{path}: looks like a configuration of {trainer}; see {MIGRATION_PAGE}", *lines])
    return lines[0] if len(lines) == 1 else "\n".join([f"{path}: {len(lines)} errors", *lines])


_MISSING = "is missing; add it"


def _sort_key(problem: ConfigProblem) -> tuple[bool, int]:
    """Return the sort key of a problem: lines of the file first, then overrides, then problems without a location."""
    number = re.search(r", line (\d+)$", problem.location)
    return (False, int(number[1])) if number else (True, not problem.location.startswith("override "))


def _group_unknown_foreign_keys(problems: list[ConfigProblem]) -> list[ConfigProblem]:
    """Merge problems of another trainer's keys that have no equivalent here into one line."""
    rest = [
        problem
        for problem in problems
        if len(problem.key) == 1
        and problem.problem.startswith(_UNKNOWN)
        and not _advice(problem.key)
        and not problem.suggestions
    ]
    if not rest:
        return problems
    names = ", ".join(problem.key[0] for problem in rest)
    location = re.sub(r", line \d+$", "", rest[0].location)
    last = ConfigProblem(location, (), f"no key of the same name or meaning: {names}")
    return [*(problem for problem in problems if problem not in rest), last]


# --- values and keys --------------------------------------------------------------------------------------------------


def _find_key_problems(
    errors: list[ErrorDetails],
    tree: dict[str, Any],
    path: Path,
    locations: Mapping[KeyPath, str],
    known: set[KeyPath],
    read: type[yaml.SafeLoader],
) -> list[ConfigProblem]:
    """Return the problems of single keys. pydantic reports one error for each type that a value may have."""
    key_paths = {id(error): _error_key_path(error, tree) for error in errors}
    # an error within a mapping says more than an error about the mapping's type
    errors = [e for e in errors if not any(_is_within(other, key_paths[id(e)]) for other in key_paths.values())]
    errors.sort(key=lambda e: e["type"] == "missing")
    problems: list[ConfigProblem] = []
    done: list[KeyPath] = []
    for error in errors:
        key_path = key_paths[id(error)]
        if error["type"] == "value_error" or any(key_path[: len(seen)] == seen for seen in done):
            continue
        done.append(key_path)
        same = [e for e in errors if key_paths[id(e)][: len(key_path)] == key_path]
        location = _find_location(key_path, locations) or str(path)
        problems.append(_make_problem(error, same, key_path, location, known, read))
    return problems


_UNKNOWN = "unknown key; "


def _make_problem(
    error: ErrorDetails,
    same: list[ErrorDetails],
    key_path: KeyPath,
    location: str,
    known: set[KeyPath],
    read: type[yaml.SafeLoader],
) -> ConfigProblem:
    kind, value = error["type"], error["input"]
    key = tuple(part for part in key_path if not part.startswith("\0"))
    if kind in ("extra_forbidden", "invalid_key"):  # an invalid key is not text, such as 1
        return _unknown_key(location, key, known)
    if kind == "missing":
        return ConfigProblem(location, key, _MISSING)
    key = _longest_known_prefix(key, known)
    if value is None and kind in ("model_type", "model_attributes_type"):
        return ConfigProblem(location, key, "is an empty section; fill it or take the line out")
    messages = dict.fromkeys(re.sub(r"^\w+ should | or instance of \w+", "", e["msg"]) for e in same)
    remedy = ""
    if isinstance(value, str):
        if _needs_no_quotes(value, same, read):
            remedy = "; write it without quotes"
        elif kind == "list_type":
            remedy = f"; write [{value}]"
        elif kind in ("model_type", "model_attributes_type") and _advice(key):
            remedy = f"; {_advice(key)}"
    return ConfigProblem(location, key, f"should {', or '.join(messages)}, not {value!r}{remedy}")


def _needs_no_quotes(text: str, errors: list[ErrorDetails], read: type[yaml.SafeLoader]) -> bool:
    """Return whether the text is a quoted number or boolean, and such a value is expected."""
    try:
        value = yaml.load(text, Loader=read)
    except yaml.YAMLError:
        return False
    expected = {choice for e in errors for choice in re.split(", | or ", e.get("ctx", {}).get("expected", ""))}
    return isinstance(value, int | float) and (
        str(value) in expected or any(e["type"] in _NUMBER_ERROR_TYPES for e in errors)
    )


def _unknown_key(location: str, key: KeyPath, known: set[KeyPath]) -> ConfigProblem:
    """Return a problem that suggests the equivalent of another trainer's key, or an equal or similar name."""
    if advice := _advice(key):
        suggestions = tuple(k for k in known if re.search(rf"\b{re.escape('.'.join(k))}\b", advice) and len(k) > 1)
        return ConfigProblem(location, key, f"{_UNKNOWN}{advice}", suggestions)
    if nearest := _nearest(key, known):
        names = " or ".join(".".join(k) for k in nearest)
        return ConfigProblem(location, key, f"{_UNKNOWN}did you mean {names}?", nearest)
    siblings = sorted(k[-1] for k in known if k[:-1] == key[:-1])
    return ConfigProblem(location, key, f"{_UNKNOWN}this section has {', '.join(siblings)}")


def _advice(key: KeyPath) -> str | None:
    return KEY_ADVICE.get(key[-1].lower()) if key and len(key) <= 2 else None


def _nearest(key: KeyPath, known: set[KeyPath]) -> tuple[KeyPath, ...]:
    """Return keys with the same name in other sections, or else one with a similar name, the same section first."""
    equal = sorted(k for k in known if k[-1] == key[-1])
    if equal:
        least = min(map(len, equal))
        return tuple(k for k in equal if len(k) == least)
    same = {k[-1]: k for k in known if k[:-1] == key[:-1]}
    anywhere = {k[-1]: k for k in sorted(known, key=lambda k: (-len(k), k))}  # the shortest wins
    for names, cutoff in ((same, 0.6), (anywhere, 0.85)):
        for name in difflib.get_close_matches(key[-1], names, n=1, cutoff=cutoff):
            return (names[name],)
    return ()


def _find_location(key_path: KeyPath, locations: Mapping[KeyPath, str]) -> str | None:
    return next((locations[key_path[:n]] for n in range(len(key_path), 0, -1) if key_path[:n] in locations), None)


def _error_key_path(error: ErrorDetails, tree: Any) -> KeyPath:
    """Return keys and list items from the root, without the union members that pydantic inserts."""
    key_path: list[str] = []
    for part in error["loc"]:
        if isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            key_path.append(list_item_key(part))
            tree = tree[part]
        elif isinstance(tree, dict) and part in tree:
            key_path.append(str(part))
            tree = tree[part]
    name = str(error["loc"][-1]) if error["loc"] else ""
    # a key such as ~ or yes is null or true in the tree, but text in the error
    if error["type"] == "missing" or (error["type"] == "invalid_key" and key_path[-1:] != [name]):
        key_path.append(name)
    return tuple(key_path)


def _is_within(key_path: KeyPath, value: KeyPath) -> bool:
    rest = key_path[len(value) :]
    return key_path[: len(value)] == value and any(not part.startswith("\0") for part in rest)


def _longest_known_prefix(key_path: KeyPath, known: set[KeyPath]) -> KeyPath:
    """Return the configuration's key, without keys of the user inside its value."""
    return next((key_path[:n] for n in range(len(key_path), 0, -1) if key_path[:n] in known), key_path[:1])


def known_keys(section: type[BaseModel], prefix: KeyPath = ()) -> set[KeyPath]:
    """Return the keys of a section and of the sections in it."""
    keys: set[KeyPath] = set()
    for attribute, field in section.model_fields.items():
        name = field.alias or attribute
        keys.add((*prefix, name))
        for inner in _sections(field.annotation):
            keys |= known_keys(inner, (*prefix, name))
    return keys


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections that a field's value may be or hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


# --- contradictions between keys --------------------------------------------------------------------------------------


def _find_contradictions(
    kind: type[BaseModel],
    error: ValidationError,
    tree: dict[str, Any],
    path: Path,
    locations: Mapping[KeyPath, str],
    known: set[KeyPath],
) -> list[ConfigProblem]:
    """Return the contradictions between keys whose values are valid."""
    wrong = {_error_key_path(e, tree) for e in error.errors() if e["type"] != "value_error"}
    tree = copy.deepcopy(tree)
    for key in wrong:
        _remove_key(tree, key)
    problems: list[ConfigProblem] = []
    try:
        kind.model_validate(_with_placeholders(kind, tree))
    except ValidationError as again:
        for details in again.errors():
            if details["type"] != "value_error":
                continue
            reason = details["ctx"]["error"]
            for message in getattr(reason, "messages", [str(reason)]):
                named = [tuple(name.split(".")) for name in re.findall(r"\b\w+\.\w+\b", message)]
                named = [key for key in named if key in known]
                if any(key[: len(key_path)] == key_path for key in named for key_path in wrong if key_path):
                    continue
                location = next((locations[key] for key in named if key in locations), str(path))
                problems.append(ConfigProblem(location, (), message))
    return problems


def _remove_key(tree: Any, key: KeyPath) -> None:
    """Remove a key from the tree. For a list item remove the whole list."""
    depth = next((n for n, part in enumerate(key) if part.startswith("\0")), len(key))
    for part in key[: depth - 1]:
        if not isinstance(tree, dict) or part not in tree:
            return
        tree = tree[part]
    if isinstance(tree, dict) and depth:
        # the tree may hold a key that is not text
        for name in [name for name in tree if str(name) == key[depth - 1]]:
            del tree[name]


def _with_placeholders(section: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with a placeholder for each missing required key."""
    filled = dict(tree)
    for attribute, field in section.model_fields.items():
        name = field.alias or attribute
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner = filled.get(name)
            if field.is_required() or isinstance(inner, dict):
                filled[name] = _with_placeholders(field.annotation, inner if isinstance(inner, dict) else {})
        elif field.is_required() and name not in filled:
            filled[name] = "-" if field.annotation is str else ["-"]
    return filled
