"""Configuration of a run as one strict tree.

Each section is validated once and passed on as a whole (`config.optim`). A field's docstring is its documentation. This
package does not import torch, so that `--help` and configuration errors appear at once.
"""

from __future__ import annotations

from pydantic import model_validator

from qlora_dist.config.config_rules import find_contradictions
from qlora_dist.config.sections import (
    ConfigSection,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PagingConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)


class ContradictionError(ValueError):
    """Error of values that are valid alone and exclude one another. Each has a message that begins with the key."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("; ".join(messages))
        self.messages = messages


class Config(ConfigSection):
    """Configuration of a run. Only `parallel` differs between one device and a cluster."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    paging: PagingConfig = PagingConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if contradictions := list(find_contradictions(self)):
            raise ContradictionError(contradictions)
        return self
