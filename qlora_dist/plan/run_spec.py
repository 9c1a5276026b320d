"""The inputs of the planner's formulas, from a run's configuration and the model's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.plan.model_config import language_model_config
from qlora_dist.plan.model_spec import ModelSpec, make_model_spec
from qlora_dist.plan.step_traffic import ShardCounts
from qlora_dist.runtime.byte_sizes import COMPUTE_BYTES


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A configuration on a number of ranks."""

    model: ModelSpec
    shard_counts: ShardCounts
    nodes: int
    seq_len: int
    micro_batch: int
    accumulation: int
    """Micro-batches of a step on each rank."""
    checkpointing: int
    """k if every k-th layer is checkpointed, from the first on; 0 if none is."""
    prefetch: int
    """Number of layers that FSDP2 gathers ahead."""
    compute_bytes: int
    """Bytes of an element of the compute type."""
    dropout: bool
    """True if the adapters' inputs pass a dropout."""
    optimizer_bits: Literal[32, 8]
    paged_moments: bool
    """True if moments that do not fit the device, or `optimizer_resident_bytes`, are paged."""
    optimizer_resident_bytes: int | None
    """Bytes of moments that stay on the device; None means all that fit."""
    page_bytes: int
    """Bytes of a page of moments."""
    is_base_paged: bool
    base_resident_bytes: int | None
    """Bytes of a paged base's layers that stay on the device; None means all that fit."""
    ahead: int
    """Number of pages that are fetched ahead."""
    offload: bool
    """True if the frozen base is in host memory."""
    packed: bool
    """True if a row holds several sequences."""
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens of a rank's micro-batch."""
        return self.seq_len * self.micro_batch

    @property
    def ranks_per_node(self) -> int:
        return self.shard_counts.world_size // self.nodes

    @property
    def checkpointed(self) -> int:
        """Number of layers that save only their input."""
        return -(-len(self.model.layers) // self.checkpointing) if self.checkpointing else 0


def make_run_spec(
    config: Config,
    model_config: Mapping[str, Any],
    world_size: int,
    nodes: int = 1,
    device: Literal["cuda", "cpu"] = "cuda",
    model_spec: ModelSpec | None = None,
) -> RunSpec:
    """Return the inputs of the formulas for a configuration. Without `model_spec`, it is made from `model_config`.

    Raises:
        UserError: the engine is not FSDP2, a mesh does not divide the world, the nodes are unequal, or the architecture
            is not supported.
    """
    model, parallel, optim, train = config.model, config.parallel, config.optim, config.train
    if parallel.engine != "fsdp2":
        raise UserError(
            f"parallel.engine: {parallel.engine}: there are formulas for fsdp2 only; plan that, and compare"
        )
    check_equal_nodes(world_size, nodes)
    checkpointing = train.checkpointing if isinstance(train.checkpointing, int) else int(train.checkpointing == "full")
    per_node = world_size // nodes
    shards_by_name = {"replicate": 1, "node": per_node, "paged": per_node, "world": world_size}
    base = parallel.base if isinstance(parallel.base, int) else shards_by_name[parallel.base]
    if world_size % base:
        raise UserError(f"parallel.base: {base} does not divide the world of {world_size} ranks; use one that does")
    return RunSpec(
        model=model_spec or _run_model_spec(config, model_config),
        shard_counts=ShardCounts(world_size, base, shards_by_name[parallel.adapter]),
        nodes=nodes,
        seq_len=config.data.seq_len,
        micro_batch=train.micro_batch,
        accumulation=-(-train.global_batch // (world_size * train.micro_batch)),
        checkpointing=checkpointing,
        prefetch=parallel.prefetch,
        compute_bytes=COMPUTE_BYTES[model.compute_dtype],
        dropout=config.lora.dropout > 0,
        optimizer_bits=8 if optim.name.endswith("8bit") else 32,
        paged_moments=optim.name.startswith("paged"),
        optimizer_resident_bytes=None if optim.resident_bytes == "auto" else optim.resident_bytes,
        page_bytes=config.paging.page_bytes,
        is_base_paged=parallel.base == "paged",
        base_resident_bytes=None if parallel.resident_bytes == "auto" else parallel.resident_bytes,
        ahead=config.paging.ahead,
        offload=parallel.offload == "base",
        packed=config.data.packing != "none",
        device=device,
    )


def check_equal_nodes(world_size: int, nodes: int) -> None:
    if world_size % nodes:
        raise UserError(f"{world_size} ranks are not a multiple of {nodes} nodes; give equal nodes")


def _run_model_spec(config: Config, model_config: Mapping[str, Any]) -> ModelSpec:
    """Return the specification of a run's model.

    If the base is already in 4 bit, its config.json overrides the configuration's `double_quant`.
    """
    model, double_quant = config.model, config.model.double_quant
    quantization = model_config.get("quantization_config") or {}
    if quantization.get("quant_method") == "bitsandbytes":
        double_quant = bool(quantization.get("bnb_4bit_use_double_quant", False))
    return make_model_spec(
        language_model_config(model_config),
        config.lora,
        block_size=model.block_size,
        double_quant=double_quant,
        embeddings=model.embeddings,
        keep_format=model.keep_format,
        new_tokens=len({*model.add_tokens, *config.lora.trainable_tokens}),
    )
