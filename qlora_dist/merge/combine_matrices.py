"""Matrices of several adapters to those of one: PEFT's ways of `add_weighted_adapter`, one layer at a time."""

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
    """An adapter's update of one matrix, weight x scaling x B A."""

    a: torch.Tensor
    """fp32[r, in_features]"""
    b: torch.Tensor
    """fp32[out_features, r]"""
    scaling: float
    weight: float


def combine_matrices(
    updates: Sequence[WeightedLoraFactors], combination_type: CombinationType, rank: int, density: float, name: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the sum of some updates, whose scaling is 1.

    Args:
        updates: of the adapters that have this matrix.
        combination_type: `cat` and `sequential` give the sum itself; `svd` its best approximation; `linear` sums A's and B's apart,
            each with the square root of weight x scaling, so it is not the sum of the updates. The others prune
            before they sum, A's and B's apart, or with `_svd` the whole updates.
        rank: of the ways with `svd`.
        density: part of the values that pruning leaves. What it drops by chance (`dare`) is torch's generator's.
        name: of the matrix, for the message.

    Returns:
        A: fp32[r, in_features] and B: fp32[out_features, r], as contiguous tensors.

    Raises:
        UserError: ranks differ, and the way cannot have that.

    Source: `peft.tuners.lora.LoraModel.add_weighted_adapter`, its `_generalized_task_arithmetic_weighted_adapter` and
    `_svd_generalized_task_arithmetic_weighted_adapter`.
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


def _combine(tensors: list[torch.Tensor], weights: torch.Tensor, how: str, density: float) -> torch.Tensor:
    combined: torch.Tensor
    if how == "linear":
        combined = merge_utils.task_arithmetic(tensors, weights)
    else:
        combined = getattr(merge_utils, how)(tensors, weights, density)
    return combined


def _svd_of_factors(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of b a of that rank, without b a: of QR factors only the small ones meet."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return (v[:rank] @ q_a.T).contiguous(), (q_b @ (u * s)[:, :rank]).contiguous()
