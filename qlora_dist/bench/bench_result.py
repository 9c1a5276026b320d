"""The shape of the result: what `bench.json` holds is what these say, no more and no less."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResultSection(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Spread(ResultSection):
    """Of all timed steps of all repeats."""

    median: float
    least: float
    most: float


class LayoutResult(ResultSection):
    """A layout on a number of ranks."""

    layout: str
    ranks: int
    threads_per_rank: int
    nodes: list[str]
    """Of each repeat, as SLURM names them; empty: they were no jobs of SLURM's."""
    overrides: dict[str, Any]
    """What the layout changes in the configuration."""
    repeats: int
    timed_steps: int
    """Of all repeats together."""
    step_s: Spread
    tokens_per_s: Spread
    """Of all ranks, padding not counted."""
    trained_tokens_per_s: Spread
    """Tokens that have a loss."""
    positions_per_s: Spread
    """Padding counted."""
    step_shares: dict[str, float]
    """By kind, together 1: of the last step of the first repeat, under the profiler; the mean of all ranks."""
    step_split_s: dict[str, float]
    """These shares of the median step."""
    static_bytes: list[int]
    """Of each rank."""
    peak_bytes: list[int]
    """Of each rank, the largest of all repeats; on a CPU that of the process, libraries and all."""
    received_bytes_per_step: dict[str, int]
    """By rank 0, by mesh dimension."""
    paged_bytes_per_step: dict[str, int]
    """Of rank 0: `base` in, `optimizer` in and out."""
    read_bytes: list[int]
    """From the model's folder, by each rank."""
    load_s: Spread
    """Of the slowest rank, over repeats."""
    losses: list[float]
    """Of each step of the first repeat."""
    loss_difference_of_steps: float
    """Relative to the reference: the largest of any step of any repeat."""
    loss_difference_of_mean: float
    """Relative to the reference: of the mean of all trained tokens, the largest of any repeat."""

    def loss_difference(self, by: Literal["step", "mean"]) -> float:
        """The one of the two that decides."""
        return self.loss_difference_of_steps if by == "step" else self.loss_difference_of_mean


class SkippedLayout(ResultSection):
    """A layout that there is not."""

    layout: str
    ranks: int
    reason: str


class LossComparison(ResultSection):
    """Whether all layouts have trained the same."""

    reference: str
    """Whose losses the others are compared with."""
    by: Literal["step", "mean"]
    """What is compared: in fp32 the loss of each step; in 16 bit the mean of all trained tokens."""
    tolerance: float
    """Relative."""
    largest_difference: float
    agree: bool


class BenchMachine(ResultSection):
    """Where it was measured, as rank 0 of the first run has found it: of a job the first of its nodes."""

    date: str
    versions: dict[str, str]
    system: str
    processor: str
    cores: int
    """Of this rank."""
    memory_bytes: int
    device: str
    """cpu, or the names of the GPUs that this rank sees."""
    links_bytes_per_s: dict[str, float]
    """As `plan --calibrate` has measured them; empty: nobody has."""
    load_average: float
    """Of the last minute, as the first run began."""


class BenchResult(ResultSection):
    """All of it."""

    format: int = 1
    command: str
    machine: BenchMachine
    config: dict[str, Any]
    """What the layouts have in common."""
    losses: LossComparison
    layouts: list[LayoutResult]
    left_out: list[SkippedLayout]
