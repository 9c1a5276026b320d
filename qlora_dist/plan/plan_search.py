"""`plan --search`: the fastest configuration that fits, as a configuration file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
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

_TIE_RATIO = 1.1
"""Ratio of two steps' times below which the simpler configuration is taken: times are not known that well."""
_MAX_SHOWN = 5
_SEARCHED_KEYS = ("parallel.base", "parallel.adapter", "parallel.offload", "train.checkpointing", "train.micro_batch")


@dataclass(frozen=True)
class PlanCandidate:
    """A configuration that fits."""

    config: Config
    plan: TrainingPlan
    start: Config
    """What the search began from: defaults, and what was asked."""

    @property
    def differences(self) -> dict[str, Any]:
        """Keys whose values are not those that the search began with."""
        own, initial = flatten_keys(self.config.model_dump()), flatten_keys(self.start.model_dump())
        return {key: own[key] for key in (*_SEARCHED_KEYS, "parallel.resident_bytes") if own[key] != initial[key]}

    @property
    def on_host(self) -> bool:
        """Whether the base lies in host memory, or partly."""
        return self.config.parallel.offload != "none" or self.config.parallel.base == "paged"

    def rank(self, fastest_step_s: float) -> tuple[bool, bool, int, float]:
        """Return the order among all: about as fast as the fastest, base on the device, few keys set, time."""
        step_s = self.plan.time.step_s
        slow = step_s > _TIE_RATIO * fastest_step_s
        return (slow, False, 0, step_s) if slow else (slow, self.on_host, len(self.differences), step_s)


@dataclass(frozen=True)
class SearchResult:
    """What a search has tried, and what fits of that."""

    best: list[PlanCandidate]
    """The one to take, and the fastest of the others."""
    fitting: int
    tried: int
    choices: dict[str, list[Any]]
    """Values that were tried, by key."""

    def sentence(self) -> str:
        """Return what was tried, in one sentence."""
        varied = {key: values for key, values in self.choices.items() if len(values) > 1}
        tried = "; ".join(f"{key}: {', '.join(map(str, values))}" for key, values in varied.items())
        return f"Tried {self.tried} configurations, of which {self.fitting} fit: {tried or 'all keys were given'}."


def print_fastest_plan(asked: PlanArgs, as_json: bool) -> None:
    """Print the configuration as YAML, and on standard error what it costs and what else fits; or all as JSON.

    Raises:
        UserError: a mistake in what was asked, or nothing fits.
    """
    result = search_plans(asked)
    best = result.best[0]
    if as_json:
        others = [
            {"settings": f.differences, "fits_with_bytes": _free_bytes(f.plan), "step_s": f.plan.time.step_s}
            for f in result.best
        ]
        tree = best.config.model_dump(mode="json")
        tried = {"configurations": result.tried, "fitting": result.fitting, "values": result.choices}
        typer.echo(json.dumps({"config": tree, "plan": best.plan.as_json(), "best": others, "tried": tried}, indent=2))
        return
    typer.echo(dump_config(best.config), nl=False)
    from qlora_dist.plan.print_plan import print_plan

    console = Console(stderr=True)
    print_plan(best.plan, best.config.model.base, console)
    table = Table(title="What fits: the one above, and the fastest of the others", title_justify="left")
    for column in ("tokens/s", "a step, s", "GiB to spare"):
        table.add_column(column, justify="right")
    table.add_column("settings that are not defaults or given")
    for one in result.best:
        time = one.plan.time
        settings = " ".join(f"{key}={value}" for key, value in one.differences.items())
        row = (
            f"{time.tokens_per_s:,.0f}",
            f"{time.step_s:,.2f}",
            f"{_free_bytes(one.plan) / 2**30:,.2f}",
            settings or "none",
        )
        table.add_row(*row, style="bold" if one is best else None)
    console.print(table)
    console.print(
        f"{result.sentence()} Of those within {_TIE_RATIO - 1:.0%} of the fastest the simplest is taken, "
        "one that keeps the base on the device before one that does not.",
        highlight=False,
    )


def _free_bytes(plan: TrainingPlan) -> int:
    """Return the bytes that a card has left, by the upper end of what the allocator reserves."""
    return plan.gpu.memory_bytes - plan.memory.reserved_bytes[1] - CUDA_CONTEXT_BYTES


