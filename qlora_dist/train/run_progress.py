"""A run's counters: everything that its losses depend on besides adapters, optimizer state and random states."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict

_RECENT_STEPS = 20


@dataclass(kw_only=True)
class RunProgress:
    """Counters of a run, equal on all ranks. Every checkpoint has them."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    step: int = 0
    """Number of optimizer steps done, including steps that were skipped because something was not finite."""
    optimizer_steps: int = 0
    """Number of updates of the adapters."""
    tokens: int = 0
    """Number of tokens in the batches so far, without padding."""
    loss: float = float("nan")
    """Loss of the last step."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last 20 steps that were finite and no spikes."""
    eval_losses: list[float] = field(default_factory=list)
    """Held-out losses; the first is the base model's."""
    evaluated: int = -1
    """Step after which the last of `eval_losses` was measured; -1: unknown."""
    wall_s: float = 0.0
    """Seconds that the run has taken so far, in all starts together."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    left_out: list[int] = field(default_factory=list)
    """Indices of global batches that a rollback left out for good."""

    def batch_index(self) -> int:
        """Return the place of the next step's global batch in the data's order."""
        index = self.step
        for left_out in sorted(self.left_out):
            index += left_out <= index
        return index

    def is_spike(self, loss: float, factor: float | None) -> bool:
        """Return whether a loss exceeds `factor` times the median of the last 20 steps; False before there are 20."""
        if factor is None or len(self.recent_losses) < _RECENT_STEPS:
            return False
        return loss > factor * statistics.median(self.recent_losses)

    def record_step(self, loss: float, tokens: int, *, finite: bool, spike: bool) -> None:
        self.step += 1
        self.tokens += tokens
        self.loss = loss
        self.optimizer_steps += finite
        self.skipped_steps += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite and not spike:
            self.recent_losses = [*self.recent_losses, loss][-_RECENT_STEPS:]

    def record_eval(self, eval_loss: float) -> None:
        """Record the held-out loss after the last step, unless it is recorded already."""
        if self.evaluated < 0 and self.eval_losses[-1:] == [eval_loss]:
            self.eval_losses.pop()  # the checkpoint has this value without its step
        if self.evaluated != self.step:
            self.eval_losses.append(eval_loss)
        self.evaluated = self.step

    def to_json(self) -> dict[str, Any]:
        """Return the counters for the manifest, with a loss that is not finite as null."""
        return asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> RunProgress:
        """Return the counters that `to_json` wrote."""
        return cls(**tree | {"loss": float("nan") if tree["loss"] is None else tree["loss"]})
