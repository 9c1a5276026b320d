"""A plan as tables: every term of a rank's memory, and the traffic and time of a step."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from qlora_dist.plan.memory_estimate import CUDA_CONTEXT_BYTES
from qlora_dist.plan.step_time import TIME_UNCERTAINTY
from qlora_dist.plan.training_plan import TrainingPlan
from qlora_dist.runtime.byte_sizes import format_gib

PHASE_LABELS = {
    "embedding": "at the embedding",
    "layer_forward": "in a layer's forward pass",
    "head": "at the head",
    "layer_backward": "in a layer's backward pass",
    "optimizer": "at the update",
}
_TERM_LABELS = {
    "weights_bytes": "weights, rank 0",
    "moments_bytes": "optimizer states, rank 0",
    "peak_bytes": "peak, rank 0",
    "tokens_per_s": "tokens/s, all ranks",
}


def term_label(term: str) -> str:
    """Return the label in tables of a term of `plan` in a run's summary.json."""
    dimension = term.removesuffix("_bytes_per_step")
    return _TERM_LABELS.get(term, f"received per step, {dimension}")


def print_plan(plan: TrainingPlan, model: str, console: Console) -> None:
    """Print a plan as two tables and a sentence."""
    run, memory, time = plan.run, plan.memory, plan.time
    table = Table(
        title=f"{model} on {run.nodes} x {run.ranks_per_node} {plan.gpu_name}: memory of a rank", title_justify="left"
    )
    table.add_column("term")
    table.add_column("GiB", justify="right")
    for name, nbytes in memory.static.items():
        if nbytes:
            table.add_row(name, format_gib(nbytes))
    table.add_row("between steps", format_gib(memory.static_bytes), style="bold", end_section=True)
    for name, nbytes in memory.phases[memory.peak_phase].items():
        if nbytes:
            table.add_row(name, format_gib(nbytes))
    table.add_row(
        f"peak, {PHASE_LABELS[memory.peak_phase]}", format_gib(memory.peak_bytes), style="bold", end_section=True
    )
    low, high = memory.reserved_bytes
    table.add_row("reserved by the allocator", f"{format_gib(low)} to {format_gib(high)}")
    table.add_row("CUDA context", format_gib(CUDA_CONTEXT_BYTES))
    table.add_row(f"the card ({plan.gpu_name})", format_gib(plan.gpu.memory_bytes), style="bold")
    console.print(table)

    rows = [
        ("host memory of a node, besides Python's and CUDA's", f"{format_gib(plan.node_host_bytes)} GiB"),
        (
            "read at the start, a base in 4 bit",
            f"{plan.read_bytes / 1e9:,.1f} GB, {plan.load_s:,.0f} s at 2 GB/s a node",
        ),
        ("read at the start, a base in 16 bit", f"{plan.read_16bit_bytes / 1e9:,.1f} GB"),
        ("sent and received by a rank in a step, inside its node", f"{plan.intra_node_bytes / 1e9:,.2f} GB"),
        ("and between nodes", f"{plan.inter_node_bytes / 1e9:,.2f} GB"),
        ("micro-batches of a step", f"{run.accumulation} x {run.micro_batch} x {run.seq_len:,} tokens"),
        ("operations of a rank in a step", f"{time.flops / 1e12:,.1f} TFLOP"),
        *((f"  {name}", f"{seconds:,.2f} s") for name, seconds in time.busy_s.items() if seconds > 0.005),
        ("a step", f"{time.step_s:,.2f} s"),
        (
            "all ranks together",
            f"{time.tokens_per_s:,.0f} tokens/s ({time.tokens_per_s / run.shard_counts.world_size:,.0f} a GPU)",
        ),
    ]
    precision = f"+-{TIME_UNCERTAINTY:.0%}: nothing was measured"
    if plan.is_calibrated:
        precision = "from speeds that --calibrate measured"
    times = Table(title=f"A step (times {precision})", title_justify="left", show_header=False)
    times.add_column()
    times.add_column(justify="right")
    for row in rows:
        times.add_row(*row)
    console.print(times)
    console.print(f"Bound by {time.bound_by}. {_describe_fit(plan)}", highlight=False)


def _describe_fit(plan: TrainingPlan) -> str:
    low, high = (nbytes + CUDA_CONTEXT_BYTES for nbytes in plan.memory.reserved_bytes)
    card = plan.gpu.memory_bytes
    if high <= card:
        return f"It fits, with {format_gib(card - high)} GiB to spare."
    if low <= card:
        return "It fits only if the allocator reserves little more than the tensors need."
    return f"It does not fit: {format_gib(low - card)} GiB are missing."
