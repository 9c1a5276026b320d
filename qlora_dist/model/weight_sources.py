"""Map from a model's tensors to the tensors of a folder from which they are made.

On loading, transformers renames a folder's tensors, and stacks the matrices of a layer's experts into one parameter.
Here its rules (`transformers.conversion_mapping`) are applied to the names alone, without reading a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora_dist.errors import UserError
from qlora_dist.nf4.quant_state import expert_key

_EXPERT_KEY = re.compile(r"(?P<tensor>.+)\.(?P<expert>\d+)\.weight")


@dataclass(frozen=True)
class WeightSource:
    """Tensors of a folder from which one tensor of a model is made."""

    keys: tuple[str, ...]
    """Names in the folder. Stacked experts are listed expert by expert, each expert's matrices from top to bottom."""
    experts: int = 0
    """Number of experts whose matrices are separate tensors; 0: `keys` are concatenated along the rows."""
    may_be_transposed: bool = False
    """Whether transformers transposes the tensor of all experts if its shape is not the parameter's."""


def stacked_tensor_name(key: str, expert: int) -> str:
    """Return the stacked tensor's name if `key` is the `expert_key` of its matrix `expert`, else `key`."""
    match = _EXPERT_KEY.fullmatch(key)
    return match["tensor"] if match and key == expert_key(match["tensor"], expert) else key


def find_weight_sources(model: PreTrainedModel, names: Iterable[str]) -> dict[str, WeightSource]:
    """Find the source of each of the model's tensors that the folder holds.

    `model` is transformers' own class, on meta. A 4-bit weight counts as one tensor in `names`, the folder's tensors.

    Raises:
        UserError: transformers rearranges a tensor on loading in an unsupported way.
    """
    converter_of = {
        pattern: transform
        for transform in get_model_conversion_mapping(model)
        if isinstance(transform, WeightConverter)
        for pattern in transform.source_patterns
    }
    sources: dict[str, WeightSource] = {}
    stacked: dict[str, dict[str, list[str]]] = {}
    for key, (target, pattern) in _find_targets(model, names).items():
        if pattern is None:
            sources[target] = WeightSource((key,))
        else:
            stacked.setdefault(target, {}).setdefault(pattern, []).append(key)
    for target, by_pattern in stacked.items():
        sources[target] = _stacked_source(target, by_pattern, converter_of)
    return sources


def target_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Map each tensor of a folder that the model loads to the name of the model's tensor."""
    return {key: target for key, (target, _) in _find_targets(model, names).items()}


def _find_targets(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Map a folder's tensors to the model's tensor and the rule that converts them; "" for experts in 4 bit."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    targets = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, tuple[str, str | None]] = {}
    for key in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, targets)
        if target not in targets:  # as in transformers: a rule may match a name that is already right
            target, pattern = rename_source_key(key, [], [], prefix, targets)
        if target not in targets and (match := _EXPERT_KEY.fullmatch(key)):
            target, _ = rename_source_key(match["tensor"], renamings, converters, prefix, targets)
            pattern = "" if target in targets else None
        if target in targets:  # else it is not the model's: another head, or a mask that older versions saved
            found[key] = target, pattern
    return found


def unsupported_conversion_error(target: str, operations: str) -> UserError:
    """Return the error about a tensor that transformers makes from others in an unsupported way."""
    return UserError(
        f"{target}: transformers rearranges it on loading ({operations}), which is not supported here; give another "
        "model"
    )


def _stacked_source(
    target: str, by_pattern: Mapping[str, list[str]], converter_of: Mapping[str, WeightConverter]
) -> WeightSource:
    if "" in by_pattern:
        columns = [by_pattern[""]]
    else:
        converter = converter_of[next(iter(by_pattern))]
        if [vars(operation) for operation in converter.operations] == [vars(Transpose(1, 2, check_dims=True))]:
            ((key,),) = by_pattern.values()
            return WeightSource((key,), may_be_transposed=True)
        kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
        expected = [(MergeModulelist, 0), (Concatenate, 1)]
        if len(converter.operations) != len(kinds) or kinds not in (expected, expected[:1], [(Concatenate, 0)]):
            raise unsupported_conversion_error(
                target, ", ".join(type(operation).__name__ for operation in converter.operations)
            )
        columns = [by_pattern.get(pattern, []) for pattern in converter.source_patterns]
        if kinds == [(Concatenate, 0)] and [len(column) for column in columns] == [1] * len(columns):
            return WeightSource(tuple(key for (key,) in columns))
    if len({len(column) for column in columns}) != 1:
        raise UserError(f"{target}: some of its experts' matrices are missing; get the folder anew")
    return WeightSource(tuple(key for expert in zip(*columns, strict=True) for key in expert), len(columns[0]))
