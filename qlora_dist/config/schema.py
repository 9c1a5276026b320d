"""Configuration of a run as one strict tree, and the rules between its values.

Each section is validated once and passed on as a whole (`config.optim`). A field's docstring is its documentation. This
package does not import torch, so that `--help` and configuration errors appear at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import model_validator

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

_MIN_NVME_PAGE_BYTES = 2 * 2**20
"""Bytes of a page of two moments, each of 1 MiB."""


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
        if contradictions := list(_find_contradictions(self)):
            raise ContradictionError(contradictions)
        return self


def _find_contradictions(config: Config) -> Iterator[str]:
    """Yield a message for each pair of values that exclude one another. It begins with the key."""
    if config.lora.experts and (config.lora.dropout or config.lora.dora):
        yield "lora.experts: experts support neither dropout nor DoRA; set lora.dropout: 0 and lora.dora: false"
    for key, tokens in (
        ("model.add_tokens", config.model.add_tokens),
        ("lora.trainable_tokens", config.lora.trainable_tokens),
    ):
        if repeated := [token for token in tokens if tokens.count(token) > 1]:
            yield f"{key}: {repeated[0]} is named twice; leave one out"
    if config.parallel.base == "paged" and config.paging.to == "unified":
        yield (
            "paging.to: unified memory is for optimizer states only, and parallel.base: paged pages the base too; "
            "set paging.to to host or disk"
        )
    if config.parallel.base == "paged" and config.parallel.offload != "none":
        yield "parallel.offload: base and parallel.base: paged exclude each other; leave parallel.offload out"
    paged = config.optim.name.startswith("paged")
    least = 2 * config.paging.page_bytes
    if paged and config.optim.resident_bytes != "auto" and 0 < config.optim.resident_bytes < least:
        yield (
            f"optim.resident_bytes: {config.optim.resident_bytes} is less than two pages, {least}; raise it, set it "
            "to 0 for just two pages, or lower paging.page_bytes"
        )
    if config.data.group_by_length and config.data.packing != "none":
        yield "data.group_by_length: packed rows have one length; set data.packing: none, or leave the key out"
    if config.data.multi_turn == "per-answer" and config.data.mask == "all":
        yield (
            "data.multi_turn: per-answer trains answers only, and data.mask is all; set data.mask: assistant or "
            "last, or leave data.multi_turn out"
        )
    if config.train.steps is not None and config.train.epochs is not None:
        yield (
            f"train.epochs: {config.train.epochs:g} and train.steps: {config.train.steps} exclude each other; set one "
            "of them to null, or take it out"
        )
    if config.train.global_batch % config.train.micro_batch:
        yield (
            f"train.global_batch: {config.train.global_batch} is not a multiple of train.micro_batch: "
            f"{config.train.micro_batch}; change one of them"
        )
    yield from _find_engine_contradictions(config)


def _find_engine_contradictions(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.engine == "zero3" and parallel.base == "paged":
        yield (
            "parallel.base: paged: engine zero3 has no pages; set parallel.engine: fsdp2, or keep the base in host "
            "memory with parallel.base: node and parallel.offload: base"
        )
    if config.model.keep_format and config.train.compile:
        yield (
            "train.compile: layers in a published format cannot be compiled; leave train.compile out, or set "
            "model.keep_format: false"
        )
    if parallel.engine == "zero3" and config.train.compile:
        yield (
            "train.compile: layers with the hooks of engine zero3 cannot be compiled; leave train.compile out, or "
            "set parallel.engine: fsdp2"
        )
    if config.optim.name == "zero-adamw" and parallel.engine != "zero3":
        yield (
            f"optim.name: zero-adamw needs engine zero3, and parallel.engine is {parallel.engine}; set optim.name: "
            "paged-adamw-32bit, or parallel.engine: zero3"
        )
    if config.optim.offload != "none" and config.optim.name != "zero-adamw":
        yield (
            f"optim.offload: {config.optim.offload} needs optim.name: zero-adamw, because DeepSpeed corrupts moved "
            f"states of {config.optim.name}; leave it out, and set their storage with paging.to"
        )
    if config.optim.offload == "nvme" and config.paging.page_bytes < _MIN_NVME_PAGE_BYTES:
        yield (
            f"paging.page_bytes: {config.paging.page_bytes} is less than {_MIN_NVME_PAGE_BYTES}, and DeepSpeed keeps "
            "tensors below 1 MiB in memory; raise it, or leave out optim.offload: nvme"
        )
    if parallel.engine == "zero2" and (parallel.base not in ("replicate", 1) or parallel.offload != "none"):
        yield (
            "parallel.engine: zero2 keeps the whole base on each rank's device; set parallel.base: replicate and "
            "parallel.offload: none, or parallel.engine: zero3"
        )
