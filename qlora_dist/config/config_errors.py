"""Every mistake of a configuration in one answer: file and line, the key, what is wrong, and the remedy."""

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
_SUGGESTION_CUTOFF = 0.85
"""Similarity from which a key of another section is suggested."""
_NUMBER_ERROR_TYPES = ("int_type", "float_type", "bool_type")


class ConfigProblem(NamedTuple):
    """One mistake."""

    place: str
    """'FILE, line N', 'override KEY=VALUE', or the file alone."""
    key: KeyPath
    problem: str
    suggestions: tuple[KeyPath, ...] = ()
    """Keys that were most likely meant."""

    def __str__(self) -> str:
        """Return the sentence."""
        name = ".".join(self.key)
        return f"{self.place}: {name}: {self.problem}" if name else f"{self.place}: {self.problem}"


def list_item_key(index: int) -> str:
    """Return the index of a list's item as a part of a `KeyPath`: it is no key of the user's, since YAML knows no NUL."""
    return f"\0{index}"


def explain_validation_error(
    config_class: type[BaseModel],
    error: ValidationError,
    tree: dict[str, Any],
    path: Path,
    locations: Mapping[KeyPath, str],
    loader: type[yaml.SafeLoader],
) -> str:
    """Explain all mistakes: one in a sentence, several in a line each.

    Args:
        config_class: class of the whole file.
        error: what pydantic found.
        tree: content of the file, with the overrides.
        path: name of the file.
        locations: where each key stands.
        loader: loader of the file, to see what text without its quotes would be.
    """
    known = known_keys(config_class)
    problems = _find_key_problems(error.errors(), tree, path, locations, known, loader)
    suggested = {key for mistake in problems for key in mistake.suggestions}
    # a section or key that is missing because its name is misspelt is one mistake
    problems = [
        m for m in problems if m.problem != _MISSING or not any(key[: len(m.key)] == m.key for key in suggested)
    ]
    problems += _find_contradictions(config_class, error, tree, path, locations, known)
    problems.sort(key=_sort_key)
    unknown = [m.key[0] for m in problems if len(m.key) == 1 and m.key not in known]
    trainer = detect_trainer(unknown)
    if trainer is not None:
        problems = _group_unknown_foreign_keys(problems)
    lines = list(dict.fromkeys(map(str, problems)))
    if trainer is not None:
        return "\n".join([f"{path}: looks like a configuration of {trainer}; see {MIGRATION_PAGE}", *lines])
    return lines[0] if len(lines) == 1 else "\n".join([f"{path}: {len(lines)} mistakes", *lines])


_MISSING = "is missing; add it"


def _sort_key(mistake: ConfigProblem) -> tuple[bool, int]:
    """Return the order of a mistake: lines of the file, overrides, and last what stands nowhere."""
    number = re.search(r", line (\d+)$", mistake.place)
    return (False, int(number[1])) if number else (True, not mistake.place.startswith("override "))


def _group_unknown_foreign_keys(found: list[ConfigProblem]) -> list[ConfigProblem]:
    """Name the keys of another trainer that nothing here stands for in one line, in place of a line each."""
    rest = [m for m in found if len(m.key) == 1 and m.problem.startswith(_UNKNOWN) and not _advice(m.key)]
    rest = [m for m in rest if not m.suggestions]
    if not rest:
        return found
    names = ", ".join(m.key[0] for m in rest)
    last = ConfigProblem(re.sub(r", line \d+$", "", rest[0].place), (), f"no key of the same name or meaning: {names}")
    return [*(m for m in found if m not in rest), last]


# --- values and keys --------------------------------------------------------------------------------------------------


def _find_key_problems(
    errors: list[ErrorDetails],
    tree: dict[str, Any],
    path: Path,
    places: Mapping[KeyPath, str],
    known: set[KeyPath],
    read: type[yaml.SafeLoader],
) -> list[ConfigProblem]:
    """Return what is wrong with single keys. A value of several allowed types has one error for each of them."""
    key_paths = {id(error): _error_key_path(error, tree) for error in errors}
    # what is wrong within a mapping says more than that it is no text
    errors = [e for e in errors if not any(_is_within(other, key_paths[id(e)]) for other in key_paths.values())]
    errors.sort(key=lambda e: e["type"] == "missing")
    problems: list[ConfigProblem] = []
    done: list[KeyPath] = []
    for error in errors:
        location = key_paths[id(error)]
        if error["type"] == "value_error" or any(location[: len(seen)] == seen for seen in done):
            continue
        done.append(location)
        same = [e for e in errors if key_paths[id(e)][: len(location)] == location]
        place = _find_location(location, places) or str(path)
        problems.append(_make_problem(error, same, location, place, known, read))
    return problems


_UNKNOWN = "unknown key; "


def _make_problem(
    error: ErrorDetails,
    same: list[ErrorDetails],
    location: KeyPath,
    place: str,
    known: set[KeyPath],
    read: type[yaml.SafeLoader],
) -> ConfigProblem:
    kind, value = error["type"], error["input"]
    key = tuple(part for part in location if not part.startswith("\0"))
    if kind in ("extra_forbidden", "invalid_key"):  # the latter is a key that is no text, such as 1
        return _unknown_key(place, key, known)
    if kind == "missing":
        return ConfigProblem(place, key, _MISSING)
    key = _longest_known_prefix(key, known)
    if value is None and kind in ("model_type", "model_attributes_type"):
        return ConfigProblem(place, key, "is an empty section; fill it or take the line out")
    messages = dict.fromkeys(re.sub(r"^\w+ should | or instance of \w+", "", e["msg"]) for e in same)
    remedy = ""
    if isinstance(value, str):
        if _needs_no_quotes(value, same, read):
            remedy = "; write it without quotes"
        elif kind == "list_type":
            remedy = f"; write [{value}]"
        elif kind in ("model_type", "model_attributes_type") and _advice(key):
            remedy = f"; {_advice(key)}"
    return ConfigProblem(place, key, f"should {', or '.join(messages)}, not {value!r}{remedy}")


