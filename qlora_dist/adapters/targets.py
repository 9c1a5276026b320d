"""Matrices of a model that get an adapter, and the names that select them in PEFT's configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qlora_dist.compat.peft import check_target_module_exists, convert_peft_config_for_transformers, peft
from qlora_dist.compat.torch import module_parameters
from qlora_dist.config.sections import LoraConfig
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import matches_any_suffix, target_module_name
from qlora_dist.layers.experts import QuantizedExperts
from qlora_dist.layers.linear import QuantizedLinear

_LAYER = re.compile(r".*\.\d+\.(?=[^.]*[^.\d])")
_TYPES_WITHOUT_OUT_PROJ = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Types of models with Mamba's layers, whose `out_proj` PEFT does not adapt."""


@dataclass(frozen=True)
class AdapterTargets:
    """Paths of the matrices that get an adapter, in the model's order."""

    linear: tuple[str, ...]
    experts: tuple[str, ...] = ()
    """Paths of projections of all experts of a layer, which are parameters in transformers' class."""

    @property
    def paths(self) -> set[str]:
        return {*self.linear, *self.experts}


def weight_read_names(model: nn.Module) -> set[str]:
    """Return the names of layers whose weight the model's code reads itself, so that an adapter has no effect."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))
    return {target_module_name(name) for name, module in layers if module.is_weight_read}


def find_targets(model: PreTrainedModel, config: LoraConfig, base: str) -> AdapterTargets:
    """Find the matrices that the section `lora` requests in a model on meta without adapters.

    Raises:
        UserError: a target is no quantized layer, the model's code reads its weight itself, PEFT could not read its
            adapter, or there are no experts. The message names `base`, the base model's folder.
    """
    read = weight_read_names(model)
    linear = [path for path in _paths(model, QuantizedLinear) if target_module_name(path) not in read]
    names = sorted({target_module_name(path) for path in linear})
    chosen = linear
    if config.targets != "all-linear":
        for target in config.targets:
            if target in read:
                raise UserError(
                    f"lora.targets: the model's code reads the weight of {target} itself, where an adapter has no "
                    f"effect; choose from {', '.join(names)}"
                )
            if target not in names:
                raise UserError(
                    f"lora.targets: {target} is no quantized layer of {base}; choose from {', '.join(names)}"
                )
        chosen = [path for path in linear if target_module_name(path) in config.targets]
    out_proj_paths = [path for path in chosen if target_module_name(path) == "out_proj"]
    if out_proj_paths and getattr(getattr(model, "config", None), "model_type", None) in _TYPES_WITHOUT_OUT_PROJ:
        rest = sorted({target_module_name(path) for path in chosen if path not in out_proj_paths})
        raise UserError(
            f"lora.targets: PEFT reads no adapter of out_proj, here {out_proj_paths[0]} of {base}; name others, such "
            f"as [{', '.join(rest)}]"
        )
    experts = _paths(model, QuantizedExperts) if config.experts else []
    if config.experts and not experts:
        raise UserError(f"lora.experts: {base} has no experts in 4 bit; leave the key out")
    if not chosen and not experts:
        raise UserError(f"lora.targets: {base} has no quantized linear layer; set lora.experts: true")
    return AdapterTargets(tuple(chosen), tuple(experts))


def targets_from_peft_config(model: nn.Module, config: peft.LoraConfig) -> AdapterTargets:
    """Return the matrices of a model on meta, without adapters, that PEFT's configuration selects.

    These are PEFT's rules without its conversion of names from transformers 4. The conversion would mistake the paths
    of QuantizedExperts, which replace the experts' parameters, for old linear layers.
    """
    parameters = sorted(config.target_parameters or ())
    linear = [
        path
        for path in _paths(model, QuantizedLinear)
        if check_target_module_exists(config, path) or matches_any_suffix(parameters, f"{path}.weight")
    ]
    experts = [path for path in _paths(model, QuantizedExperts) if matches_any_suffix(parameters, path)]
    return AdapterTargets(tuple(linear), tuple(experts))


def peft_target_names(
    model: PreTrainedModel, targets: AdapterTargets, left_out: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Return `target_modules` and `target_parameters` with which PEFT adapts exactly the targets.

    `left_out` names modules and parameters of transformers' class that the model lacks, such as a tower's.

    If a model's experts were linear layers in transformers 4, PEFT mistakes some names of linear layers for experts
    (`_convert_peft_config_moe`). Such layers are named by their parameter, as `mlp.up_proj.weight`, which PEFT does not
    convert. The adapter's tensors are the same.
    """
    modules = [path for path, module in model.named_modules() if path and not isinstance(module, QuantizedExperts)]
    converted = {name for name in {path.rpartition(".")[2] for path in targets.linear} if _peft_converts(model, name)}
    plain = [path for path in targets.linear if path.rpartition(".")[2] not in converted]
    as_parameters = [f"{path}.weight" for path in targets.linear if path.rpartition(".")[2] in converted]
    parameters = [
        path if isinstance(module, QuantizedExperts) else f"{path}.{'weight' if name == 'packed' else name}"
        for path, module in model.named_modules()
        for name in module_parameters(module)
    ]
    return (
        _shortest_suffixes(plain, [*modules, *left_out], (target_module_name, _in_layer)),
        _shortest_suffixes([*as_parameters, *targets.experts], [*parameters, *left_out], (_in_layer,)),
    )


def _in_layer(path: str) -> str:
    return _LAYER.sub("", path)


def _shortest_suffixes(
    paths: Collection[str], known: Sequence[str], shorten: Sequence[Callable[[str], str]]
) -> list[str]:
    """Return suffixes that match these paths and no other known path, or the whole path if there is none.

    The functions of `shorten` return a suffix of a path, the shortest first.
    """
    remaining, names = set(paths), set()
    for suffix in shorten:
        for name in {suffix(path) for path in remaining}:
            matches = {path for path in known if matches_any_suffix([name], path)}
            if matches <= set(paths):
                names.add(name)
                remaining -= matches
    return sorted(names | remaining)


def _peft_converts(model: PreTrainedModel, name: str) -> bool:
    probe = peft.LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:  # PEFT requires other names beside it
        return True
    return name not in probe.target_modules


def _paths(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, kind)]
