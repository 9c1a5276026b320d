"""The whole YAML as one strict tree.

Each section is read once, validated once, and handed down whole (`config.optim`). A field's docstring is its
documentation. No torch in here: `--help` and every configuration error come without importing it.
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
    """Values that are valid alone and exclude one another; one sentence for each, the key first."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__("; ".join(sentences))
        self.sentences = sentences


class Config(ConfigSection):
    """One run. Only `parallel` differs between one device and a cluster."""

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
