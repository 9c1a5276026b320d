"""`plan --search`: the fastest configuration that fits, as a configuration file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from qlora_dist.config.config_file import ConfigChanges, apply_changes, dump_config, flatten_keys
from qlora_dist.config.max_positions import check_seq_len
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.plan.calibration_file import load_calibration
from qlora_dist.plan.hardware import load_hardware
from qlora_dist.plan.memory_estimate import CUDA_CONTEXT_BYTES, RESERVED_RATIOS
from qlora_dist.plan.model_config import read_model_config
from qlora_dist.plan.plan_args import PlanArgs, config_to_plan
from qlora_dist.plan.run_spec import make_run_spec
from qlora_dist.plan.training_plan import TrainingPlan, make_training_plan
from qlora_dist.runtime.byte_sizes import format_gib

_TIE_RATIO = 1.1
"""Ratio of two step times below which the simpler configuration is taken, because the times are uncertain."""
_MAX_SHOWN = 5
_SEARCHED_KEYS = ("parallel.base", "parallel.adapter", "parallel.offload", "train.checkpointing", "train.micro_batch")


@dataclass(frozen=True)
class PlanCandidate:
    """A configuration that fits."""

    config: Config
    plan: TrainingPlan
    initial_config: Config
    """Configuration that the search began with: defaults and arguments."""

    @property
    def changed_settings(self) -> dict[str, Any]:
        """Values that differ from the initial configuration, by key."""
        own, initial = flatten_keys(self.config.model_dump()), flatten_keys(self.initial_config.model_dump())
        return {key: own[key] for key in (*_SEARCHED_KEYS, "parallel.resident_bytes") if own[key] != initial[key]}

    def sort_key(self, fastest_step_s: float) -> tuple[bool, bool, int, float]:
        """Return the key of the order: about as fast as the fastest, base on the device, few keys set, time."""
        step_s = self.plan.time.step_s
        if step_s > _TIE_RATIO * fastest_step_s:
            return True, False, 0, step_s
        is_base_on_host = self.config.parallel.offload != "none" or self.config.parallel.base == "paged"
        return False, is_base_on_host, len(self.changed_settings), step_s


@dataclass(frozen=True)
class SearchResult:
    """Configurations that a search has tried, and the best that fit."""

    best: list[PlanCandidate]
    """Candidate to take, followed by the fastest of the others."""
    num_fitting: int
    num_tried: int
    tried_values: dict[str, list[Any]]
    """Values that were tried, by key."""

    def sentence(self) -> str:
        varied = {key: values for key, values in self.tried_values.items() if len(values) > 1}
        tried = "; ".join(f"{key}: {', '.join(map(str, values))}" for key, values in varied.items())
        counts = f"Tried {self.num_tried} configurations, of which {self.num_fitting} fit"
        return f"{counts}: {tried or 'all keys were given'}."


def print_fastest_plan(args: PlanArgs, *, as_json: bool) -> None:
    """Print the fastest configuration as YAML, and its costs and the alternatives on standard error; or all as JSON.

    Raises:
        UserError: the arguments have a mistake, or no configuration fits.
    """
    result = search_plans(args)
    best = result.best[0]
    if as_json:
        others = [
            {"settings": f.changed_settings, "fits_with_bytes": _free_bytes(f.plan), "step_s": f.plan.time.step_s}
            for f in result.best
        ]
        tree = best.config.model_dump(mode="json")
        tried = {"configurations": result.num_tried, "fitting": result.num_fitting, "values": result.tried_values}
        typer.echo(json.dumps({"config": tree, "plan": best.plan.as_json(), "best": others, "tried": tried}, indent=2))
        return
    typer.echo(dump_config(best.config), nl=False)
    from qlora_dist.plan.print_plan import print_plan

    console = Console(stderr=True)
    print_plan(best.plan, best.config.model.base, console)
    table = Table(title="Configurations that fit: the one above, and the fastest of the others", title_justify="left")
    for column in ("tokens/s", "a step, s", "GiB to spare"):
        table.add_column(column, justify="right")
    table.add_column("settings that are not defaults or given")
    for candidate in result.best:
        time = candidate.plan.time
        settings = " ".join(f"{key}={value}" for key, value in candidate.changed_settings.items())
        row = f"{time.tokens_per_s:,.0f}", f"{time.step_s:,.2f}", format_gib(_free_bytes(candidate.plan))
        table.add_row(*row, settings or "none", style="bold" if candidate is best else None)
    console.print(table)
    console.print(
        f"{result.sentence()} Among configurations within {_TIE_RATIO - 1:.0%} of the fastest, the search prefers one "
        "that keeps the base on the device, then the simplest.",
        highlight=False,
    )


def _free_bytes(plan: TrainingPlan) -> int:
    """Return the bytes that a card has left above the allocator's upper bound."""
    return plan.gpu.memory_bytes - plan.memory.reserved_bytes[1] - CUDA_CONTEXT_BYTES


