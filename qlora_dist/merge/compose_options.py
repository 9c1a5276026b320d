"""Adapters that are to become one: what the command line says of them, and whether they go together."""

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
from qlora_dist.merge.merged_adapter_file import check_trained_on_merged
from qlora_dist.model.meta_model import causal_lm_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantizable import quantizable_parameters

_PRUNING_TYPES = ("ties", "dare", "magnitude")


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter as the command line names it."""

    name: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class ComposeOptions:
    """How to compose."""

    how: CombinationType = "cat"
    rank: int | None = None
    """Of what `svd` leaves; None: the largest of the adapters'."""
    density: float = 0.5
    """Part of the values that pruning leaves."""
    seed: int = 0
    """Of what `dare` drops."""
    base: Path | None = None
    """Folder of the model, to be recorded; None: the one that the adapters name."""


def parse_weighted_adapter(text: str) -> WeightedAdapter:
    """NAME=FOLDER[:WEIGHT].

    Raises:
        UserError: it is something else.
    """
    name, equals, rest = text.partition("=")
    folder, _, weight = rest.rpartition(":")
    try:
        given = WeightedAdapter(name, Path(folder), float(weight)) if folder else WeightedAdapter(name, Path(rest))
    except ValueError:  # a colon within the folder's name
        given = WeightedAdapter(name, Path(rest))
    if not (name and equals and rest) or not math.isfinite(given.weight):
        raise UserError(f"{text}: is no adapter with a name; write NAME=FOLDER or NAME=FOLDER:WEIGHT")
    return given


def parse_combination_type(text: str) -> CombinationType:
    """A way by its name.

    Raises:
        UserError: there is none of that name.
    """
    if text not in COMBINATION_TYPES:
        raise UserError(f"--how {text}: no such way; choose from {', '.join(COMBINATION_TYPES)}")
    return cast(CombinationType, text)  # WAYS has the values of How


def check_compose_options(weighted_adapters: Sequence[WeightedAdapter], options: ComposeOptions) -> None:
    """That the numbers given are some that the way can use.

    Raises:
        UserError: one is not.
    """
    if options.how.startswith(_PRUNING_TYPES) and not 0 < options.density < 1:
        raise UserError(f"--density: {options.density:g} is no part of the values; give one between 0 and 1")
    if options.rank is not None and (options.rank < 1 or not options.how.endswith("svd")):
        raise UserError(f"--rank: --how {options.how} has no choice of rank {options.rank}; leave it out, or use svd")
    for one in weighted_adapters[:-1]:
        if options.how == "sequential" and one.weight != 1:
            raise UserError(
                f"{one.name}: has the weight {one.weight:g}, and what follows was trained on it whole; only the last "
                "of a sequence may have a weight"
            )


def check_common_base(
    weighted_adapters: Sequence[WeightedAdapter], adapters: Sequence[SavedAdapter], options: ComposeOptions
) -> None:
    """That all are updates of one base, or each of what the one before it was merged into.

    Raises:
        UserError: they are not, or an update is none that can be added.
    """
    for one, adapter in zip(weighted_adapters, adapters, strict=True):
        if any(update.magnitude is not None for update in adapter.low_rank.values()):
            raise UserError(
                f"{one.path}: is DoRA, whose magnitudes have no sum; merge the adapters one after the other"
            )
        if any(update.experts for update in adapter.low_rank.values()):
            raise UserError(
                f"{one.path}: adapts experts, which is not composed; merge the adapters one after the other"
            )
    if options.how == "sequential":
        for before, one, adapter in zip(weighted_adapters, weighted_adapters[1:], adapters[1:], strict=False):
            check_trained_on_merged(one.path, Path(adapter.base), before.path)
    elif options.base is None:
        first = adapters[0].base
        for one, adapter in zip(weighted_adapters, adapters, strict=True):
            if _real_path(adapter.base) != _real_path(first):
                raise UserError(
                    f"{one.path}: was trained on {adapter.base or 'no base that it names'}, and {weighted_adapters[0].path} on "
                    f"{first or 'none that it names'}; compose adapters of one base, or say with --base that it is one"
                )


def _real_path(base: str) -> str:
    return os.path.realpath(base) if base else ""


def check_update_shapes(adapters: Sequence[SavedAdapter], options: ComposeOptions) -> None:
    """That the adapters agree on the shape of each matrix, and the base with them if it was given.

    Raises:
        UserError: they do not.
    """
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
    """Of each tensor that was trained whole, the adapter that has it.

    Raises:
        UserError: there are two.
    """
    owners: dict[str, SavedAdapter] = {}
    for adapter in adapters:
        for name in adapter.whole:
            if name in owners:
                raise UserError(
                    f"{adapter.path}: has {name} trained whole, as {owners[name].path} has, and there is no sum of the "
                    "two; merge the adapters one after the other"
                )
            owners[name] = adapter
    return owners
