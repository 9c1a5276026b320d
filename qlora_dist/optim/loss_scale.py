"""Loss scaling for fp16 (Micikevicius et al., 2018, section 3.2)."""

from __future__ import annotations

_FIRST_SCALE = 2.0**13  # torch.amp.GradScaler's 2^16 skips the first steps of most runs
_GROWTH_INTERVAL = 2000  # steps, as in torch.amp.GradScaler


class LossScale:
    """A factor of the loss that keeps small gradients from becoming zero in fp16; 1 for other compute dtypes.

    It is halved after a step whose gradient was not finite, and doubled after 2000 finite steps in a row.
    """

    def __init__(self, compute_dtype: str) -> None:
        self._dynamic = compute_dtype == "fp16"
        self.value = _FIRST_SCALE if self._dynamic else 1.0
        self._finite_steps = 0

    def update(self, finite: bool) -> None:
        if not self._dynamic:
            return
        if not finite:
            self.value, self._finite_steps = self.value / 2, 0
            return
        self._finite_steps += 1
        if self._finite_steps == _GROWTH_INTERVAL:
            self.value, self._finite_steps = self.value * 2, 0

    def state(self) -> tuple[float, int]:
        return self.value, self._finite_steps

    def load(self, state: tuple[float, int]) -> None:
        if self._dynamic:
            self.value, self._finite_steps = state