def search_plans(args: PlanArgs) -> SearchResult:
    """Try all configurations with the same tokens per step.

    The search chooses the meshes of base and adapters, the micro-batch, the checkpointed layers, and offloading and
    paging of the base. Keys that the user has set stay. The optimizer's pages follow from the memory that is left
    (`optim.resident_bytes: auto`). Among configurations that are about as fast, it takes the simplest.

    Raises:
        UserError: the arguments have a mistake, or no configuration fits.
    """
    hardware, initial = load_hardware(args.hardware), config_to_plan(args)
    model_config = read_model_config(initial.model.base)
    gpu, measured = hardware.gpu(args.gpu), load_calibration(args.calibration).devices.get(args.gpu)
    link, network = hardware.link(gpu.link), hardware.link(args.network)
    check_seq_len(initial.data.seq_len, model_config, initial.model.base)
    model_spec = make_run_spec(initial, model_config, args.ranks, args.nodes).model
    fitting: list[PlanCandidate] = []
    tried: list[Config] = []
    smallest: TrainingPlan | None = None

    def make_plan(config: Config) -> TrainingPlan:
        run = make_run_spec(config, model_config, args.ranks, args.nodes, model_spec=model_spec)
        return make_training_plan(run, args.gpu, gpu, link, network, measured)

    explicit_keys = _explicit_keys(args, initial)
    for sections in _candidate_settings(args, initial, explicit_keys):
        config = apply_changes(initial, sections)
        plan = make_plan(config)
        if config.parallel.base == "paged" and "parallel.resident_bytes" not in explicit_keys and plan.fits:
            config = apply_changes(config, {"parallel": {"resident_bytes": _largest_resident_bytes(plan)}})
            plan = make_plan(config)
            if plan.memory.on_host == 0 and "parallel.base" not in explicit_keys:
                continue  # all layers stay on the device, which is equal to `base: node`
        tried.append(config)
        if plan.fits:
            fitting.append(PlanCandidate(config, plan, initial))
        if smallest is None or plan.memory.peak_bytes < smallest.memory.peak_bytes:
            smallest = plan
    assert smallest is not None
    if not fitting:
        need = (smallest.memory.reserved_bytes[1]) / 2**30
        raise UserError(
            f"{initial.model.base} does not fit {args.nodes} x {args.gpus} {args.gpu} with any setting: the least is "
            f"{need:.1f} GiB a GPU of {gpu.memory:g}; use more GPUs, a shorter data.seq_len, or a smaller lora.r"
        )
    fastest_s = min(candidate.plan.time.step_s for candidate in fitting)
    best = min(fitting, key=lambda candidate: candidate.sort_key(fastest_s))
    others = sorted((c for c in fitting if c is not best), key=lambda candidate: candidate.plan.time.step_s)
    flat = [flatten_keys(config.model_dump()) for config in tried]
    tried_values = {key: list(dict.fromkeys(tree[key] for tree in flat)) for key in _SEARCHED_KEYS}
    return SearchResult([best, *others[: _MAX_SHOWN - 1]], len(fitting), len(tried), tried_values)


def _largest_resident_bytes(plan: TrainingPlan) -> int:
    """Return the most bytes of layers on the device, in whole MiB, with which a plan with the fewest still fits."""
    room = (plan.gpu.memory_bytes - CUDA_CONTEXT_BYTES) / RESERVED_RATIOS[1] - plan.memory.peak_bytes
    return (plan.memory.static["base"] + int(room)) // 2**20 * 2**20


def _explicit_keys(args: PlanArgs, initial: Config) -> set[str]:
    """Return the keys that the command line or a run's file sets."""
    keys = {override.partition("=")[0].strip() for override in args.overrides}
    if args.micro_batch is not None:
        keys.add("train.micro_batch")
    if args.run_file is not None:
        sections = {section: getattr(initial, section) for section in initial.model_fields_set}
        keys |= {f"{section}.{key}" for section, values in sections.items() for key in values.model_fields_set}
    return keys


def _candidate_settings(args: PlanArgs, initial: Config, explicit_keys: set[str]) -> Iterator[ConfigChanges]:
    """Yield the settings to try, from simple to involved; explicit keys keep their values."""

    def values_to_try(key: str, values: list[Any]) -> list[Any]:
        section, _, name = key.partition(".")
        return [getattr(getattr(initial, section), name)] if key in explicit_keys else values

    ranks, gpus = args.ranks, args.gpus
    shards = (n for n in range(1, ranks + 1) if ranks % n == 0 and (gpus % n == 0 or n % gpus == 0) and n != gpus)
    bases: list[Any] = ["node", *({1: "replicate", ranks: "world"}.get(n, n) for n in shards), "paged"]
    rows_per_rank = initial.train.global_batch // ranks
    micro_batches = [n for n in range(1, rows_per_rank + 1) if rows_per_rank % n == 0]
    resident_bytes = values_to_try("parallel.resident_bytes", [0])[0]
    for base in values_to_try("parallel.base", bases):
        paged = {"resident_bytes": resident_bytes} if base == "paged" else {}
        for adapter, offload, checkpointing, micro_batch in product(
            values_to_try("parallel.adapter", ["world", "node"] if args.nodes > 1 else ["world"]),
            values_to_try("parallel.offload", ["none"] if base == "paged" else ["none", "base"]),
            values_to_try("train.checkpointing", ["full", 2, 3, 4, "none"]),
            values_to_try("train.micro_batch", micro_batches),
        ):
            yield {
                "parallel": {"base": base, "adapter": adapter, "offload": offload} | paged,
                "train": {"checkpointing": checkpointing, "micro_batch": micro_batch},
            }
