"""The lines that a run prints at its start, and its summary at its end."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text

from qlora_dist.adapters.attach import named_trainable_parameters
from qlora_dist.plan.print_plan import term_label
from qlora_dist.runs.run_dir import RunDir, run_path
from qlora_dist.runtime.byte_sizes import format_bytes
from qlora_dist.runtime.device_memory import peak_memory_bytes
from qlora_dist.runtime.process_group import bf16_warning
from qlora_dist.train.console import RunConsole, pluralize
from qlora_dist.train.prediction import RunPrediction
from qlora_dist.train.run_setup import RunSetup
from qlora_dist.train.trainer import TrainResult


@dataclass(frozen=True, kw_only=True)
class LoadStats:
    """Memory and time that loading took on this rank."""

    static_bytes: int
    """Bytes of the model's weights that stay on the device."""
    optimizer_state_bytes: int
    """Bytes of the optimizer state on the device."""
    read_bytes: int
    """Bytes read from the model's folder."""
    load_s: float
    """Seconds spent loading the weights."""


def describe_run(setup: RunSetup) -> Iterator[str]:
    """Yield the lines about model, placement and data that a run prints at its start."""
    config = setup.config
    trained = sum(p.numel() for _, p in named_trainable_parameters(setup.model))
    quantized = f"quantized to {config.model.quant_type} on loading"
    if setup.folder.is_quantized or config.model.keep_format:
        quantized = "in 4 bit" if setup.folder.is_quantized else "in its published format"
    yield f"base: {config.model.base}, {quantized}; {trained:,} trained parameters (r={config.lora.r})"
    if config.lora.from_adapter is not None:
        yield f"the adapter begins from {config.lora.from_adapter}"
    yield _describe_placement(setup)
    if config.model.compute_dtype == "bf16" and (warning := bf16_warning(setup.device)) is not None:
        yield warning
    yield from describe_data(setup)


def describe_data(setup: RunSetup) -> Iterator[str]:
    """Yield a line about the rows of each source, including truncation, and one about steps and epochs."""
    loader = setup.loader
    epochs = loader.steps_to_epochs(setup.steps)
    for rows, weight in loader.sources:
        mixed = f"; weight {weight:g}: each row {epochs * weight:.2f} times" if len(loader.sources) > 1 else ""
        yield f"{rows.describe()}{mixed}"
    if setup.eval_rows is not None:
        yield f"held out: {setup.eval_rows.describe()}"
    padding = 100 * loader.padding_fraction(setup.steps)
    yield (
        f"{pluralize(setup.steps, 'step')} of {pluralize(setup.config.train.global_batch, 'row')} = {epochs:.2f} "
        f"epochs of {pluralize(round(loader.rows_per_epoch), 'row')}; {padding:.1f} % padding"
    )


def _describe_placement(setup: RunSetup) -> str:
    """Return a sentence about the sharding of base, adapters and optimizer states."""
    sizes = setup.sizes
    ranks = f"{pluralize(sizes.world_size, 'rank')} on {setup.device.type}"
    if sizes.world_size == 1:
        return f"{ranks}: base, adapters and optimizer states are whole on it"

    def shared_by(shards: int) -> str:
        if shards == 1:
            return "whole on each"
        if shards == sizes.world_size:
            return f"sharded over all {shards}"
        return f"sharded over {shards} ranks, in {sizes.world_size // shards} copies"

    return (
        f"{ranks}: the base is {shared_by(sizes.base_shards)}, "
        f"adapters and optimizer states are {shared_by(sizes.adapter_shards)}"
    )


