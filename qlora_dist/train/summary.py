"""What a run says of itself at its start and at its end."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text

from qlora_dist.adapters.attach import adapter_parameters
from qlora_dist.train.console import RunConsole, gib
from qlora_dist.train.expected import Expected
from qlora_dist.train.loop import History
from qlora_dist.train.memory import peak_bytes
from qlora_dist.train.run_dir import RunDir, run_path
from qlora_dist.train.setup import Setup


@dataclass(frozen=True)
class Held:
    """What a rank has after loading."""

    static_bytes: int
    """Of its weights."""
    moments_bytes: int
    """Of its moments, on the device."""
    read_bytes: int
    """From the model's folder."""
    load_s: float
    """For all of the weights."""


def announce(setup: Setup, console: RunConsole) -> None:
    """What is going to happen, in a few lines."""
    config, sizes = setup.config, setup.sizes
    trained = sum(p.numel() for _, p in adapter_parameters(setup.model))
    quantized = "in 4 bit" if setup.folder.is_quantized else f"quantized to {config.model.quant_type} on loading"
    console.say(f"base: {config.model.base}, {quantized}; {trained:,} trained parameters (r={config.lora.r})")
    if config.lora.from_adapter is not None:
        console.say(f"the adapter begins from {config.lora.from_adapter}")
    console.say(
        f"{sizes.world_size} ranks on {setup.device.type}: a copy of the base on each {sizes.base_shards}, "
        f"adapters and optimizer over {sizes.adapter_shards}"
    )
    loader = setup.loader
    epochs = loader.epochs_in(setup.steps)
    for rows, weight in loader.sources:
        mixed = f"; weight {weight:g}: each row {epochs * weight:.2f} times" if len(loader.sources) > 1 else ""
        console.say(f"{rows.sentence()}{mixed}")
    if setup.eval_rows is not None:
        console.say(f"held out: {setup.eval_rows.sentence()}")
    console.say(
        f"{setup.steps:,} steps of {config.train.global_batch} rows = {epochs:.2f} epochs of "
        f"{loader.rows_per_epoch:,.0f} rows; {100 * loader.padding(setup.steps):.1f} % padding"
    )


def summarize(
    setup: Setup,
    history: History,
    held: Held,
    wall_s: float,
    expected: Expected | str,
    console: RunConsole,
    run_dir: RunDir | None,
) -> None:
    """Print the result, and write it as summary.json. Called on all ranks.

    Args:
        setup: of the run.
        history: of its steps.
        held: by this rank, and what it took to load it.
        wall_s: since the start.
        expected: what was planned.
        console: for the table.
        run_dir: for the file.
    """
    progress = history.progress
    summary: dict[str, Any] = {
        "eval_loss_first": progress.eval_losses[0] if progress.eval_losses else None,
        "eval_loss_last": progress.eval_losses[-1] if progress.eval_losses else None,
        "loss_last": progress.loss,
        "steps": progress.step,
        "tokens": progress.tokens,
        "skipped_steps": progress.skipped_steps,
        "left_out_batches": progress.left_out,
        # none, if there was nothing left to do but to export the adapter
        "tokens_per_s": statistics.median(history.tokens_per_s or [0.0]),
        "static_bytes": _of_all_ranks(held.static_bytes, setup.device),
        "peak_bytes": _of_all_ranks(history.peak_bytes or peak_bytes(setup.device), setup.device),
        "read_bytes": _of_all_ranks(held.read_bytes, setup.device),
        "load_s": max(_of_all_ranks(round(1e6 * held.load_s), setup.device)) / 1e6,
        "comm_bytes_per_step": history.comm_bytes,
        "base_fetched_bytes_per_step": history.fetched_bytes,
        "base_stall_share": statistics.median(history.stalls or [0.0]),
        "adapter": str(run_path(setup.config.run) / "adapter"),
        "wall_s": wall_s,
    }
    if history.step_shares:
        summary["step_shares"] = _mean_of_all_ranks(history.step_shares, setup.device)
    if isinstance(expected, Expected) and history.tokens_per_s:
        summary["plan"] = expected.against(summary, held.moments_bytes)
    if run_dir is not None:
        run_dir.finish(summary)
    console.console.print(_table(summary))


def _table(summary: dict[str, Any]) -> Table:
    table = Table(show_header=False, title="summary", title_justify="left")
    if summary["eval_loss_first"] is not None:
        first, last = summary["eval_loss_first"], summary["eval_loss_last"]
        table.add_row("held-out loss", f"{first:.4f} -> {last:.4f} ({100 * (last / first - 1):+.1f} %)")
    table.add_row("training loss", f"{summary['loss_last']:.4f} after {summary['steps']} steps")
    if summary["skipped_steps"]:
        table.add_row("skipped steps", f"{summary['skipped_steps']} (not finite)")
    table.add_row("tokens/s", f"{summary['tokens_per_s']:,.0f} (median, all ranks, padding not counted)")
    if "step_shares" in summary:
        shares = sorted(summary["step_shares"].items(), key=lambda item: -item[1])
        split = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares if share >= 0.005)
        table.add_row("last step, profiled", split)
    table.add_row("held per rank", ", ".join(map(gib, summary["static_bytes"])))
    table.add_row("peak per rank", ", ".join(map(gib, summary["peak_bytes"])))
    traffic = ", ".join(f"{dim} {gib(nbytes)}" for dim, nbytes in summary["comm_bytes_per_step"].items())
    table.add_row("received per step", f"{traffic or 'nothing'} (rank 0)")
    if summary["base_fetched_bytes_per_step"]:
        fetched, stall = gib(summary["base_fetched_bytes_per_step"]), 100 * summary["base_stall_share"]
        table.add_row(
            "fetched per step", f"{fetched} of the base's layers, {stall:.0f} % of the time spent waiting (rank 0)"
        )
    for term, (planned, measured) in summary.get("plan", {}).items():
        if planned is not None and measured is not None:
            table.add_row(f"plan: {term.removesuffix('_per_step')}", _both(term, planned, measured))
    table.add_row("adapter", Text(summary["adapter"]))
    table.add_row("time", f"{summary['wall_s']:.0f} s")
    return table


def _both(term: str, planned: float, measured: float) -> str:
    planned_text, measured_text = (gib(v) if "bytes" in term else f"{v:,.0f}" for v in (planned, measured))
    off = f" ({100 * (measured / planned - 1):+.1f} %)" if planned else ""
    return f"{planned_text}, measured {measured_text}{off}"


def _mean_of_all_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device) / dist.get_world_size()
    dist.all_reduce(means)
    return dict(zip(values, means.tolist(), strict=True))


def _of_all_ranks(value: int, device: torch.device) -> list[int]:
    values = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    return values.tolist()
