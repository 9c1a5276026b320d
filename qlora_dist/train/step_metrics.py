"""A step's line in metrics.jsonl."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qlora_dist.paging.pager import PagingStats


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Figures of one optimizer step. The fields are the keys of metrics.jsonl, in the file's order.

    docs/training.md has a table that is made from their docstrings.
    """

    step: int
    """Number of the step, from 1. The line for 0 has only `eval_loss`, from before training."""
    loss: float
    """Mean loss over the trained tokens of the step; `null` if not finite."""
    lr: float
    """Learning rate."""
    grad_norm: float
    """Norm of all adapters' gradients, before clipping; `null` if not finite."""
    skipped: bool
    """`true` if the loss or gradient was not finite, so the adapters stayed unchanged."""
    tokens: int
    """Tokens of all ranks, without padding."""
    trained_tokens: int
    """Tokens of all ranks that the loss is computed on."""
    positions: int
    """Tokens of all ranks with padding, which is what is computed."""
    tokens_per_s: float
    """Tokens per second of all ranks."""
    step_s: float
    """Seconds of the step on rank 0."""
    data_s: float
    """Seconds of the step spent making the batch."""
    comm_bytes: dict[str, int]
    """Bytes received by rank 0, by [mesh dimension](multi-node.md)."""
    peak_bytes: int
    """Peak bytes on rank 0: of the allocator on CUDA, of the process on a CPU."""
    resident_bytes: int
    """Bytes of rank 0's optimizer states that always stay on the device."""
    paged_bytes: int
    """Bytes of rank 0's optimizer states in pages that move."""
    paging: PagingStats
    """Use of these pages in this step: `hits` (uses of a page that was on the device), `bytes_in`, `bytes_out`,
    `stall_s` (seconds waited)."""
    base_paging: PagingStats | None = None
    """Use of the base's layers on rank 0 in this step, with `parallel.base: paged`: the same figures."""
    base_resident_bytes: int | None = None
    """Bytes of the base's layers on rank 0's device, with `parallel.base: paged`."""
    eval_loss: float | None = None
    """Loss on `data.eval`, if an evaluation was due after the step."""

    def to_row(self) -> dict[str, Any]:
        """Return the line's keys and values, without those that do not apply to the run."""
        return {key: value for key, value in asdict(self).items() if value is not None}
