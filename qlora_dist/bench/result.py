"""The shape of the result: what `bench.json` holds is what these say, no more and no less."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Spread(Part):
    """Of all timed steps of all repeats."""

    median: float
    least: float
    most: float


class LayoutFigures(Part):
    """A layout on a number of ranks."""

    layout: str
    ranks: int
    threads_per_rank: int
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
    """By kind, together 1: of a further step of each repeat, under the profiler; the mean of all ranks and repeats."""
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
    loss_difference: float
    """The largest, relative to the reference, of any step of any repeat."""


class LeftOut(Part):
    """A layout that there is not."""

    layout: str
    ranks: int
    reason: str


class Losses(Part):
    """Whether all layouts have trained the same."""

    reference: str
    """Whose losses the others are compared with."""
    tolerance: float
    """Relative."""
    largest_difference: float
    agree: bool


class Machine(Part):
    """Where it was measured."""

    date: str
    versions: dict[str, str]
    system: str
    processor: str
    cores: int
    """Of this process."""
    memory_bytes: int
    device: str
    """cpu, or the names of the GPUs."""
    links_bytes_per_s: dict[str, float]
    """As `plan --calibrate` has measured them; empty: nobody has."""
    load_average: float
    """Of the last minute, before the first run."""


class BenchResult(Part):
    """All of it."""

    format: int = 1
    command: str
    machine: Machine
    config: dict[str, Any]
    """What the layouts have in common."""
    losses: Losses
    layouts: list[LayoutFigures]
    left_out: list[LeftOut]
