"""Adding the adapter to a skeleton, and giving it its first values."""

from __future__ import annotations

import copy
import hashlib
import math
import re
import warnings
from collections.abc import Iterator

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.adapters.lora import LoraNF4, LoraOfBytes
from qlora_dist.adapters.lora_experts import LoraExperts
from qlora_dist.config import LoraConfig
from qlora_dist.errors import UserError
from qlora_dist.nf4.experts import NF4Experts
from qlora_dist.nf4.linear import NF4Linear

ADAPTER_NAME = "default"


def peft_config(model: PreTrainedModel, config: LoraConfig, base: str) -> peft.LoraConfig:
    """PEFT's configuration of the adapter, with `all-linear` resolved to the layers' names.

    Args:
        model: whose linear layers are NF4Linear.
        config: the `lora` section.
        base: the base model's folder, recorded in the adapter.

    Raises:
        UserError: a target is the name of no quantized layer, or the model has no experts to adapt, or no such module
            to train whole.
    """
    read = weight_read_names(model)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, NF4Linear)} - read
    if config.targets == "all-linear":
        targets = sorted(names)
    else:
        targets = sorted(set(config.targets))
        if passed := sorted(read.intersection(targets)):
            raise UserError(
                f"lora.targets: the model's code reads the weight of {passed[0]} itself, where an adapter has no "
                f"effect; choose from {', '.join(sorted(names))}"
            )
        unknown = [target for target in targets if target not in names]
        if unknown:
            raise UserError(
                f"lora.targets: {unknown[0]} is no quantized layer of {base}; choose from {', '.join(sorted(names))}"
            )
    modules_to_save = _modules_to_save(model, config.modules_to_save, base)
    experts = sorted({re.sub(r".*\.\d+\.", "", path) for path in _experts(model)}) if config.experts else []
    if config.experts and not experts:
        raise UserError(f"lora.experts: {base} has no experts in 4 bit; leave the key out")
    result = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        target_parameters=experts or None,  # elsewhere experts are parameters of a module
        modules_to_save=modules_to_save or None,
        ensure_weight_tying=bool(modules_to_save) and has_tied_head(model),
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    use_our_layers(result)
    return result


def weight_read_names(model: nn.Module) -> set[str]:
    """Return the last names of layers whose weight the model's code reads itself: an adapter would have no effect."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear))
    return {name.rpartition(".")[2] for name, module in found if module.is_weight_read}


def use_our_layers(config: peft.LoraConfig) -> None:
    """Have PEFT put our layers around those in 4 bit."""
    ours: dict[type, type] = {NF4Linear: LoraNF4, NF4Experts: LoraExperts}
    config._register_custom_module(ours)


def attach_adapter(model: nn.Module, config: peft.LoraConfig, name: str = ADAPTER_NAME) -> None:
    """Put the adapter into a model on the meta device, in fp32. Everything else is frozen.

    `inject_adapter_in_model` rather than `get_peft_model`: the model stays the class and keeps the names that
    transformers gave it. Others may have been put in before, under other names.

    Raises:
        UserError: PEFT does not accept the targets.
    """
    config = copy.copy(config)  # here experts are modules, whose last names may also be those of linear layers
    if config.target_parameters:
        config.target_modules = {*config.target_modules, *_experts(model)}
        config.target_parameters = None
    else:
        config.exclude_modules = _experts(model) or None
    whole, config.modules_to_save = set(config.modules_to_save or ()), None
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # of another adapter
            peft.inject_adapter_in_model(config, model, adapter_name=name)
    except ValueError as error:  # PEFT takes names of some sparse models for those of experts, which belong together
        raise UserError(f"lora.targets: {str(error).rstrip('.')}; name all of them, or none") from None
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(is_lora(parameter_name))
    for path, module in model.named_modules():
        if path in whole:  # in its place: PEFT would keep the frozen module beside the trained one
            module.to(torch.float32)
            module.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, LoraOfBytes):
            for part in (module.lora_A, module.lora_B, module.lora_magnitude_vector):
                part.to(torch.float32)


def _modules_to_save(model: nn.Module, names: list[str], base: str) -> list[str]:
    """The whole names of modules that are to be trained whole: PEFT takes a part for the end of any name."""
    paths: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and all(p.is_floating_point() and p.dim() < 3 for p in parameters):
            paths.setdefault(path.rpartition(".")[2], []).append(path)
    for name in names:
        if name not in paths:
            raise UserError(
                f"lora.modules_to_save: {name} is no module of {base} whose own weights are in 16 bit; choose from "
                f"{', '.join(sorted(paths))}"
            )
    return sorted(path for name in set(names) for path in paths[name])


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether a skeleton's output head is its embedding: it has no parameter of its own then."""
    return not any(True for _ in model.get_output_embeddings().parameters())


def is_lora(name: str) -> bool:
    """Whether a parameter, by its name, is one that the adapter adds; the others have values in the folder."""
    return "lora_" in name


def is_lora_b(name: str) -> bool:
    """Whether it is a B matrix, which LoRA+ teaches faster."""
    return ".lora_B." in name


def _experts(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, NF4Experts)]


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def first_values(name: str, shape: torch.Size, seed: int) -> torch.Tensor | None:
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
