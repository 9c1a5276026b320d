"""`plan --search`: the fastest configuration that fits, as a configuration file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console

from qlora_dist.config import Config
from qlora_dist.config_file import Sections, changed, dump_config
from qlora_dist.errors import UserError
from qlora_dist.plan.calibration import load_calibration
from qlora_dist.plan.find_model import read_model_config
from qlora_dist.plan.hardware import load_hardware
from qlora_dist.plan.memory import CONTEXT_BYTES, RESERVED
from qlora_dist.plan.plan import Plan, make_plan
from qlora_dist.plan.run import make_run
from qlora_dist.plan.verb import Asked, make_config
from qlora_dist.positions import check_seq_len

_WORTHWHILE = 0.97
"""A more involved configuration has to take no more than this part of the time: times are not known better."""


@dataclass(frozen=True)
class Found:
    """A configuration that fits."""

    config: Config
    plan: Plan


def print_fastest(asked: Asked, as_json: bool) -> None:
    """Print the configuration as YAML, and on standard error what it costs; or both as JSON.

    Raises:
        UserError: a mistake in what was asked, or nothing fits.
    """
    found = fastest(asked)
    if as_json:
        tree = found.config.model_dump(mode="json")
        typer.echo(json.dumps({"config": tree, "plan": found.plan.as_json()}, indent=2))
        return
    typer.echo(dump_config(found.config), nl=False)
    from qlora_dist.plan.table import print_plan

    print_plan(found.plan, asked.model, Console(stderr=True))


def fastest(asked: Asked) -> Found:
    """Try what can be chosen, at the same tokens of a step.

    Chosen are the meshes of base and adapters, rows of a micro-batch, which layers are checkpointed, offloading and
    paging of the base; what was asked for by name stays. The optimizer's pages follow from the room that is left
    (`optim.resident_bytes: auto`). The simplest is taken of those that are about as fast.

    Raises:
        UserError: a mistake in what was asked, or nothing fits; it says what is missing.
    """
    hardware, model_config = load_hardware(asked.hardware), read_model_config(asked.model)
    gpu, measured = hardware.gpu(asked.gpu), load_calibration(asked.calibration).devices.get(asked.gpu)
    link, network = hardware.link(gpu.link), hardware.link(asked.network)
    start = make_config(asked)
    check_seq_len(start.data.seq_len, model_config, asked.model)
    described = make_run(start, model_config, asked.ranks, asked.nodes).model
    best: Found | None = None
    least: Plan | None = None

    def plan_of(config: Config) -> Plan:
        run = make_run(config, model_config, asked.ranks, asked.nodes, described=described)
        return make_plan(run, asked.gpu, gpu, link, network, measured)

    named = _named(asked)
    for sections in _choices(asked, start, named):
        config = changed(start, sections)
        plan = plan_of(config)
        if config.parallel.base == "paged" and "parallel.resident_bytes" not in named and plan.fits:
            config = changed(config, {"parallel": {"resident_bytes": _budget(plan)}})
            plan = plan_of(config)
        if plan.fits and (best is None or plan.time.step_s < best.plan.time.step_s * _WORTHWHILE):
            best = Found(config, plan)
        if least is None or plan.memory.peak_bytes < least.memory.peak_bytes:
            least = plan
    assert least is not None
    if best is None:
        need = (least.memory.reserved_bytes[1]) / 2**30
        raise UserError(
            f"{asked.model} does not fit {asked.nodes} x {asked.gpus} {asked.gpu} with any setting: the least is "
            f"{need:.1f} GiB a GPU of {gpu.memory:g}; use more GPUs, a shorter data.seq_len, or a smaller lora.r"
        )
    return best


def _budget(least: Plan) -> int:
    """Of layers on a device, so many whole MiB that a plan just fits; from one with the fewest that there can be."""
    room = (least.gpu.memory_bytes - CONTEXT_BYTES) / RESERVED[1] - least.memory.peak_bytes
    return (least.memory.static["base"] + int(room)) // 2**20 * 2**20


def _named(asked: Asked) -> set[str]:
    named = {override.partition("=")[0].strip() for override in asked.overrides}
    return named | ({"train.micro_batch"} if asked.micro_batch is not None else set())


def _choices(asked: Asked, start: Config, named: set[str]) -> Iterator[Sections]:
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
    bases: list[Any] = ["node", *(_name(n, asked) for n in shards if n != asked.gpus), "paged"]
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


def _name(shards: int, asked: Asked) -> str | int:
    if shards == 1:
        return "replicate"
    return "world" if shards == asked.ranks else shards
