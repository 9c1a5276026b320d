"""Which tensors of a folder a model's tensor is made of.

Names in a folder are those of whoever saved it; transformers renames them on loading, and makes one parameter of all
experts of a layer out of the matrices of each. Its rules are used here (`transformers.conversion_mapping`), on names
alone: no weight is read.
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
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora_dist.errors import UserError

_ONE_EXPERT = re.compile(r"(?P<tensor>.+)\.(?P<expert>\d+)\.weight")


@dataclass(frozen=True)
class WeightSource:
    """The tensors of a folder that one of the model's is made of."""

    keys: tuple[str, ...]
    """Their names; those of stacked experts expert by expert, an expert's own from top to bottom."""
    experts: int = 0
    """Number of experts whose matrices are tensors of their own; 0: `keys` lie one above the other, or are one."""


def expert_key(key: str, expert: int) -> str:
    """The name, in 4 bit, of one expert's matrix of a tensor that held all experts."""
    return f"{key}.{expert}.weight"


def stacked_tensor_name(key: str, expert: int) -> str:
    """The tensor that held all experts, if `key` is what `expert_key` calls a matrix of it; else `key`."""
    match = _ONE_EXPERT.fullmatch(key)
    return match["tensor"] if match and key == expert_key(match["tensor"], expert) else key


def find_weight_sources(model: PreTrainedModel, names: Iterable[str]) -> dict[str, WeightSource]:
    """For each tensor of the model that the folder holds, where it comes from.

    Args:
        model: transformers' own class, on meta.
        names: of the folder's tensors, a 4-bit weight counting as one.

    Raises:
        UserError: transformers rearranges a tensor on loading in a way that is not known here.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    targets = model.state_dict()
    prefix = model.base_model_prefix
    origins: dict[str, WeightSource] = {}
    stacked: dict[str, dict[str, list[str]]] = {}
    for key in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, targets)
        if target not in targets:  # as transformers: a rule may match what has the right name already
            target, pattern = rename_source_key(key, [], [], prefix, targets)
        if target not in targets and (match := _ONE_EXPERT.fullmatch(key)):
            target, _ = rename_source_key(match["tensor"], renamings, converters, prefix, targets)
            pattern = "" if target in targets else None
        if target not in targets:
            continue  # nothing of the model's: another head, a mask that older versions saved
        if pattern is None:
            origins[target] = WeightSource((key,))
        else:
            stacked.setdefault(target, {}).setdefault(pattern, []).append(key)
    for target, by_pattern in stacked.items():
        origins[target] = _stacked_source(target, by_pattern, converter_of)
    return origins


def unsupported_conversion_error(target: str, operations: str) -> UserError:
    """What to say of a tensor that transformers makes of others in a way that is not known here."""
    return UserError(
        f"{target}: transformers rearranges it on loading ({operations}), which is not supported here; give another model"
    )


def _stacked_source(
    target: str, by_pattern: Mapping[str, list[str]], converter_of: Mapping[str, WeightConverter]
) -> WeightSource:
    columns = [by_pattern[""]] if "" in by_pattern else None
    if columns is None:
        converter = converter_of[next(iter(by_pattern))]
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
