"""Adding the adapter to a skeleton, and giving it its first values."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.adapters.lora import NF4LoraLinear
from qlora_dist.adapters.lora_experts import NF4LoraExperts, peft_swaps_in_out
from qlora_dist.adapters.targets import AdapterTargets, find_targets, peft_target_names, targets_from_peft_config
from qlora_dist.compat.peft import LoraLayer, dispatch_default, peft
from qlora_dist.config.sections import LoraConfig
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import target_module_name
from qlora_dist.nf4.experts import NF4Experts
from qlora_dist.nf4.linear import NF4Linear

ADAPTER_NAME = "default"


def make_peft_config(model: PreTrainedModel, config: LoraConfig, base: str) -> peft.LoraConfig:
    """PEFT's configuration of the adapter, whose names mean the matrices that the section `lora` asks for.

    Args:
        model: a skeleton without adapters.
        config: the section.
        base: the base model's folder, recorded in the adapter.

    Raises:
        UserError: a target is the name of no quantized layer, or the model has no experts to adapt, or no such module
            to train whole, or PEFT knows no such adapter.
    """
    targets = find_targets(model, config, base)
    modules_to_save = _modules_to_save(model, config.modules_to_save, base)
    modules, parameters = peft_target_names(model, targets)
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
        ensure_weight_tying=bool(modules_to_save) and has_tied_head(model),
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def weight_read_names(model: nn.Module) -> set[str]:
    """Return the last names of layers whose weight the model's code reads itself: an adapter would have no effect."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear))
    return {target_module_name(name) for name, module in found if module.is_weight_read}


def attach_adapter(model: PreTrainedModel, config: peft.LoraConfig, name: str = ADAPTER_NAME) -> None:
    """Put a new adapter into a model on the meta device, in fp32. Everything else is frozen.

    Layers are put in by hand rather than by PEFT's `inject_adapter_in_model`: its conversion of names from transformers
    4 misreads a skeleton. The model stays the class and keeps the names that transformers gave it.

    Args:
        model: without adapters.
        config: as `make_peft_config` gives it.
        name: of the adapter.
    """
    modules_to_save = set(config.modules_to_save or ())
    targets = targets_from_peft_config(model, config)
    for path in (*targets.linear, *targets.experts):
        add_lora_layer(model, path, config, name, config.r, config.lora_alpha)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(is_lora_parameter(parameter_name))
    for path, module in model.named_modules():
        if path in modules_to_save:  # in its place: PEFT would keep the frozen module beside the trained one
            module.to(torch.float32)
            module.requires_grad_(True)


def add_lora_layer(model: nn.Module, path: str, config: peft.LoraConfig, name: str, r: int, alpha: float) -> None:
    """Put the matrices of an adapter, on meta and in fp32, beside one of the model's.

    Args:
        model: on meta; other adapters may be in it.
        path: of the layer, without the `base_layer` of another adapter.
        config: says what else is computed (rsLoRA, DoRA, dropout).
        name: of the adapter.
        r: of this matrix.
        alpha: of this matrix.
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
    if isinstance(layer, NF4Linear):
        return NF4LoraLinear(layer, name, config, r=r, lora_alpha=alpha)
    if isinstance(layer, NF4Experts):
        return NF4LoraExperts(layer, name, config, r=r, lora_alpha=alpha, swap_in_out=peft_swaps_in_out(owner))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # a copy of the configuration gets it right
        wrapped: nn.Module | None = dispatch_default(layer, name, copy.copy(config), r=r, lora_alpha=alpha)
    assert wrapped is not None, f"PEFT has no LoRA for {type(layer).__name__}"
    return wrapped


def adapted_paths(model: nn.Module) -> set[str]:
    """The paths of the layers that have an adapter."""
    return {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def check_attached_targets(model: nn.Module, targets: AdapterTargets, base: str) -> None:
    """See whether each matrix that was asked for has an adapter, and no other one.

    Raises:
        UserError: it is not so.
    """
    adapted = adapted_paths(model)
    if adapted != targets.paths:
        odd = min(adapted ^ targets.paths)
        raise UserError(
            f"lora.targets: {len(targets.paths)} matrices of {base} are to have an adapter and {len(adapted)} have, "
            f"such as {odd}, which {'has one' if odd in adapted else 'has none'}; set lora.targets to names without it"
        )


def _modules_to_save(model: PreTrainedModel, names: list[str], base: str) -> list[str]:
    """The whole names of modules that are to be trained whole: PEFT takes a part for the end of any name."""
    paths: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and all(p.is_floating_point() and p.dim() < 3 for p in parameters):
            paths.setdefault(path.rpartition(".")[2], []).append(path)
    for name in names:
        if name not in paths and has_tied_head(model) and _is_head(model, name):
            raise UserError(
                f"lora.modules_to_save: {name} is the embedding in {base} (tied); leave it out, it follows embed_tokens"
            )
        if name not in paths:
            raise UserError(
                f"lora.modules_to_save: {name} is no module of {base} whose own weights are in 16 bit; choose from "
                f"{', '.join(sorted(paths))}"
            )
    return sorted(path for name in set(names) for path in paths[name])


def _is_head(model: PreTrainedModel, name: str) -> bool:
    head = model.get_output_embeddings()
    return any(module is head and path.rpartition(".")[2] == name for path, module in model.named_modules())


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether a skeleton's output head is its embedding: it has no parameter of its own then."""
    return not any(True for _ in model.get_output_embeddings().parameters())


def is_lora_parameter(name: str) -> bool:
    """Whether a parameter, by its name, is one that the adapter adds; the others have values in the folder."""
    return "lora_" in name


def is_lora_b_parameter(name: str) -> bool:
    """Whether it is a B matrix, which LoRA+ teaches faster."""
    return ".lora_B." in name


def named_trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def init_lora_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor | None:
    """An adapter parameter's value before training, fp32 on the CPU, or None where it follows from the base (DoRA).

    A is uniform in +-1/sqrt(in_features) and B is zero, as in PEFT (`nn.init.kaiming_uniform_(a=sqrt(5))`). Each has
    a generator of its own, seeded by its name: the values are the same on every number of ranks.
    """
    if "lora_magnitude_vector" in name:
        return None
    if "lora_B" in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
