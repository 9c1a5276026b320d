"""`plan --plot`: memory by phase, and tokens/s against nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_dist.errors import UserError
from qlora_dist.plan.memory_estimate import CUDA_CONTEXT_BYTES
from qlora_dist.plan.training_plan import TrainingPlan
from qlora_dist.report.panels import draw_panels, stack_bars


def plot_plan(plan: TrainingPlan, plans_by_nodes: Sequence[tuple[int, TrainingPlan]], path: Path) -> None:
    """Plot a plan's memory, and speeds by nodes, to a file whose suffix sets the format (.png, .svg, .pdf)."""
    memory = plan.memory

    def plot_memory(axis: Any) -> None:
        parts = {}
        for name in [*memory.static, *dict.fromkeys(term for terms in memory.phases.values() for term in terms)]:
            heights = [(memory.static.get(name, 0) + terms.get(name, 0)) / 2**30 for terms in memory.phases.values()]
            if max(heights) > 0.001 * plan.gpu.memory:
                parts[name] = heights
        stack_bars(axis, [phase.replace("_", " ") for phase in memory.phases], parts)
        axis.axhline(plan.gpu.memory - CUDA_CONTEXT_BYTES / 2**30, color="black", linestyle="--", label=plan.gpu_name)
        axis.axhspan(*(nbytes / 2**30 for nbytes in memory.reserved_bytes), color="grey", alpha=0.2, label="reserved")
        axis.set(ylabel="GiB of a rank", title="memory, by phase of a step")
        axis.legend(fontsize="small")

    def plot_speed(axis: Any) -> None:
        nodes, speeds = [n for n, _ in plans_by_nodes], [other.time.tokens_per_s for _, other in plans_by_nodes]
        axis.plot(nodes, speeds, marker="o")
        axis.set(xlabel="nodes", ylabel="tokens/s of all ranks, +-30 %", title="speed", xscale="log", yscale="log")

    figure = draw_panels([plot_memory, plot_speed], 13, 5)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot: {path} cannot be written ({error}); give a path such as plan.png") from None
