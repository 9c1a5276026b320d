"""Contents of a LoRA adapter's folder, written by this package or by PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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
from qlora_dist.layers.token_rows import TOKEN_ROWS_NAME

_UNSUPPORTED_KEYS = {
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "lora_bias": "a bias of B",
}
"""Features of PEFT that are not supported, by key of adapter_config.json."""
_TOKEN_ROWS_SUFFIX = f".token_adapter.{TOKEN_ROWS_NAME}"
_INITS_THAT_CHANGE_BASE = ("pissa", "olora", "corda", "loftq")
_EXPERT_MODULE = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate:
    """Saved update of one matrix."""

    a: TensorEntry
    """[r, in_features]; for experts [experts * r, in_features] with an expert's rows together."""
    b: TensorEntry
    """[out_features, r]; for experts [out_features, r * experts] with an expert's columns `experts` apart."""
    rank: int
    alpha: float
    scaling: float
    """alpha / r, or alpha / sqrt(r) with rsLoRA."""
    magnitude: TensorEntry | None
    """Magnitudes of DoRA, [out_features]; None: plain LoRA."""
    experts: int = 0
    """Number of experts with a pair of matrices each (`peft.tuners.lora.layer.ParamWrapper`); 0: a linear layer."""
    swap_in_out: bool = False
    """Whether PEFT confuses the experts' inputs with their outputs (`lora_experts.peft_swaps_in_out`)."""

    def entries(self) -> dict[str, TensorEntry]:
        factors = {"lora_A": self.a, "lora_B": self.b}
        return factors if self.magnitude is None else {**factors, "lora_magnitude_vector": self.magnitude}


@dataclass(frozen=True)
class SavedTokenRows:
    """Saved rows of an embedding or an output head, which replace the model's."""

    ids: tuple[int, ...]
    """Token ids of the rows, in the order of the file."""
    entry: TensorEntry
    """[len(ids), h]."""


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """Configuration and tensors of an adapter's folder."""

    path: Path
    base: str
    """Folder of the base model in the adapter's configuration; may be empty."""
    config: Mapping[str, Any]
    """Content of adapter_config.json."""
    low_rank: dict[str, LowRankUpdate] = field(default_factory=dict)
    """Updates by the name of the module, or of the experts' parameter, in transformers' class."""
    full_tensors: dict[str, TensorEntry] = field(default_factory=dict)
    """Fully trained tensors (`modules_to_save`, biases), by the parameter's name."""
    token_rows: dict[str, SavedTokenRows] = field(default_factory=dict)
    """Trained rows (`trainable_token_indices`) by the path of the embedding or head."""

    def layers_as_parameters(self) -> list[str]:
        """Return the linear layers that the configuration names by their parameter `weight`."""
        parameters = sorted(self.config.get("target_parameters") or ())
        return [module for module in self.low_rank if matches_any_suffix(parameters, f"{module}.weight")]

    def peft_config(self) -> peft.LoraConfig:
        """Return the configuration that PEFT's layers need for their computation."""
        return peft.LoraConfig(
            use_rslora=bool(self.config.get("use_rslora")),
            use_dora=bool(self.config.get("use_dora")),
            target_modules=[],
            task_type="CAUSAL_LM",
        )


