"""Several adapters of one base to one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch.nn.functional import pad

from qlora_dist.adapters.export import write_adapter
from qlora_dist.adapters.saved_adapter import SavedAdapter
from qlora_dist.adapters.validate_adapter import find_invalid_values
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

_ZERO_TOLERANCE = 1e-12  # of squares in fp64, of tensors in fp32


@dataclass
class ComposeReport:
    """What `compose` did. Squares of norms, over all matrices."""

    out: Path
    rank: int = 0
    matrices: int = 0
    parts: float = 0.0
    """Squares of the updates, each by itself."""
    sums: float = 0.0
    """Squares of the weighted sum of the updates."""
    written: float = 0.0
    difference: float = 0.0
    """Squares of (what is written - that sum)."""


def compose_adapters(weighted_adapters: Sequence[WeightedAdapter], out: Path, options: ComposeOptions) -> ComposeReport:
    """Write an adapter in PEFT's format that does what several do, and check it as one that leaves training.

    All have one rank in the file, rows of zeros where a module has less, and alpha = rank.

    Raises:
        UserError: the adapters are not of one base, have what cannot be composed, or `out` is there.
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
    report = ComposeReport(out, _rank(ranks, options), len(ranks))
    tensors: dict[str, torch.Tensor] = {}
    with SafetensorsReader() as reader, torch.random.fork_rng(devices=[]):
        for module in ranks:
            read = [
                (read_lora_update(adapter.low_rank[module], reader), one.weight)
                for one, adapter in zip(weighted_adapters, adapters, strict=True)
                if module in adapter.low_rank
            ]
            updates = [WeightedLoraFactors(values.a, values.b, values.scaling, weight) for values, weight in read]
            digest = hashlib.sha256(f"{options.seed}:{module}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
            a, b = combine_matrices(updates, options.how, report.rank, options.density, module)
            _accumulate_norms(updates, a, b, report)
            missing, key = report.rank - len(a), f"{PEFT_PREFIX}{module}"
            tensors[f"{key}.lora_A.weight"] = pad(a, (0, 0, 0, missing)).contiguous()
            tensors[f"{key}.lora_B.weight"] = pad(b, (0, missing)).contiguous()
        for name, owner in owners.items():
            module, _, leaf = name.rpartition(".")
            key = f"{module}.base_layer.{leaf}" if module in ranks else name  # a bias, as PEFT names it then
            tensors[f"{PEFT_PREFIX}{key}"] = reader.read(owner.whole[name])
    wrong = find_invalid_values(tensors.items())
    if wrong is None and report.written <= _ZERO_TOLERANCE * report.parts:
        wrong = "the updates cancel each other"
    if wrong is not None:
        raise UserError(f"{out}: no adapter is written, because {wrong}; give other weights, or a larger --density")
    try:
        write_adapter(tensors, _config(adapters, owners, list(ranks), report.rank, options), out)
    except (OSError, SafetensorError) as error:  # of a full disk safetensors says so in its own way
        raise UserError(f"{out}: the adapter cannot be written ({error}); make room and run again") from None
    return report


def print_compose_report(
    report: ComposeReport, weighted_adapters: Sequence[WeightedAdapter], options: ComposeOptions, console: Console
) -> None:
    """What was composed, and how far it is from the sum."""
    parts = " + ".join(f"{one.weight:g} x {one.name}" for one in weighted_adapters)
    relative_difference = math.sqrt(report.difference / report.sums) if report.sums else 0.0
    console.print(
        f"{report.out}: {parts} by {options.how}, rank {report.rank} on {report.matrices} matrices; differs from the "
        f"sum of the updates by {relative_difference:.1e} of it (norms)",
        highlight=False,
        soft_wrap=True,
    )


def _rank(ranks: Mapping[str, Sequence[int]], options: ComposeOptions) -> int:
    """That all modules have in the file."""
    if options.how in ("cat", "sequential"):
        return max(map(sum, ranks.values()))
    largest = max(map(max, ranks.values()))
    return (options.rank or largest) if options.how.endswith("svd") else largest


def _accumulate_norms(
    updates: Sequence[WeightedLoraFactors], a: torch.Tensor, b: torch.Tensor, report: ComposeReport
) -> None:
    """Add |sum|^2 and |B A - sum|^2; neither is formed: |B A|^2 is the sum of (B^T B) * (A A^T)."""
    all_a = torch.cat([update.a * (update.weight * update.scaling) for update in updates]).double()
    all_b = torch.cat([update.b for update in updates], dim=1).double()
    report.parts += sum((u.weight * u.scaling) ** 2 * _square_of_product(u.b.double(), u.a.double()) for u in updates)
    report.sums += _square_of_product(all_b, all_a)
    report.written += _square_of_product(b.double(), a.double())
    stacked_a, stacked_b = torch.cat([all_a, a.double()]), torch.cat([all_b, -b.double()], dim=1)
    report.difference += max(0.0, _square_of_product(stacked_b, stacked_a))


def _square_of_product(b: torch.Tensor, a: torch.Tensor) -> float:
    return float(((b.T @ b) * (a @ a.T)).sum())


def _config(
    adapters: Sequence[SavedAdapter],
    owners: Mapping[str, SavedAdapter],
    modules: list[str],
    rank: int,
    options: ComposeOptions,
) -> peft.LoraConfig:
    """PEFT's configuration: that of the first for what all have in common."""
    configs = [adapter.config for adapter in adapters]
    first = configs[0]
    alike = all(set(adapter.low_rank) == set(modules) for adapter in adapters)
    plain = isinstance(first.get("target_modules"), list) and not any(
        first.get(key) for key in ("layers_to_transform", "exclude_modules")
    )
    paths = {owner.path for owner in owners.values()}
    own = [config for adapter, config in zip(adapters, configs, strict=True) if adapter.path in paths]
    whole = sorted({name for config in own for name in config.get("modules_to_save") or ()})
    biases = {config.get("bias", "none") for config in own} - {"none"}
    if alike and plain:
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
        modules_to_save=whole or None,
        ensure_weight_tying=any(config.get("ensure_weight_tying", False) for config in own),
        bias="all" if len(biases) > 1 else next(iter(biases), "none"),
        fan_in_fan_out=bool(first.get("fan_in_fan_out")),
        task_type=first.get("task_type") or "CAUSAL_LM",
        base_model_name_or_path=str(options.base) if options.base is not None else adapters[0].base,
    )
