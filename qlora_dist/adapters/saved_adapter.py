"""A LoRA adapter's folder, ours or PEFT's own: which matrices it changes and what else it was trained with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_dist.adapters.peft_keys import parameter_name
from qlora_dist.adapters.validate_adapter import check_adapter_type
from qlora_dist.compat.peft import peft
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    PEFT_DEFAULT_R_AND_ALPHA,
    PEFT_PREFIX,
    expert_parameter_name,
    get_pattern_value,
    matches_any_suffix,
    read_adapter_config,
    split_lora_key,
)
from qlora_dist.io.safetensors_file import TensorEntry, read_safetensors_header

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class LowRankUpdate:
    """The update of one matrix."""

    a: TensorEntry
    """[r, in_features]; of experts [experts * r, in_features], an expert's rows together."""
    b: TensorEntry
    """[out_features, r]; of experts [out_features, r * experts], an expert's columns `experts` apart."""
    rank: int
    alpha: float
    scaling: float
    """alpha / r, or alpha / sqrt(r) of rsLoRA."""
    magnitude: TensorEntry | None
    """DoRA's, [out_features]; None: plain LoRA."""
    experts: int = 0
    """That have a pair of matrices each (`peft.tuners.lora.layer.ParamWrapper`); 0: a linear layer."""
    swapped: bool = False
    """Whether PEFT takes the experts' inputs for their outputs (`lora_experts.is_swapped`)."""

    def parts(self) -> dict[str, TensorEntry]:
        """The tensors, by the names that they have within a layer of PEFT's."""
        parts = {"lora_A": self.a, "lora_B": self.b}
        return parts if self.magnitude is None else {**parts, "lora_magnitude_vector": self.magnitude}


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter changes."""

    path: Path
    base: str
    """The folder that it was trained on, as its configuration names it; may be empty."""
    config: Mapping[str, Any]
    """adapter_config.json."""
    low_rank: dict[str, LowRankUpdate] = field(default_factory=dict)
    """Updates by the name of the module, or of the experts' parameter, in transformers' class."""
    whole: dict[str, TensorEntry] = field(default_factory=dict)
    """Trained whole (`modules_to_save`, biases), by the parameter's name."""

    def layers_as_parameters(self) -> list[str]:
        """The linear layers that the configuration names by their parameter `weight`."""
        parameters = sorted(self.config.get("target_parameters") or ())
        return [module for module in self.low_rank if matches_any_suffix(parameters, f"{module}.weight")]

    def peft_config(self) -> peft.LoraConfig:
        """What PEFT's layers need to know to compute with it."""
        return peft.LoraConfig(
            use_rslora=bool(self.config.get("use_rslora")),
            use_dora=bool(self.config.get("use_dora")),
            target_modules=[],
            task_type="CAUSAL_LM",
        )


def read_saved_adapter(path: Path) -> SavedAdapter:
    """Read a folder's configuration and its file's header.

    Raises:
        UserError: it is no folder of a LoRA adapter, something is missing or of the wrong shape, or it has something
            that is not known here.
    """
    config = read_adapter_config(path)
    check_adapter_type(config, path)
    entries = read_safetensors_header(path / ADAPTER_WEIGHTS_NAME)
    parts: dict[str, dict[str, TensorEntry]] = {}
    whole: dict[str, TensorEntry] = {}
    for key, entry in entries.items():
        name = key.removeprefix(PEFT_PREFIX)
        if (part := split_lora_key(key)) is not None:
            parts.setdefault(part[0], {})[part[1]] = entry
        elif ".lora_embedding_" in name:
            raise UserError(
                f"{path}: has LoRA on an embedding ({name.partition('.lora_')[0]}), which is not known here; merge it "
                "with PEFT, or train the embedding whole (lora.modules_to_save)"
            )
        elif name == key or "lora_" in name:
            raise UserError(f"{path}: holds {key}, which is not known here; only LoRA of linear layers and experts is")
        elif ".original_module." not in name:  # PEFT keeps the base's rows beside those of a resized embedding
            # a bias of a layer that has an update too; an embedding that was resized, as PEFT names it then
            whole[parameter_name(key)] = entry
    if not parts and not whole:
        raise UserError(f"{path / ADAPTER_WEIGHTS_NAME}: holds no tensors of an adapter; export the adapter again")
    low_rank = {}
    try:
        for module, found in parts.items():
            parameter = expert_parameter_name(module, config)
            low_rank[parameter or module] = _low_rank(parameter or module, found, config, path, parameter is not None)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(
            f"{path / ADAPTER_CONFIG_NAME}: is not as PEFT writes it ({error}); export the adapter again"
        ) from None
    return SavedAdapter(path, str(config.get("base_model_name_or_path") or ""), config, low_rank, whole)


def missing_module_error(adapter: SavedAdapter, module: str, base: Path) -> UserError:
    """The error about a matrix that an adapter changes and a model lacks."""
    if _ONE_EXPERT.search(module):
        return UserError(
            f"{adapter.path}: adapts {module}, one expert's layer as transformers 4 had it; load the adapter with PEFT "
            "(PeftModel.from_pretrained) and save it again (save_pretrained), which puts the experts together"
        )
    return UserError(f"{adapter.path}: adapts {module}, which {base} lacks; give the model that it was trained on")


def _low_rank(
    module: str, entries: Mapping[str, TensorEntry], config: Mapping[str, Any], path: Path, experts: bool
) -> LowRankUpdate:
    a, b, magnitude = (entries.get(part) for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
    if a is None or b is None or (magnitude is None) == bool(config.get("use_dora")):
        missing = "lora_A" if a is None else "lora_B" if b is None else "lora_magnitude_vector"
        raise UserError(f"{path}: {module} lacks its {missing}, or has it without need; export the adapter again")
    rank = int(get_pattern_value(config.get("rank_pattern"), module, config.get("r", PEFT_DEFAULT_R_AND_ALPHA)))
    alpha = float(
        get_pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", PEFT_DEFAULT_R_AND_ALPHA))
    )
    count = a.shape[0] // rank if experts and a.shape and rank > 0 else 1
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == count * rank > 0:
        raise UserError(f"{path}: {module} has A {a.shape} and B {b.shape} for rank {rank}; export the adapter again")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRankUpdate(a, b, rank, alpha, scaling, magnitude, count if experts else 0)