def read_saved_adapter(path: Path) -> SavedAdapter:
    """Read a folder's configuration and its file's header."""
    config = read_adapter_config(path)
    _check_adapter_type(config, path)
    entries = read_safetensors_header(path / ADAPTER_WEIGHTS_NAME)
    parts: dict[str, dict[str, TensorEntry]] = {}
    full_tensors: dict[str, TensorEntry] = {}
    token_rows: dict[str, SavedTokenRows] = {}
    for key, entry in entries.items():
        name = key.removeprefix(PEFT_PREFIX)
        if (part := split_lora_key(key)) is not None:
            parts.setdefault(part[0], {})[part[1]] = entry
        elif name.endswith(_TOKEN_ROWS_SUFFIX):
            module = name.removesuffix(_TOKEN_ROWS_SUFFIX)
            token_rows[module] = _saved_token_rows(module, entry, config, path)
        elif ".lora_embedding_" in name:
            raise UserError(
                f"{path}: has LoRA on an embedding ({name.partition('.lora_')[0]}), which is not supported; merge it "
                "with PEFT, or train the whole embedding (lora.modules_to_save)"
            )
        elif name == key or "lora_" in name:
            raise UserError(
                f"{path}: holds {key}, but only LoRA of linear layers and experts is supported; use it with PEFT"
            )
        elif ".original_module." not in name:  # PEFT also saves the base's rows of a resized embedding
            # a module to save, the bias of a layer with an update, or a resized embedding
            full_tensors[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = entry
    if not parts and not full_tensors and not token_rows:
        raise UserError(f"{path / ADAPTER_WEIGHTS_NAME}: holds no tensors of an adapter; export the adapter again")
    low_rank = {}
    try:
        for module, factors in parts.items():
            parameter = expert_parameter_name(module, config)
            name = parameter or module
            low_rank[name] = _low_rank_update(name, factors, config, path, is_experts=parameter is not None)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(
            f"{path / ADAPTER_CONFIG_NAME}: is not as PEFT writes it ({error}); export the adapter again"
        ) from None
    return SavedAdapter(
        path=path,
        base=str(config.get("base_model_name_or_path") or ""),
        config=config,
        low_rank=low_rank,
        full_tensors=full_tensors,
        token_rows=token_rows,
    )


def _check_adapter_type(config: Mapping[str, Any], path: Path) -> None:
    """Raise a UserError unless an adapter is LoRA on an unchanged base, without unsupported features."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: is an adapter of type {config.get('peft_type')}, not LORA; use it with PEFT")
    for key, feature in _UNSUPPORTED_KEYS.items():
        if config.get(key):
            raise UserError(f"{path}: has {feature} ({key}), which is not supported; load it with PEFT")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_BASE):
        raise UserError(
            f"{path}: was initialized by {init}, which changed the base's weights too; save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )


def find_invalid_values(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return what is wrong with an adapter's tensors, given by PEFT's names; None if nothing is.

    Values must be finite. If every B is zero, as before training, the adapter changes nothing.
    """
    has_b = changes = False
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} holds values that are not finite"
        if ".lora_B." in name:
            has_b, changes = True, changes or bool(tensor.any())
    return "every B is zero, so it changes nothing" if has_b and not changes else None


def missing_module_error(adapter: SavedAdapter, module: str, base: Path) -> UserError:
    """Return the error about a matrix that an adapter changes and a model lacks."""
    if _EXPERT_MODULE.search(module):
        return UserError(
            f"{adapter.path}: adapts {module}, one expert's layer as transformers 4 had it; load the adapter with PEFT "
            "(PeftModel.from_pretrained) and save it again (save_pretrained), which joins the experts"
        )
    return UserError(
        f"{adapter.path}: adapts {module}, which the language model of {base} lacks; give the model that it was "
        "trained on, or use an adapter of other parts with PEFT"
    )


def _saved_token_rows(module: str, entry: TensorEntry, config: Mapping[str, Any], path: Path) -> SavedTokenRows:
    """Return a module's rows with their ids: PEFT lists ids for the input embedding, or by the end of a path."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((ids for name, ids in indices.items() if module.endswith(name)), None)
    ids = indices if isinstance(indices, list) else []
    is_valid = all(isinstance(token, int) and token >= 0 for token in ids) and len(set(ids)) == len(ids)
    if not is_valid or len(entry.shape) != 2 or entry.shape[0] != len(ids):
        raise UserError(
            f"{path}: has rows of {module} of the shape {entry.shape}, which trainable_token_indices in "
            f"{ADAPTER_CONFIG_NAME} does not match; export the adapter again"
        )
    return SavedTokenRows(tuple(ids), entry)


def _low_rank_update(
    module: str, entries: Mapping[str, TensorEntry], config: Mapping[str, Any], path: Path, *, is_experts: bool
) -> LowRankUpdate:
    a, b, magnitude = (entries.get(part) for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
    if a is None or b is None or (magnitude is None) == bool(config.get("use_dora")):
        missing = "lora_A" if a is None else "lora_B" if b is None else "lora_magnitude_vector"
        raise UserError(f"{path}: {module} lacks its {missing}, or has one without DoRA; export the adapter again")
    rank = int(get_pattern_value(config.get("rank_pattern"), module, config.get("r", PEFT_DEFAULT_R_AND_ALPHA)))
    default_alpha = config.get("lora_alpha", PEFT_DEFAULT_R_AND_ALPHA)
    alpha = float(get_pattern_value(config.get("alpha_pattern"), module, default_alpha))
    count = a.shape[0] // rank if is_experts and a.shape and rank > 0 else 1
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == count * rank > 0:
        raise UserError(f"{path}: {module} has A {a.shape} and B {b.shape} for rank {rank}; export the adapter again")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRankUpdate(
        a=a, b=b, rank=rank, alpha=alpha, scaling=scaling, magnitude=magnitude, experts=count if is_experts else 0
    )
