"""Adapter on a model without weights, and its initial values."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.adapters.lora import QuantizedLoraLinear
from qlora_dist.adapters.lora_experts import QuantizedLoraExperts, peft_swaps_in_out
from qlora_dist.adapters.targets import AdapterTargets, find_targets, peft_target_names, targets_from_peft_config
from qlora_dist.adapters.trainable_tokens import attach_vocabulary, trainable_token_indices
from qlora_dist.compat.peft import LoraLayer, dispatch_default, peft
from qlora_dist.config.sections import LoraConfig
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import target_module_name
from qlora_dist.layers.experts import QuantizedExperts
from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.layers.token_rows import is_token_rows_parameter

ADAPTER_NAME = "default"


def make_peft_config(
    model: PreTrainedModel, config: LoraConfig, base: str, left_out: Collection[str] = (), token_ids: Sequence[int] = ()
) -> peft.LoraConfig:
    """Make PEFT's configuration of the adapter that the section `lora` describes.

    The model is on meta, without adapters. The adapter records `base`, the base model's folder. `left_out` names the
    modules and parameters of transformers' class that the model lacks. PEFT must not adapt them. `token_ids` are the
    rows of embedding and head that are trained, unless the whole module is.

    Raises:
        UserError: the model lacks a target, experts, or a module of `modules_to_save`, or PEFT cannot adapt them so.
    """
    targets = find_targets(model, config, base)
    modules_to_save = _modules_to_save(model, config.modules_to_save, base)
    modules, parameters = peft_target_names(model, targets, left_out)
    if config.dora and (names := sorted({target_module_name(p.removesuffix(".weight")) for p in parameters})):
        raise UserError(
            f"lora.dora: PEFT adapts {', '.join(names)} of this model as parameters, without DoRA; set "
            "lora.dora: false, or leave them out of lora.targets"
        )
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=modules_to_save or None,
        trainable_token_indices=trainable_token_indices(model, token_ids, modules_to_save),
        ensure_weight_tying=bool(modules_to_save) and has_tied_head(model),
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def attach_adapter(
    model: PreTrainedModel, config: peft.LoraConfig, name: str = ADAPTER_NAME, *, vocabulary: int = 0
) -> None:
    """Add a new fp32 adapter to a model on meta without adapters, and freeze all other parameters.

    PEFT's `inject_adapter_in_model` is not used, because its conversion of names from transformers 4 misreads a model
    with QuantizedExperts. The model keeps its class and transformers' names. Embedding and head get
    at least `vocabulary` rows, if they are trained whole.
    """
    modules_to_save = set(config.modules_to_save or ())
    if modules_to_save or config.trainable_token_indices:
        attach_vocabulary(model, modules_to_save, config.trainable_token_indices or {}, vocabulary)
    targets = targets_from_peft_config(model, config)
    for path in (*targets.linear, *targets.experts):
        add_lora_layer(model, path, config, name, config.r, config.lora_alpha)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter_parameter(parameter_name))
    for path, module in model.named_modules():
        if path in modules_to_save:  # without PEFT's wrapper, which would keep the frozen module too
            module.to(torch.float32)
            module.requires_grad_(True)


def add_lora_layer(model: nn.Module, path: str, config: peft.LoraConfig, name: str, r: int, alpha: float) -> None:
    """Add an adapter's matrices, on meta and in fp32, to one layer of a model on meta, which may have other adapters.

    `path` omits the `base_layer` of another adapter. Rank and alpha are the layer's, the variant of LoRA and the
    dropout are in `config`.
    """
    layer = model.get_submodule(path)
    with torch.device("meta"):
        if isinstance(layer, LoraLayer):
            layer.update_layer(name, r, lora_alpha=alpha, config=config)
        else:
            owner = model.get_submodule(path.rpartition(".")[0])
            layer = _wrap_with_lora(layer, name, config, r, alpha, owner)
            model.set_submodule(path, layer)
    for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        part.to(torch.float32)


def _wrap_with_lora(
    layer: nn.Module, name: str, config: peft.LoraConfig, r: int, alpha: float, owner: nn.Module
) -> nn.Module:
    if isinstance(layer, QuantizedLinear):
        return QuantizedLoraLinear(layer, name, config, r=r, lora_alpha=alpha)
    if isinstance(layer, QuantizedExperts):
        return QuantizedLoraExperts(layer, name, config, r=r, lora_alpha=alpha, swap_in_out=peft_swaps_in_out(owner))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # PEFT sets it in its copy
        wrapped: nn.Module | None = dispatch_default(layer, name, copy.copy(config), r=r, lora_alpha=alpha)
    assert wrapped is not None, f"PEFT has no LoRA for {type(layer).__name__}"
    return wrapped


def adapted_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def check_attached_targets(model: nn.Module, targets: AdapterTargets, base: str) -> None:
    """Check that exactly the requested matrices have an adapter."""
    adapted = adapted_paths(model)
    if adapted != targets.paths:
        differing = min(adapted ^ targets.paths)
        raise UserError(
            f"lora.targets: {len(targets.paths)} matrices of {base} must have an adapter, but {len(adapted)} have one; "
            f"{differing} has {'one' if differing in adapted else 'none'}; set lora.targets to names without it"
        )


def _modules_to_save(model: PreTrainedModel, names: list[str], base: str) -> list[str]:
    """Return full names of the modules to train, because PEFT matches a shorter name with the end of any name."""
    paths: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and all(p.is_floating_point() and p.dim() < 3 for p in parameters):
            paths.setdefault(path.rpartition(".")[2], []).append(path)
    for name in names:
        if name not in paths and has_tied_head(model) and _is_head(model, name):
            raise UserError(
                f"lora.modules_to_save: {name} is tied to the embedding in {base}; leave it out, because it follows "
                "embed_tokens"
            )
        if name not in paths:
            raise UserError(
                f"lora.modules_to_save: {name} is no module of {base} with weights in 16 bit; choose from "
                f"{', '.join(sorted(paths))}"
            )
    return sorted(path for name in set(names) for path in paths[name])


def _is_head(model: PreTrainedModel, name: str) -> bool:
    head = model.get_output_embeddings()
    return any(module is head and path.rpartition(".")[2] == name for path, module in model.named_modules())


def has_tied_head(model: PreTrainedModel) -> bool:
    """Return whether the output head has no own parameters, because it is tied to the embedding."""
    return not any(True for _ in model.get_output_embeddings().parameters())


def is_lora_parameter(name: str) -> bool:
    """Return whether it is a matrix or magnitude of LoRA."""
    return "lora_" in name


def is_adapter_parameter(name: str) -> bool:
    """Return whether the adapter adds the parameter of this name. The folder has the values of all others."""
    return is_lora_parameter(name) or is_token_rows_parameter(name)


def is_lora_b_parameter(name: str) -> bool:
    """Return whether it is a B matrix, which has a higher learning rate with LoRA+."""
    return ".lora_B." in name


def named_trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def seed_from_name(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") % 2**63


def init_lora_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor | None:
    """Return a parameter's initial value, fp32 on the CPU; None for DoRA's magnitudes, which depend on the base.

    A is uniform in +-1/sqrt(in_features) and B is zero, as in PEFT (`nn.init.kaiming_uniform_(a=sqrt(5))`). The
    generator is seeded with the parameter's name, so the values do not depend on the number of ranks.
    """
    if "lora_magnitude_vector" in name:
        return None
    if "lora_B" in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed_from_name(seed, name))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
