"""Composition of several adapters of one base into one adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch.nn.functional import pad

from qlora_dist.adapters.attach import seed_from_name
from qlora_dist.adapters.export import write_adapter
from qlora_dist.adapters.saved_adapter import SavedAdapter, find_invalid_values
from qlora_dist.compat.peft import peft
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import PEFT_PREFIX
from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.merge.combine_matrices import WeightedLoraFactors, combine_matrices
from qlora_dist.merge.compose_options import (
    ComposeOptions,
    WeightedAdapter,
    check_common_base,
    check_compose_options,
    check_update_shapes,
    full_tensor_owners,
)
from qlora_dist.merge.lora_update import read_checked_adapter, read_lora_update

_ZERO_TOLERANCE = 1e-12  # relative, for squares in fp64 of tensors in fp32


@dataclass(kw_only=True)
class ComposeReport:
    """Result of `compose_adapters`. Squared norms are summed over all matrices."""

    out: Path
    rank: int = 0
    matrices: int = 0
    squared_updates: float = 0.0
    """Squared norms of the weighted updates, summed over the adapters."""
    squared_sum: float = 0.0
    """Squared norms of the sum of the weighted updates."""
    squared_written: float = 0.0
    """Squared norms of the written updates."""
    squared_difference: float = 0.0
    """Squared norms of the difference between the written updates and the sum."""


def compose_adapters(weighted_adapters: Sequence[WeightedAdapter], out: Path, options: ComposeOptions) -> ComposeReport:
    """Write one adapter in PEFT's format that combines several, with the checks of an exported adapter.

    All modules have one rank in the file, and alpha = rank. A module of lower rank is padded with rows of zeros.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or give another name")
    if len(weighted_adapters) < 2 or len({one.name for one in weighted_adapters}) < len(weighted_adapters):
        raise UserError("compose: give two adapters or more, each with a name of its own")
    adapters = [read_checked_adapter(one.path) for one in weighted_adapters]
    check_compose_options(weighted_adapters, options)
    check_common_base(weighted_adapters, adapters, options)
    check_update_shapes(adapters, options)
    owners = full_tensor_owners(adapters)
    ranks: dict[str, list[int]] = {}
    for adapter in adapters:
        for module, update in adapter.low_rank.items():
            ranks.setdefault(module, []).append(update.a.shape[0])
    report = ComposeReport(out=out, rank=_rank(ranks, options), matrices=len(ranks))
    tensors: dict[str, torch.Tensor] = {}
    with SafetensorsReader() as reader, torch.random.fork_rng(devices=[]):
        for module in ranks:
            updates = [
                WeightedLoraFactors(update.a, update.b, update.scaling, one.weight)
                for one, adapter in zip(weighted_adapters, adapters, strict=True)
                if module in adapter.low_rank
                for update in (read_lora_update(adapter.low_rank[module], reader),)
            ]
            torch.manual_seed(seed_from_name(options.seed, module))
            a, b = combine_matrices(updates, options.how, report.rank, options.density, module)
            _accumulate_norms(updates, a, b, report)
            padding, key = report.rank - len(a), f"{PEFT_PREFIX}{module}"
            tensors[f"{key}.lora_A.weight"] = pad(a, (0, 0, 0, padding)).contiguous()
            tensors[f"{key}.lora_B.weight"] = pad(b, (0, padding)).contiguous()
        for name, owner in owners.items():
            module, _, leaf = name.rpartition(".")
            key = f"{module}.base_layer.{leaf}" if module in ranks else name  # the bias of an adapted layer
            tensors[f"{PEFT_PREFIX}{key}"] = reader.read(owner.full_tensors[name])
    problem = find_invalid_values(tensors.items())
    if problem is None and report.squared_written <= _ZERO_TOLERANCE * report.squared_updates:
        problem = "the updates cancel each other"
    if problem is not None:
        raise UserError(f"{out}: no adapter is written, because {problem}; give other weights, or a larger --density")
    try:
        write_adapter(tensors, _config(adapters, owners, list(ranks), report.rank, options), out)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise UserError(f"{out}: the adapter cannot be written ({error}); make room and run again") from None
    return report


