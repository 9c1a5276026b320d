"""`plan --plot`: memory by phase, and tokens/s against nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_dist.errors import UserError
from qlora_dist.plan.memory_estimate import CUDA_CONTEXT_BYTES
from qlora_dist.plan.training_plan import TrainingPlan


def plot_plan(plan: TrainingPlan, plans_by_nodes: Sequence[tuple[int, TrainingPlan]], path: Path) -> None:
    """Two pictures in one file, whose kind its name says (.png, .svg, .pdf).

    Args:
        plan: whose memory is shown.
        plans_by_nodes: the same configuration on so many nodes.
        path: of the file.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    memory = plan.memory
    phases = list(memory.phases)
    names = [*memory.static, *dict.fromkeys(term for terms in memory.phases.values() for term in terms)]
    bottom = [0.0] * len(phases)
    for name in names:
        heights = [(memory.static.get(name, 0) + memory.phases[phase].get(name, 0)) / 2**30 for phase in phases]
        if max(heights) > 0.001 * plan.gpu.memory:
            left.bar([phase.replace("_", " ") for phase in phases], heights, bottom=bottom, label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    left.axhline(plan.gpu.memory - CUDA_CONTEXT_BYTES / 2**30, color="black", linestyle="--", label=plan.gpu_name)
    left.axhspan(*(nbytes / 2**30 for nbytes in memory.reserved_bytes), color="grey", alpha=0.2, label="reserved")
    left.set(ylabel="GiB of a rank", title="memory, by phase of a step")
    left.legend(fontsize="small")
    right.plot(
        [nodes for nodes, _ in plans_by_nodes], [other.time.tokens_per_s for _, other in plans_by_nodes], marker="o"
    )
    right.set(xlabel="nodes", ylabel="tokens/s of all ranks, +-30 %", title="speed", xscale="log", yscale="log")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot: {path} cannot be written ({error}); give a path such as plan.png") from None
