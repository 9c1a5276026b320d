"""The schema of `bench.json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResultSection(BaseModel):
    """A section of the result, which refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Spread(ResultSection):
    """Median and range over all timed steps of all repeats."""

    median: float
    least: float
    most: float


class LayoutResult(ResultSection):
    """Figures of a layout on a number of ranks."""

    layout: str
    ranks: int
    threads_per_rank: int
    nodes: list[str]
    """SLURM's names of the nodes of each repeat; empty if the runs were not SLURM jobs."""
    overrides: dict[str, Any]
    """Values that the layout changes, by `section.key`."""
    repeats: int
    timed_steps: int
    """Timed steps of all repeats together."""
    step_s: Spread
    tokens_per_s: Spread
    """Tokens per second of all ranks, without padding."""
    trained_tokens_per_s: Spread
    """Tokens per second that have a loss."""
    positions_per_s: Spread
    """Tokens per second of all ranks, padding included."""
    step_shares: dict[str, float]
    """Fractions of a step by kind, which add up to 1.

    They are means over ranks of the last step of the first repeat, which runs under the profiler.
    """
    step_split_s: dict[str, float]
    """Seconds of the median step by kind, from `step_shares`."""
    static_bytes: list[int]
    """Bytes that each rank holds between steps."""
    peak_bytes: list[int]
    """Peak bytes of each rank, the largest of all repeats; on a CPU, of the whole process."""
    received_bytes_per_step: dict[str, int]
    """Bytes that rank 0 receives, by mesh dimension."""
    paged_bytes_per_step: dict[str, int]
    """Bytes that rank 0 pages: `base` in, `optimizer` in and out."""
    read_bytes: list[int]
    """Bytes that each rank reads from the model's folder."""
    load_s: Spread
    """Seconds that the slowest rank spends loading, over repeats."""
    losses: list[float]
    """Loss of each step of the first repeat."""
    loss_difference_of_steps: float
    """Largest relative difference from the reference, over steps and repeats."""
    loss_difference_of_mean: float
    """Relative difference of the mean over all trained tokens from the reference, the largest of all repeats."""

    def loss_difference(self, by: Literal["step", "mean"]) -> float:
        """Return the difference that decides whether the losses agree."""
        return self.loss_difference_of_steps if by == "step" else self.loss_difference_of_mean


class SkippedLayout(ResultSection):
    """A layout that does not exist on a number of ranks, with the reason."""

    layout: str
    ranks: int
    reason: str


class LossComparison(ResultSection):
    """Result of comparing the layouts' losses."""

    reference: str
    """Name of the case with which the others are compared."""
    by: Literal["step", "mean"]
    """`step` to compare the loss of each step (fp32), `mean` the mean over all trained tokens (16 bit)."""
    tolerance: float
    """Largest relative difference that is accepted."""
    largest_difference: float
    agree: bool


class BenchMachine(ResultSection):
    """Machine of rank 0 of the first run, which in a job is the first node."""

    date: str
    versions: dict[str, str]
    system: str
    processor: str
    cores: int
    """Number of cores that this rank may use."""
    memory_bytes: int
    device: str
    """cpu, or the names of the GPUs that this rank sees."""
    links_bytes_per_s: dict[str, float]
    """Speeds that `plan --calibrate` measured, by link; empty if it has not run."""
    load_average: float
    """Load average of the minute before the first run."""


class BenchResult(ResultSection):
    """Content of `bench.json`."""

    format: int = 1
    command: str
    machine: BenchMachine
    config: dict[str, Any]
    """Common configuration of all layouts."""
    losses: LossComparison
    layouts: list[LayoutResult]
    left_out: list[SkippedLayout]
