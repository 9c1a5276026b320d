"""Options of `qlora-dist compose`, and checks that the adapters can be composed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from qlora_dist.adapters.saved_adapter import SavedAdapter
from qlora_dist.errors import UserError
from qlora_dist.merge.combine_matrices import COMBINATION_TYPES, CombinationType
from qlora_dist.merge.merge_folder import check_trained_on_merged
from qlora_dist.model.model_class import causal_lm_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantizable import quantizable_parameters

_PRUNING_TYPES = ("ties", "dare", "magnitude")


@dataclass(frozen=True)
class WeightedAdapter:
    """Adapter with a name and a weight from the command line."""

    name: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ComposeOptions:
    """Options of `compose_adapters`."""

    how: CombinationType = "cat"
    rank: int | None = None
    """Rank of the result, for types with `svd`; None: the largest rank of the adapters."""
    density: float = 0.5
    """Share of the values that pruning keeps."""
    seed: int = 0
    """Seed of the values that `dare` drops."""
    base: Path | None = None
    """Folder of the base model, recorded in the adapter; None: the one that the adapters name."""


def parse_weighted_adapter(text: str) -> WeightedAdapter:
    """Parse NAME=FOLDER[:WEIGHT]."""
    name, equals, rest = text.partition("=")
    folder, _, weight = rest.rpartition(":")
    try:
        adapter = WeightedAdapter(name, Path(folder), float(weight)) if folder else WeightedAdapter(name, Path(rest))
    except ValueError:  # a colon within the folder's name
        adapter = WeightedAdapter(name, Path(rest))
    if not (name and equals and rest) or not math.isfinite(adapter.weight):
        raise UserError(f"{text}: is not a named adapter; write NAME=FOLDER or NAME=FOLDER:WEIGHT")
    return adapter


def parse_combination_type(text: str) -> CombinationType:
    if text not in COMBINATION_TYPES:
        raise UserError(f"--how {text}: is no combination type; choose from {', '.join(COMBINATION_TYPES)}")
    return cast(CombinationType, text)  # `COMBINATION_TYPES` holds its values


def check_compose_options(weighted_adapters: Sequence[WeightedAdapter], options: ComposeOptions) -> None:
    """Check the options against the combination type."""
    if options.how.startswith(_PRUNING_TYPES) and not 0 < options.density < 1:
        raise UserError(f"--density: {options.density:g} is not a share; give a number between 0 and 1")
    if options.rank is not None and (options.rank < 1 or not options.how.endswith("svd")):
        raise UserError(f"--rank: --how {options.how} cannot have rank {options.rank}; leave it out, or use svd")
    for one in weighted_adapters[:-1]:
        if options.how == "sequential" and one.weight != 1:
            raise UserError(
                f"{one.name}: has the weight {one.weight:g}, but the next adapter was trained on weight 1; only the "
                "last of a sequence may have a weight"
            )


def check_common_base(
    weighted_adapters: Sequence[WeightedAdapter], adapters: Sequence[SavedAdapter], options: ComposeOptions
) -> None:
    """Check that all adapters have one base, or with `sequential` each the previous adapter's merged model.

    Raises:
        UserError: the bases differ, or an update cannot be added.
    """
    for one, adapter in zip(weighted_adapters, adapters, strict=True):
        if any(update.magnitude is not None for update in adapter.low_rank.values()):
            raise UserError(
                f"{one.path}: is DoRA, whose magnitudes have no sum; merge the adapters one after the other"
            )
        if any(update.experts for update in adapter.low_rank.values()):
            raise UserError(
                f"{one.path}: adapts experts, which cannot be composed; merge the adapters one after the other"
            )
    if options.how == "sequential":
        for before, one, adapter in zip(weighted_adapters, weighted_adapters[1:], adapters[1:], strict=False):
            check_trained_on_merged(one.path, Path(adapter.base), before.path)
    elif options.base is None:
        first = adapters[0].base
        for one, adapter in zip(weighted_adapters, adapters, strict=True):
            if _real_path(adapter.base) != _real_path(first):
                raise UserError(
                    f"{one.path}: was trained on {adapter.base or 'an unnamed base'}, but {weighted_adapters[0].path} "
                    f"on {first or 'an unnamed base'}; compose adapters of one base, or name their common base with "
                    "--base"
                )


def _real_path(base: str) -> str:
    return os.path.realpath(base) if base else ""


def check_update_shapes(adapters: Sequence[SavedAdapter], options: ComposeOptions) -> None:
    """Check that the adapters have equal shapes for each matrix, equal to the base's if it is given."""
    shapes: dict[str, tuple[int, ...]] = {}
    base = "the base"
    if options.base is not None:
        base = str(options.base)
        model = causal_lm_on_meta(ModelFolder(options.base), torch.bfloat16)
        shapes = {target.module: target.shape for target in quantizable_parameters(model, embeddings=True)}
    for adapter in adapters:
        for module, update in adapter.low_rank.items():
            shape = (update.b.shape[0], update.a.shape[1])
            if options.base is not None and module not in shapes:
                raise UserError(f"{adapter.path}: has {module}, which is no linear layer of {base}; give its own base")
            if shapes.setdefault(module, shape) != shape:
                raise UserError(
                    f"{adapter.path}: {module} is {shape} there and {shapes[module]} in {base} or another adapter; "
                    "compose adapters of one base"
                )


def full_tensor_owners(adapters: Sequence[SavedAdapter]) -> dict[str, SavedAdapter]:
    """Return the adapter that holds each fully trained tensor. No two adapters may hold one."""
    owners: dict[str, SavedAdapter] = {}
    for adapter in adapters:
        if adapter.token_rows:
            raise UserError(
                f"{adapter.path}: has trained rows of {next(iter(adapter.token_rows))}, and such rows have no sum; "
                "merge the adapters one after the other"
            )
        for name in adapter.full_tensors:
            if name in owners:
                raise UserError(
                    f"{adapter.path}: has {name} fully trained, as {owners[name].path} has, and the two have no sum; "
                    "merge the adapters one after the other"
                )
            owners[name] = adapter
    return owners
