"""A LoRA adapter's folder, ours or PEFT's own: what is in it, and whether it fits a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import has_tied_head, is_lora, use_our_layers
from qlora_dist.adapters.check import check_kind
from qlora_dist.adapters.names import PREFIX, peft_key, plain_name
from qlora_dist.errors import UserError
from qlora_dist.model.folder import read_json
from qlora_dist.nf4.safetensors_file import Entry, read_header

_TAKEN = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
)
"""Keys of adapter_config.json that say what is computed."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter that has a name."""

    name: str
    """By which it is chosen."""
    path: Path
    base: str
    """The folder that it was trained on, as its configuration names it; may be empty."""
    config: peft.LoraConfig
    entries: Mapping[str, Entry]
    """Its tensors, by PEFT's names."""


def parse_adapters(given: Sequence[str]) -> list[AdapterFolder]:
    """The adapters of `NAME=FOLDER` or `FOLDER`, which is named as its run (`runs/NAME/adapter`), or as itself.

    Raises:
        UserError: a name stands twice or is no name, or a folder holds no adapter.
    """
    folders: dict[str, AdapterFolder] = {}
    for text in given:
        name, equals, where = text.partition("=")
        if not equals:
            path = Path(text)
            name, where = (path.parent if path.name == "adapter" else path).resolve().name, text
        if not name.strip() or " " in name or name == "base":
            raise UserError(f"--adapter {text}: {name or 'nothing'} is no name for an adapter; write NAME=FOLDER")
        if name in folders:
            raise UserError(f"--adapter {text}: {name} stands twice; write another NAME=FOLDER")
        folders[name] = read_adapter_folder(Path(where), name)
    return list(folders.values())


def read_adapter_folder(path: Path, name: str) -> AdapterFolder:
    """Read the configuration and the file's header.

    Raises:
        UserError: it is missing, damaged, or no LoRA adapter; or it has something that is not known here.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give that of an adapter, such as runs/NAME/adapter")
    if not (path / "adapter_config.json").exists():
        raise UserError(f"{path}: holds no adapter_config.json; give the folder of an adapter, such as {path}/adapter")
    content = read_json(path / "adapter_config.json")
    check_kind(content, path)
    base = str(content.get("base_model_name_or_path") or "")
    return AdapterFolder(name, path, base, _config(content, path), read_header(path / "adapter_model.safetensors"))


def base_of(adapters: Sequence[AdapterFolder]) -> str:
    """The folder that all of them were trained on.

    Raises:
        UserError: they name none, or several.
    """
    if not adapters:
        raise UserError("no adapter and no base; give an adapter's folder, or a model's with --base")
    first = adapters[0]
    for adapter in adapters:
        if not adapter.base:
            raise UserError(f"{adapter.path}: names no base; give its folder with --base")
        if adapter.base != first.base:
            raise UserError(
                f"{adapter.path}: was trained on {adapter.base}, and {first.path} on {first.base}; adapters share "
                "their base, which --base names if it is one"
            )
    return first.base


def check_layers(adapter: AdapterFolder, model: PreTrainedModel, base: Path) -> None:
    """See whether the layers that the file names are in a model, before the adapter is put into it.

    Raises:
        UserError: one is not.
    """
    if adapter.config.target_parameters:
        return  # experts have names of their own there; `check_tensors` looks at them
    paths = {path.replace(".base_layer", "") for path, _ in model.named_modules()}
    for key in adapter.entries:
        module = re.sub(r"\.lora_.*", "", key.removeprefix(PREFIX))
        if is_lora(key) and module not in paths:
            raise UserError(
                f"{adapter.path}: adapts {module}, which {base} lacks; give the model that it was trained on"
            )


def check_tensors(adapter: AdapterFolder, internal: str, model: PreTrainedModel, base: Path) -> dict[str, Entry]:
    """Compare the file with the model that the adapter has been put into.

    Args:
        adapter: of whom.
        internal: the name that it has in the model.
        model: on meta.
        base: the model's folder.

    Returns:
        The entries in the file, by the model's name of the parameter: of LoRA's, and of others that were trained whole.

    Raises:
        UserError: a tensor is missing, has another shape, or is nothing that the model has.
    """
    found: dict[str, Entry] = {}
    left = dict(adapter.entries)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if is_lora(name) and f".{internal}" in name:
            entry = left.pop(peft_key(name, internal), None)
            if entry is None:
                raise UserError(f"{adapter.path}: lacks {peft_key(name, internal)}; export the adapter again")
            _check_shape(adapter, peft_key(name, internal), entry.shape, tuple(parameter.shape), base)
            found[name] = entry
    whole = {name.replace(".base_layer.", "."): name for name in parameters if not is_lora(name)}
    head = _tied_head(model)
    for key, entry in left.items():
        plain = plain_name(key)
        if head is not None and plain == head[0] and f"{PREFIX}{head[1]}" in adapter.entries:
            continue  # PEFT writes a tied head twice
        if plain not in whole or is_lora(key):
            raise UserError(
                f"{adapter.path}: holds {plain}, which is nothing to be changed in {base}; give the model that it was "
                "trained on"
            )
        _check_shape(adapter, plain, entry.shape, tuple(parameters[whole[plain]].shape), base)
        found[whole[plain]] = entry
    return found


def _check_shape(
    adapter: AdapterFolder, name: str, shape: tuple[int, ...], expected: tuple[int, ...], base: Path
) -> None:
    if shape != expected:
        raise UserError(
            f"{adapter.path}: {name} has the shape {shape} where {base} asks for {expected}; give the model that it "
            "was trained on"
        )


def _tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """The names of a tied head's weight and of the embedding's; None: the head is a matrix of its own."""
    if not has_tied_head(model):
        return None
    paths = {id(module): path for path, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return f"{paths[id(head)]}.weight", f"{paths[id(embedding)]}.weight"


def _config(content: Mapping[str, Any], path: Path) -> peft.LoraConfig:
    taken = {key: content[key] for key in _TAKEN if content.get(key) is not None}
    try:
        config = peft.LoraConfig(**taken, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(
            f"{path / 'adapter_config.json'}: PEFT does not accept it ({reason}); export it again"
        ) from None
    use_our_layers(config)
    return config