def search_plans(asked: PlanArgs) -> SearchResult:
    """Try what can be chosen, at the same tokens of a step.

    Chosen are the meshes of base and adapters, rows of a micro-batch, which layers are checkpointed, offloading and
    paging of the base; what was asked for by name stays. The optimizer's pages follow from the room that is left
    (`optim.resident_bytes: auto`). Of those that are about as fast the simplest is taken.

    Raises:
        UserError: a mistake in what was asked, or nothing fits; it says what is missing.
    """
    hardware, start = load_hardware(asked.hardware), config_to_plan(asked)
    model_config = read_model_config(start.model.base)
    gpu, measured = hardware.gpu(asked.gpu), load_calibration(asked.calibration).devices.get(asked.gpu)
    link, network = hardware.link(gpu.link), hardware.link(asked.network)
    check_seq_len(start.data.seq_len, model_config, start.model.base)
    described = make_run_spec(start, model_config, asked.ranks, asked.nodes).model
    fitting: list[PlanCandidate] = []
    tried: list[Config] = []
    least: TrainingPlan | None = None

    def plan_of(config: Config) -> TrainingPlan:
        run = make_run_spec(config, model_config, asked.ranks, asked.nodes, model_spec=described)
        return make_training_plan(run, asked.gpu, gpu, link, network, measured)

    named = _explicit_keys(asked, start)
    for sections in _candidate_settings(asked, start, named):
        config = apply_changes(start, sections)
        plan = plan_of(config)
        if config.parallel.base == "paged" and "parallel.resident_bytes" not in named and plan.fits:
            config = apply_changes(config, {"parallel": {"resident_bytes": _largest_resident_bytes(plan)}})
            plan = plan_of(config)
            if plan.memory.on_host == 0 and "parallel.base" not in named:
                continue  # all layers stay on the device: the same as with `base: node`
        tried.append(config)
        if plan.fits:
            fitting.append(PlanCandidate(config, plan, start))
        if least is None or plan.memory.peak_bytes < least.memory.peak_bytes:
            least = plan
    assert least is not None
    if not fitting:
        need = (least.memory.reserved_bytes[1]) / 2**30
        raise UserError(
            f"{start.model.base} does not fit {asked.nodes} x {asked.gpus} {asked.gpu} with any setting: the least is "
            f"{need:.1f} GiB a GPU of {gpu.memory:g}; use more GPUs, a shorter data.seq_len, or a smaller lora.r"
        )
    least_s = min(found.plan.time.step_s for found in fitting)
    best = min(fitting, key=lambda found: found.rank(least_s))
    others = sorted((f for f in fitting if f is not best), key=lambda found: found.plan.time.step_s)
    flat = [flatten_keys(config.model_dump()) for config in tried]
    choices = {key: list(dict.fromkeys(tree[key] for tree in flat)) for key in _SEARCHED_KEYS}
    return SearchResult([best, *others[: _MAX_SHOWN - 1]], len(fitting), len(tried), choices)


def _largest_resident_bytes(least: TrainingPlan) -> int:
    """Of layers on a device, so many whole MiB that a plan just fits; from one with the fewest that there can be."""
    room = (least.gpu.memory_bytes - CUDA_CONTEXT_BYTES) / RESERVED_RATIOS[1] - least.memory.peak_bytes
    return (least.memory.static["base"] + int(room)) // 2**20 * 2**20


def _explicit_keys(asked: PlanArgs, start: Config) -> set[str]:
    """Return the keys that are given: on the command line, or in a run's file."""
    named = {override.partition("=")[0].strip() for override in asked.overrides}
    if asked.micro_batch is not None:
        named.add("train.micro_batch")
    if asked.run_file is not None:
        sections = {section: getattr(start, section) for section in start.model_fields_set}
        named |= {f"{section}.{key}" for section, values in sections.items() for key in values.model_fields_set}
    return named


def _candidate_settings(asked: PlanArgs, start: Config, named: set[str]) -> Iterator[ConfigChanges]:
    """From simple to involved; what was asked for by name is left as it is."""
    ranks = asked.ranks

    def of(key: str, values: list[Any]) -> list[Any]:
        section, _, name = key.partition(".")
        return [getattr(getattr(start, section), name)] if key in named else values

    shards = sorted(
        {
            asked.gpus,
            *(n for n in range(1, ranks + 1) if ranks % n == 0 and (asked.gpus % n == 0 or n % asked.gpus == 0)),
        }
    )
    bases: list[Any] = ["node", *(_base_value(n, asked) for n in shards if n != asked.gpus), "paged"]
    per_rank = start.train.global_batch // ranks
    micro_batches = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
    for base in of("parallel.base", bases):
        for adapter in of("parallel.adapter", ["world", "node"] if asked.nodes > 1 else ["world"]):
            for offload in of("parallel.offload", ["none"] if base == "paged" else ["none", "base"]):
                for checkpointing in of("train.checkpointing", ["full", 2, 3, 4, "none"]):
                    for micro_batch in of("train.micro_batch", micro_batches):
                        yield {
                            "parallel": {"base": base, "adapter": adapter, "offload": offload}
                            | ({"resident_bytes": of("parallel.resident_bytes", [0])[0]} if base == "paged" else {}),
                            "train": {"checkpointing": checkpointing, "micro_batch": micro_batch},
                        }


def _base_value(shards: int, asked: PlanArgs) -> str | int:
    if shards == 1:
        return "replicate"
    return "world" if shards == asked.ranks else shards
