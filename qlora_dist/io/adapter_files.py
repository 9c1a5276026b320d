"""Files of a LoRA adapter's folder in PEFT's format: names, keys and configuration, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_dist.errors import UserError

ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
GENERATION_CONFIG_NAME = "generation_config.json"
PEFT_PREFIX = "base_model.model."
PEFT_DEFAULT_R_AND_ALPHA = 8
"""Value of `r` and `lora_alpha` if a configuration omits them."""
_LORA_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)$")
_EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")  # in the order in which PEFT wraps them
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json. An error's message names the adapter's folder if it is nearby."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give that of an adapter, such as runs/NAME/adapter")
    if not (path / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(f"{path}: holds no {ADAPTER_CONFIG_NAME}; {_adapter_location_hint(path)}")
    try:
        content = json.loads((path / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / ADAPTER_CONFIG_NAME}: cannot be read as JSON ({error}); export the adapter again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path / ADAPTER_CONFIG_NAME}: holds no JSON object; export the adapter again")
    if not (path / ADAPTER_WEIGHTS_NAME).is_file():
        if (path / "adapter_model.bin").exists():
            raise UserError(
                f"{path}: holds adapter_model.bin, which may run code on loading, and no {ADAPTER_WEIGHTS_NAME}; load "
                "it with PEFT and save it again"
            )
        raise UserError(f"{path}: holds no {ADAPTER_WEIGHTS_NAME}; copy the folder again, or export the adapter again")
    return content


def adapter_tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors in an adapter's file."""
    try:
        with (path / ADAPTER_WEIGHTS_NAME).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ValueError("its first bytes are not a safetensors header")
            return [name for name in json.loads(file.read(length)) if name != "__metadata__"]
    except (OSError, ValueError) as error:
        raise UserError(f"{path / ADAPTER_WEIGHTS_NAME}: is not a safetensors file ({error}); copy it again") from None


def split_lora_key(key: str) -> tuple[str, str] | None:
    """Split a key into PEFT's module name and the name of LoRA's tensor in it; None for other tensors."""
    match = _LORA_KEY.match(key.removeprefix(PEFT_PREFIX))
    return (match["module"], match["part"]) if match else None


def expert_parameter_name(module: str, config: Mapping[str, Any]) -> str | None:
    """Return the experts' parameter that PEFT has adapted under a module's name; None for a linear layer.

    PEFT wraps an experts module once per parameter, input projections first. The outermost wrapper has the module's
    name, and each inner one adds `base_layer` to it.
    """
    match = re.fullmatch(r"(.*?)((?:\.base_layer)*)", module)
    assert match is not None, "`split_lora_key` returns no name with line breaks"
    owner, inner = match.groups()
    parameters = sorted(config.get("target_parameters") or ())
    if not inner and (
        _is_target_module(owner, config.get("target_modules")) or matches_any_suffix(parameters, f"{owner}.weight")
    ):
        return None
    own = [name for name in _EXPERT_PARAMETERS if matches_any_suffix(parameters, f"{owner}.{name}")]  # innermost first
    return f"{owner}.{own[-1 - inner.count('.')]}" if inner.count(".") < len(own) else None


def get_pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name.

    This is PEFT's rule (`peft.utils.other.get_pattern_key`).
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def target_module_name(path: str) -> str:
    """Return the last part of a module's path, together with the part before it if the last part is a number."""
    match = re.search(r"[^.]+(\.\d+)*$", path)
    if match is None:
        raise ValueError(f"{path!r} is not the path of a module")
    return match[0]


def matches_any_suffix(names: Iterable[str], path: str) -> bool:
    """Whether one of the names is a path or the end of it."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def _is_target_module(path: str, targets: str | Sequence[str] | None) -> bool:
    """Whether PEFT's `target_modules` name a module, which is a linear layer then."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return matches_any_suffix(targets or (), path)


def _adapter_location_hint(path: Path) -> str:
    """Return the remedy, with the folder of the adapter that was probably meant."""
    if path.parent.name == "checkpoints" or (path / "manifest.json").is_file():
        adapter = path.parent.parent / "adapter"
        if (adapter / ADAPTER_CONFIG_NAME).is_file():
            return f"a checkpoint is no adapter; give {adapter}"
        return "a checkpoint is no adapter; finish the run, which writes one"
    if (path / "adapter" / ADAPTER_CONFIG_NAME).is_file():
        return f"give {path / 'adapter'}"
    if (path / "checkpoints").is_dir():
        return "the run has written no adapter yet; finish it"
    if (path / "config.json").is_file():
        return "that is a model's folder; give that of an adapter, such as runs/NAME/adapter"
    return "give the folder of an adapter, such as runs/NAME/adapter"