def _needs_no_quotes(text: str, errors: list[ErrorDetails], read: type[yaml.SafeLoader]) -> bool:
    """Return whether the text is a number, or true or false, in quotes, where such a value is wanted."""
    try:
        value = yaml.load(text, Loader=read)
    except yaml.YAMLError:
        return False
    expected = {choice for e in errors for choice in re.split(", | or ", e.get("ctx", {}).get("expected", ""))}
    return isinstance(value, int | float) and (
        str(value) in expected or any(e["type"] in _NUMBER_ERROR_TYPES for e in errors)
    )


def _unknown_key(place: str, key: KeyPath, known: set[KeyPath]) -> ConfigProblem:
    """Suggest what another trainer's key is called here, the same name elsewhere, or a similar one."""
    if advice := _advice(key):
        meant = tuple(k for k in known if re.search(rf"\b{re.escape('.'.join(k))}\b", advice) and len(k) > 1)
        return ConfigProblem(place, key, f"{_UNKNOWN}{advice}", meant)
    if nearest := _nearest(key, known):
        names = " or ".join(".".join(k) for k in nearest)
        return ConfigProblem(place, key, f"{_UNKNOWN}did you mean {names}?", nearest)
    siblings = sorted(k[-1] for k in known if k[:-1] == key[:-1])
    return ConfigProblem(place, key, f"{_UNKNOWN}this section knows {', '.join(siblings)}")


def _advice(key: KeyPath) -> str | None:
    return KEY_ADVICE.get(key[-1].lower()) if key and len(key) <= 2 else None


def _nearest(key: KeyPath, known: set[KeyPath]) -> tuple[KeyPath, ...]:
    """Return keys of that very name in other sections, or one of a similar name: in the same section, or anywhere."""
    equal = sorted(k for k in known if k[-1] == key[-1])
    if equal:
        least = min(map(len, equal))
        return tuple(k for k in equal if len(k) == least)
    same = {k[-1]: k for k in known if k[:-1] == key[:-1]}
    anywhere = {k[-1]: k for k in sorted(known, key=lambda k: (-len(k), k))}  # the shortest wins
    for names, cutoff in ((same, 0.6), (anywhere, _SUGGESTION_CUTOFF)):
        for name in difflib.get_close_matches(key[-1], names, n=1, cutoff=cutoff):
            return (names[name],)
    return ()


def _find_location(location: KeyPath, places: Mapping[KeyPath, str]) -> str | None:
    return next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), None)


def _error_key_path(error: ErrorDetails, tree: Any) -> KeyPath:
    """Return keys and list items from the root, without the union members that pydantic puts between."""
    location: list[str] = []
    for part in error["loc"]:
        if isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            location.append(list_item_key(part))
            tree = tree[part]
        elif isinstance(tree, dict) and part in tree:
            location.append(str(part))
            tree = tree[part]
    name = str(error["loc"][-1]) if error["loc"] else ""
    # a key such as ~ or yes is null or true in the tree, and text in the error
    if error["type"] == "missing" or (error["type"] == "invalid_key" and location[-1:] != [name]):
        location.append(name)
    return tuple(location)


def _is_within(location: KeyPath, value: KeyPath) -> bool:
    rest = location[len(value) :]
    return location[: len(value)] == value and any(not part.startswith("\0") for part in rest)


def _longest_known_prefix(location: KeyPath, known: set[KeyPath]) -> KeyPath:
    """Return the key proper, where a value is a mapping of the user's own."""
    return next((location[:n] for n in range(len(location), 0, -1) if location[:n] in known), location[:1])


def known_keys(section: type[BaseModel], prefix: KeyPath = ()) -> set[KeyPath]:
    """Return the keys of a section, its own sections' included."""
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
    places: Mapping[KeyPath, str],
    known: set[KeyPath],
) -> list[ConfigProblem]:
    """Return what contradicts among the keys whose values are right."""
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
            for sentence in getattr(reason, "sentences", [str(reason)]):
                named = [tuple(name.split(".")) for name in re.findall(r"\b\w+\.\w+\b", sentence)]
                named = [key for key in named if key in known]
                if any(key[: len(location)] == location for key in named for location in wrong if location):
                    continue
                place = next((places[key] for key in named if key in places), str(path))
                problems.append(ConfigProblem(place, (), sentence))
    return problems


def _remove_key(tree: Any, key: KeyPath) -> None:
    """Take a key out of the tree, with the whole list where it is an item's."""
    depth = next((n for n, part in enumerate(key) if part.startswith("\0")), len(key))
    for part in key[: depth - 1]:
        if not isinstance(tree, dict) or part not in tree:
            return
        tree = tree[part]
    if isinstance(tree, dict) and depth:
        # a key that is no text is in the tree as it is
        for name in [name for name in tree if str(name) == key[depth - 1]]:
            del tree[name]


def _with_placeholders(section: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with something in each required key that it lacks."""
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