def print_compose_report(
    report: ComposeReport, weighted_adapters: Sequence[WeightedAdapter], options: ComposeOptions, console: Console
) -> None:
    """Print what was composed, and its difference from the sum."""
    parts = " + ".join(f"{one.weight:g} x {one.name}" for one in weighted_adapters)
    relative_difference = math.sqrt(report.squared_difference / report.squared_sum) if report.squared_sum else 0.0
    console.print(
        f"{report.out}: {parts} by {options.how}, rank {report.rank} on {report.matrices} matrices; differs from the "
        f"sum of the updates by {relative_difference:.1e} of it (norms)",
        highlight=False,
        soft_wrap=True,
    )


def _rank(ranks: Mapping[str, Sequence[int]], options: ComposeOptions) -> int:
    if options.how in ("cat", "sequential"):
        return max(map(sum, ranks.values()))
    largest = max(map(max, ranks.values()))
    return (options.rank or largest) if options.how.endswith("svd") else largest


def _accumulate_norms(
    updates: Sequence[WeightedLoraFactors], a: torch.Tensor, b: torch.Tensor, report: ComposeReport
) -> None:
    """Add a matrix's squared norms to the report, without B A: |B A|^2 is the sum of (B^T B) * (A A^T)."""
    all_a = torch.cat([update.a * (update.weight * update.scaling) for update in updates]).double()
    all_b = torch.cat([update.b for update in updates], dim=1).double()
    report.squared_updates += sum(
        (u.weight * u.scaling) ** 2 * _square_of_product(u.b.double(), u.a.double()) for u in updates
    )
    report.squared_sum += _square_of_product(all_b, all_a)
    report.squared_written += _square_of_product(b.double(), a.double())
    stacked_a, stacked_b = torch.cat([all_a, a.double()]), torch.cat([all_b, -b.double()], dim=1)
    report.squared_difference += max(0.0, _square_of_product(stacked_b, stacked_a))


def _square_of_product(b: torch.Tensor, a: torch.Tensor) -> float:
    return float(((b.T @ b) * (a @ a.T)).sum())


def _config(
    adapters: Sequence[SavedAdapter],
    owners: Mapping[str, SavedAdapter],
    modules: list[str],
    rank: int,
    options: ComposeOptions,
) -> peft.LoraConfig:
    """Return PEFT's configuration. Settings that all adapters share are taken from the first."""
    configs = [adapter.config for adapter in adapters]
    first = configs[0]
    same_modules = all(set(adapter.low_rank) == set(modules) for adapter in adapters)
    plain = isinstance(first.get("target_modules"), list) and not any(
        first.get(key) for key in ("layers_to_transform", "exclude_modules")
    )
    paths = {owner.path for owner in owners.values()}
    own = [config for adapter, config in zip(adapters, configs, strict=True) if adapter.path in paths]
    modules_to_save = sorted({name for config in own for name in config.get("modules_to_save") or ()})
    biases = {config.get("bias", "none") for config in own} - {"none"}
    if same_modules and plain:
        targets, parameters = first["target_modules"], first.get("target_parameters") or ()
    else:
        layers = {module for adapter in adapters for module in adapter.layers_as_parameters()}
        targets = [module for module in modules if module not in layers]
        parameters = [f"{module}.weight" for module in modules if module in layers]
    return peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(targets),
        target_parameters=sorted(parameters) or None,
        modules_to_save=modules_to_save or None,
        ensure_weight_tying=any(config.get("ensure_weight_tying", False) for config in own),
        bias="all" if len(biases) > 1 else next(iter(biases), "none"),
        fan_in_fan_out=bool(first.get("fan_in_fan_out")),
        task_type=first.get("task_type") or "CAUSAL_LM",
        base_model_name_or_path=str(options.base) if options.base is not None else adapters[0].base,
    )