def summarize(
    setup: RunSetup,
    result: TrainResult,
    load_stats: LoadStats,
    prediction: RunPrediction | str,
    console: RunConsole,
    run_dir: RunDir | None,
) -> None:
    """Print the result, and write it as summary.json. Called on all ranks."""
    progress, evals = result.progress, result.progress.eval_losses
    first_is_base = len(evals) > 1 or progress.evaluated == 0
    summary: dict[str, Any] = {
        "eval_loss_first": evals[0] if evals and first_is_base else None,
        "eval_loss_last": evals[-1] if evals else None,
        "loss_last": progress.loss,
        "steps": progress.step,
        "tokens": progress.tokens,
        "skipped_steps": progress.skipped_steps,
        "left_out_batches": progress.left_out,
        "tokens_per_s": _median_tokens_per_s(result, run_dir),
        "static_bytes": _gather_int(load_stats.static_bytes, setup.device),
        "peak_bytes": _gather_int(result.peak_bytes or peak_memory_bytes(setup.device), setup.device),
        "read_bytes": _gather_int(load_stats.read_bytes, setup.device),
        "load_s": max(_gather_int(round(1e6 * load_stats.load_s), setup.device)) / 1e6,
        "comm_bytes_per_step": result.comm_bytes,
        "base_fetched_bytes_per_step": result.fetched_bytes,
        "base_stall_share": statistics.median(result.stall_shares or [0.0]),
        "adapter": str(run_path(setup.config.run) / "adapter"),
        "wall_s": progress.wall_s,
    }
    if result.step_shares:
        summary["step_shares"] = _mean_over_ranks(result.step_shares, setup.device)
    if isinstance(prediction, RunPrediction) and result.tokens_per_s:
        summary["plan"] = prediction.compare_with(summary, load_stats.optimizer_state_bytes)
    if run_dir is not None:
        run_dir.write_summary(summary)
    console.console.print(_table(summary, has_steps=bool(result.tokens_per_s)))


def _median_tokens_per_s(result: TrainResult, run_dir: RunDir | None) -> float | None:
    """Return the median of this start's steps, or of earlier ones' if this start only evaluated and exported."""
    speeds = result.tokens_per_s or (run_dir.values("tokens_per_s") if run_dir is not None else [])
    return statistics.median(speeds) if speeds else None


def _table(summary: dict[str, Any], *, has_steps: bool) -> Table:
    table = Table(show_header=False, title="summary", title_justify="left")
    first, last = summary["eval_loss_first"], summary["eval_loss_last"]
    if first is not None:
        table.add_row("held-out loss", f"{first:.4f} -> {last:.4f} ({100 * (last / first - 1):+.1f} %)")
    elif last is not None:
        table.add_row("held-out loss", f"{last:.4f}")
    table.add_row("training loss", f"{summary['loss_last']:.4f} after {summary['steps']} steps")
    if summary["skipped_steps"]:
        table.add_row("skipped steps", f"{summary['skipped_steps']} (not finite)")
    if summary["tokens_per_s"] is not None:
        table.add_row("tokens/s", f"{summary['tokens_per_s']:,.0f} (median, all ranks, padding not counted)")
    if "step_shares" in summary:
        shares = sorted(summary["step_shares"].items(), key=lambda item: -item[1])
        split = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares if share >= 0.005)
        table.add_row("last step, profiled", split)
    table.add_row("held per rank", ", ".join(map(format_bytes, summary["static_bytes"])))
    table.add_row("peak per rank", ", ".join(map(format_bytes, summary["peak_bytes"])))
    if has_steps:
        traffic = ", ".join(f"{dim} {format_bytes(nbytes)}" for dim, nbytes in summary["comm_bytes_per_step"].items())
        table.add_row("received per step", f"{traffic or 'nothing'} (rank 0)")
    if summary["base_fetched_bytes_per_step"]:
        fetched, stall = format_bytes(summary["base_fetched_bytes_per_step"]), 100 * summary["base_stall_share"]
        table.add_row(
            "fetched per step", f"{fetched} of the base's layers, {stall:.0f} % of the time spent waiting (rank 0)"
        )
    for term, (planned, measured) in summary.get("plan", {}).items():
        if planned is not None and measured is not None:
            table.add_row(term_label(term), _planned_and_measured(term, planned, measured))
    table.add_row("adapter", Text(summary["adapter"]))
    table.add_row("time", f"{summary['wall_s']:.0f} s, all starts together")
    return table


def _planned_and_measured(term: str, planned: float, measured: float) -> str:
    planned_text, measured_text = (format_bytes(v) if "bytes" in term else f"{v:,.0f}" for v in (planned, measured))
    if planned_text == measured_text:
        return f"{measured_text}, as planned"
    off = f" ({100 * (measured / planned - 1):+.1f} %)" if planned else ""
    return f"{measured_text}, planned {planned_text}{off}"


def _mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device) / dist.get_world_size()
    dist.all_reduce(means)
    return dict(zip(values, means.tolist(), strict=True))


def _gather_int(value: int, device: torch.device) -> list[int]:
    values = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    return values.tolist()
