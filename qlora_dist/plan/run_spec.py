"""All that memory, traffic and time of a run depend on, from its configuration and the model's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.plan.model_spec import ModelSpec, make_model_spec
from qlora_dist.plan.step_traffic import ShardCounts

_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class RunSpec:
    """A configuration on so many ranks."""

    model: ModelSpec
    shard_counts: ShardCounts
    nodes: int
    seq_len: int
    micro_batch: int
    accumulation: int
    """Micro-batches of a step, on each rank."""
    checkpointing: int
    """Every so-and-so-many-th layer, from the first on; 0: none."""
    prefetch: int
    compute_bytes: int
    """Of an element in the compute type."""
    dropout: bool
    """Of the adapters' inputs."""
    optimizer_bits: Literal[32, 8]
    paged_moments: bool
    """As many moments stay on the device as there is room for, or as `resident_moments` says."""
    optimizer_resident_bytes: int | None
    """Bytes of moments on the device; None: by the room there is, or all."""
    page_bytes: int
    """Of moments."""
    is_base_paged: bool
    base_resident_bytes: int | None
    """With `paged_base`, bytes of layers on the device; None: by the room there is."""
    ahead: int
    """Pages fetched ahead."""
    offload: bool
    """The frozen base lies in host memory."""
    packed: bool
    """A row holds several sequences."""
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def tokens(self) -> int:
        """Of a rank's micro-batch."""
        return self.seq_len * self.micro_batch

    @property
    def ranks_per_node(self) -> int:
        """Equal on all nodes."""
        return self.shard_counts.world_size // self.nodes

    @property
    def checkpointed(self) -> int:
        """Layers that keep their input only."""
        return -(-len(self.model.layers) // self.checkpointing) if self.checkpointing else 0


def _every_kth(checkpointing: Literal["none", "full"] | int) -> int:
    if checkpointing == "none":
        return 0
    return 1 if checkpointing == "full" else checkpointing


def make_run_spec(
    config: Config,
    model_config: Mapping[str, Any],
    world_size: int,
    nodes: int = 1,
    device: Literal["cuda", "cpu"] = "cuda",
    model_spec: ModelSpec | None = None,
) -> RunSpec:
    """The run of a configuration.

    Args:
        config: of the run.
        model_config: config.json.
        world_size: ranks of all nodes together.
        nodes: of equally many ranks.
        device: what the ranks compute on.
        model_spec: what `make_model_spec` says of the model, if that is known already.

    Raises:
        UserError: another engine than FSDP2, meshes that do not divide the world, a global batch that does not divide
            among the ranks, or an architecture that is not known.
    """
    model, parallel, optim, train = config.model, config.parallel, config.optim, config.train
    if parallel.engine != "fsdp2":
        raise UserError(
            f"parallel.engine: {parallel.engine}: there are formulas for fsdp2 only; plan that, and compare"
        )
    check_equal_nodes(world_size, nodes)
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
        checkpointing=_every_kth(train.checkpointing),
        prefetch=parallel.prefetch,
        compute_bytes=_ELEMENT_BYTES[model.compute_dtype],
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
    """See whether nodes can have equally many ranks.

    Raises:
        UserError: they can't.
    """
    if world_size % nodes:
        raise UserError(f"{world_size} ranks are not a multiple of {nodes} nodes; give equal nodes")


def _run_model_spec(config: Config, model_config: Mapping[str, Any]) -> ModelSpec:
    """The model; of a base that is in 4 bit already, its own config.json says whether scales are quantized too."""
    model, double_quant = config.model, config.model.double_quant
    quantization = model_config.get("quantization_config") or {}
    if quantization.get("quant_method") == "bitsandbytes":
        double_quant = bool(quantization.get("bnb_4bit_use_double_quant", False))
    return make_model_spec(model_config, config.lora, model.block_size, double_quant, model.embeddings)
