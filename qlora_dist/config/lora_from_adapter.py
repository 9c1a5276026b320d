"""Section `lora` of a run that begins from an existing adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_dist.config.schema import Config
from qlora_dist.config.sections import LoraConfig
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import (
    ADAPTER_CONFIG_NAME,
    PEFT_DEFAULT_R_AND_ALPHA,
    PEFT_PREFIX,
    adapter_tensor_names,
    expert_parameter_name,
    get_pattern_value,
    read_adapter_config,
    split_lora_key,
    target_module_name,
)


def fill_lora_from_adapter(config: Config) -> Config:
    """Return the configuration with unset keys of `lora` filled in from the adapter in `lora.from`.

    The layers that the adapter changes are compared with `lora.targets` later, when the model is known.

    Raises:
        UserError: the folder holds no adapter, or a key that is set differs from the adapter.
    """
    lora = config.lora
    if lora.from_adapter is None:
        return config
    adapter_settings = adapter_lora_settings(Path(lora.from_adapter))
    for key in lora.model_fields_set & adapter_settings.keys() - {"targets"}:
        value, adapter_value = getattr(lora, key), adapter_settings[key]
        if (sorted(value) if isinstance(value, list) else value) != adapter_value:
            raise UserError(f"lora.{key}: is {value}, and {lora.from_adapter} has {adapter_value}; leave the key out")
    missing = {key: value for key, value in adapter_settings.items() if key not in lora.model_fields_set}
    if adapter_settings["experts"] and "dropout" not in lora.model_fields_set:
        missing["dropout"] = 0.0  # experts do not support dropout
    section = LoraConfig.model_validate({**lora.model_dump(include=lora.model_fields_set), **missing})
    return Config.model_validate({**dict(config), "lora": section})


def adapter_lora_settings(path: Path) -> dict[str, Any]:
    """Return the values of `lora` for the adapter in a folder, by key."""
    config = read_adapter_config(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: is an adapter of type {config.get('peft_type')}, not LORA; give one that is")
    try:
        return _parse_lora_settings(path, config)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(
            f"{path / ADAPTER_CONFIG_NAME}: is not as PEFT writes it ({error}); export the adapter again"
        ) from None


def _parse_lora_settings(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    linear: set[str] = set()
    experts: set[str] = set()
    saved_modules: set[str] = set()
    for key in adapter_tensor_names(path):
        if (part := split_lora_key(key)) is None:
            saved_modules |= set() if "lora_" in key else {key.removeprefix(PEFT_PREFIX)}
        elif (parameter := expert_parameter_name(part[0], config)) is not None:
            experts.add(parameter)
        else:
            linear.add(part[0])
    if not linear:
        raise UserError(f"{path}: adapts no linear layer, and a run always does; give an adapter that does")
    if biases := [name for name in saved_modules if name.endswith(".bias") and config.get("bias", "none") != "none"]:
        raise UserError(f"{path}: has trained biases ({biases[0]}), which a run does not train; give another adapter")
    r, alpha = config.get("r", PEFT_DEFAULT_R_AND_ALPHA), config.get("lora_alpha", PEFT_DEFAULT_R_AND_ALPHA)
    return {
        "r": int(_single_value("rank", config.get("rank_pattern"), r, linear | experts, path)),
        "alpha": float(_single_value("alpha", config.get("alpha_pattern"), alpha, linear | experts, path)),
        "rslora": bool(config.get("use_rslora")),
        "dora": bool(config.get("use_dora")),
        "targets": sorted({target_module_name(module) for module in linear}),
        "experts": bool(experts),
        "modules_to_save": _find_modules_to_save(config, saved_modules),
    }


def _single_value(
    name: str, patterns: Mapping[str, Any] | None, default: Any, modules: Iterable[str], path: Path
) -> Any:
    values = {get_pattern_value(patterns, module, default) for module in modules}
    if len(values) > 1:
        raise UserError(
            f"{path}: has matrices with several values of {name} ({', '.join(map(str, sorted(values)))}), and a run "
            "has one; give another adapter"
        )
    return values.pop()


def _find_modules_to_save(config: Mapping[str, Any], whole: set[str]) -> list[str]:
    """Return the last name parts of modules that were trained in full, without a tied head."""
    names = {target_module_name(name) for name in config.get("modules_to_save") or ()} if whole else set()
    if config.get("ensure_weight_tying") and "embed_tokens" in names:
        names.discard("lm_head")
    return sorted(names)
