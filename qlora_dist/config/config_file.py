"""Reader and writer of the YAML configuration, with `key=value` overrides. `config_errors.py` explains errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from qlora_dist.config.config_errors import KeyPath, explain_validation_error, list_item_key
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError

ConfigChanges = Mapping[str, Mapping[str, Any]]
"""Changed values, by section and key."""
_ConfigT = TypeVar("_ConfigT", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Loader like yaml.SafeLoader that reads 2e-4 as a number and 2026-01-31 as text, and refuses repeated keys."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except ValueError as error:  # `!!int x`
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                message = f"the key {key!r} appears twice"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Dumper for `_Loader`: it quotes text that the loader would read as a number, such as 1e5."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: YAML file.
        overrides: changes of the file's values, each as `section.key=value` with the value in YAML.

    Raises:
        UserError: the configuration is invalid; the message names file and line or the override, key and remedy.
    """
    return load_yaml_config(path, Config, overrides, first_keys="`model:` and `data:`")


def load_yaml_config(
    path: str | Path, config_class: type[_ConfigT], overrides: Iterable[str] = (), first_keys: str = "one of them"
) -> _ConfigT:
    """Read a file of another schema as `load_config` does. Error messages suggest `first_keys` for an empty file."""
    path = Path(path)
    tree, locations = _read_yaml(path, first_keys)
    return _validate(config_class, tree, path, locations, overrides)


def config_from_tree(tree: dict[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Return the configuration for a tree that is not from a file, as `load_config` does. The tree is changed."""
    return _validate(Config, tree, Path("configuration"), {}, overrides)


def _validate(
    config_class: type[_ConfigT],
    tree: dict[str, Any],
    path: Path,
    locations: dict[KeyPath, str],
    overrides: Iterable[str],
) -> _ConfigT:
    for override in overrides:
        _apply_override(tree, locations, override)
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain_validation_error(config_class, error, tree, path, locations, _Loader)) from None


def apply_changes(config: Config, changes: ConfigChanges) -> Config:
    """Return the configuration with other values for some keys."""
    tree = config.model_dump()
    return Config.model_validate(tree | {section: {**tree[section], **keys} for section, keys in changes.items()})


def dump_config(config: Config) -> str:
    """Return the complete configuration as YAML, from which `load_config` reads an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path, first_keys: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Return the file's tree, and the location of each key ('FILE, line N')."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a YAML file in UTF-8") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}, line {line}: not valid YAML: {error.problem}; correct that line") from None
    except yaml.YAMLError as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: not valid YAML: {reason}; correct it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no mapping of sections; start with {first_keys}")
    return tree, {key: f"{path}, line {line}" for key, line in _key_lines(node)}


def _key_lines(node: yaml.Node | None, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*prefix, str(key_node.value))
            yield key, key_node.start_mark.line + 1
            yield from _key_lines(value_node, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            key = (*prefix, list_item_key(index))
            yield key, item.start_mark.line + 1
            yield from _key_lines(item, key)


def _apply_override(tree: dict[str, Any], locations: dict[KeyPath, str], override: str) -> None:
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        raise UserError(f"'{override}': an override is written section.key=value, such as train.steps=10")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"'{override}': the value is not valid YAML; put it in quotes") from None
    parent = tree
    for part in key[:-1]:
        child = parent.setdefault(part, {})
        if child is None:  # an empty section in the file
            child = parent[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"'{override}': {part} is not a section; write section.key=value")
        parent = child
    parent[key[-1]] = value
    for replaced in [known for known in locations if known[: len(key)] == key]:
        del locations[replaced]
    for length in range(1, len(key) + 1):
        locations[key[:length]] = f"override {override}"


def flatten_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as a flat one: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten_keys(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat
