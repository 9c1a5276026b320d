"""How far a run is: all that its losses depend on besides adapters, moments and random states. Equal on all ranks."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict

_RECENT_STEPS = 20


@dataclass
class RunProgress:
    """Goes into every checkpoint."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    step: int = 0
    """Optimizer steps done, those included that were skipped because something was not finite."""
    optimizer_steps: int = 0
    """Updates of the adapters."""
    tokens: int = 0
    """Trained on, padding not counted."""
    loss: float = float("nan")
    """Of the last step."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps, finite and no spikes."""
    eval_losses: list[float] = field(default_factory=list)
    """The first is that of the base model alone."""
    evaluated: int = -1
    """Step after which the last of `eval_losses` was measured; -1: not known."""
    wall_s: float = 0.0
    """Seconds that the run has taken until here, in all starts together."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    left_out: list[int] = field(default_factory=list)
    """Global batches that are never trained on, because the run went back before them."""

    def batch_index(self) -> int:
        """The place in the data's order of the next step's global batch."""
        index = self.step
        for left_out in sorted(self.left_out):
            index += left_out <= index
        return index

    def is_spike(self, loss: float, factor: float | None) -> bool:
        """Whether a loss is more than `factor` times the median of the last 20 steps'; False before there are 20."""
        if factor is None or len(self.recent_losses) < _RECENT_STEPS:
            return False
        return loss > factor * statistics.median(self.recent_losses)

    def count(self, loss: float, tokens: int, finite: bool, spike: bool) -> None:
        """Take note of a step."""
        self.step += 1
        self.tokens += tokens
        self.loss = loss
        self.optimizer_steps += finite
        self.skipped_steps += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite and not spike:
            self.recent_losses = [*self.recent_losses, loss][-_RECENT_STEPS:]

    def evaluate(self, eval_loss: float) -> None:
        """Take note of the held-out loss after the last step; a value that is known already is not repeated."""
        if self.evaluated < 0 and self.eval_losses[-1:] == [eval_loss]:
            self.eval_losses.pop()  # of a checkpoint that does not say which step its values belong to
        if self.evaluated != self.step:
            self.eval_losses.append(eval_loss)
        self.evaluated = self.step

    def to_json(self) -> dict[str, Any]:
        """For the manifest; a loss that is no number is null."""
        tree = asdict(self)
        return {**tree, "loss": self.loss if self.loss == self.loss and abs(self.loss) != float("inf") else None}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> RunProgress:
        """The inverse."""
        known = {**tree, "loss": float("nan") if tree["loss"] is None else tree["loss"]}
        return cls(**known)
