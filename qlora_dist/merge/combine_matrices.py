"""Combination of several adapters' matrices into one pair, with the types of PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from qlora_dist.compat.peft import merge_utils
from qlora_dist.errors import UserError

CombinationType = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "sequential",
]
COMBINATION_TYPES: tuple[str, ...] = get_args(CombinationType)


@dataclass(frozen=True)
class WeightedLoraFactors:
    """Factors of an adapter's weighted update of one matrix, weight x scaling x B A."""

    a: torch.Tensor
    """fp32[r, in_features]."""
    b: torch.Tensor
    """fp32[out_features, r]."""
    scaling: float
    weight: float


def combine_matrices(
    updates: Sequence[WeightedLoraFactors], combination_type: CombinationType, rank: int, density: float, name: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A: fp32[r, in_features] and B: fp32[out_features, r] of the combined update, whose scaling is 1.

    `cat` and `sequential` give the sum of the updates, and `svd` its best approximation. `linear` sums the A's and the
    B's separately, each with the square root of weight x scaling, so it differs from the sum. The other types prune
    before they sum: the A's and B's separately, or with `_svd` the whole updates.

    `rank` applies to the types with `svd`. `density` is the share of the values that pruning keeps. `dare` drops values
    by torch's random generator.

    Source: `peft.tuners.lora.LoraModel.add_weighted_adapter`, its `_generalized_task_arithmetic_weighted_adapter` and
    `_svd_generalized_task_arithmetic_weighted_adapter`.

    Raises:
        UserError: the ranks differ, and the combination type requires equal ones.
    """
    if combination_type in ("cat", "sequential", "svd"):
        a = torch.cat([update.a * (update.weight * update.scaling) for update in updates])
        b = torch.cat([update.b for update in updates], dim=1)
        return (a, b) if combination_type != "svd" else _svd_of_factors(a, b, rank)
    if combination_type.endswith("_svd"):
        deltas = [update.b @ update.a * update.scaling for update in updates]
        weights = torch.tensor([update.weight for update in updates])
        u, s, v = torch.linalg.svd(
            _combine(deltas, weights, combination_type.removesuffix("_svd"), density), full_matrices=False
        )
        return v[:rank].contiguous(), (u * s)[:, :rank].contiguous()
    if len(ranks := sorted({len(update.a) for update in updates})) > 1:
        raise UserError(f"--how {combination_type}: {name} has the ranks {ranks} in these adapters; use cat or svd")
    products = [update.weight * update.scaling for update in updates]
    roots = torch.tensor([math.sqrt(abs(product)) for product in products])
    signs = torch.tensor([math.copysign(1.0, product) for product in products])
    a = _combine([update.a for update in updates], roots * signs, combination_type, density)
    return a, _combine([update.b for update in updates], roots, combination_type, density)


def _combine(tensors: list[torch.Tensor], weights: torch.Tensor, combination_type: str, density: float) -> torch.Tensor:
    combined: torch.Tensor
    if combination_type == "linear":
        combined = merge_utils.task_arithmetic(tensors, weights)
    else:
        combined = getattr(merge_utils, combination_type)(tensors, weights, density)
    return combined


def _svd_of_factors(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best approximation of b a with a given rank. It multiplies only the small QR factors, and not b a."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return (v[:rank] @ q_a.T).contiguous(), (q_b @ (u * s)[:, :rank]).contiguous()
