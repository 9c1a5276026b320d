"""Other QLoRA trainers, as switches of the planner's formulas.

Each switch is a difference from this package, with its source. No number is fitted to a row. Two figures are not in
the trainers' code: the logits alive at once, and the layers' inputs that FSDP1 holds twice. They are inferred from
differences between published rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qlora_dist.config.sections import LoraConfig
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.plan.activations import ImplementationTraits, layer_activations
from qlora_dist.plan.hardware import Gpu, Link
from qlora_dist.plan.memory_estimate import CUDA_CONTEXT_BYTES, MemoryEstimate
from qlora_dist.plan.model_spec import FsdpUnit, make_model_spec
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_time import RankSpeeds, backward_work, data_sheet_speeds, forward_work, head_work
from qlora_dist.plan.step_traffic import ShardCounts

FP32 = 4
NAMES = {
    "k": "k_proj",
    "q": "q_proj",
    "v": "v_proj",
    "o": "o_proj",
    "up": "up_proj",
    "down": "down_proj",
    "gate": "gate_proj",
}


def bundled_model_name(model: str) -> str:
    """Return the bundled name of a model for its name on the hub, such as Meta-Llama-3-8B or Mistral-7B-v0.1."""
    return re.sub(r"^meta-|-hf$|-v0\.\d|-instruct|-base$", "", model.lower())


@dataclass(frozen=True, kw_only=True)
class TrainerSystem:
    """A trainer's differences from this package."""

    gathers: bool
    """True if layers are sharded and gathered; false if each rank holds all of them."""
    fsdp1: bool
    """True if embedding and head stay gathered in the root unit, and scales are on every rank."""
    moments_bytes: int
    """Bytes of AdamW's two moments per adapter element, in fp32 or in the adapter's type."""
    adapter_bytes: int
    """Bytes of an adapter element."""
    residual_bytes: int
    """Bytes of an element of the hidden states between layers, which checkpointing keeps.

    They are fp32 where `prepare_model_for_kbit_training` casts norms and embeddings, and FSDP1 does not cast them back.
    """
    logit_bytes: int
    """Bytes per logit at the loss.

    In transformers before 4.45 they are 2 + 4 + 4 + 4: logits in bf16 and fp32, a shifted copy, log-probabilities. That
    all exist at once is inferred from the growth of rows with tokens. Fused cross-entropy needs 4 + 4, because its
    gradient replaces the shifted copy. A chunked loss needs none.
    """
    code: ImplementationTraits
    offload: bool
    reserved_kind: str
    """Kind of the reported memory: `nvidia-smi` or `reserved`."""

    @property
    def description(self) -> str:
        """Switches of the system as text."""
        parts = [
            "FSDP1: replicated absmax, gathered root"
            if self.fsdp1
            else "all on each GPU"
            if not self.gathers
            else "sharded",
            f"{self.logit_bytes} B/logit",
            "fp32 residual" if self.residual_bytes == FP32 else "bf16 residual",
            "fused norms" if self.code.fused_norms else "eager norms",
        ]
        if self.offload:
            parts.append("CPU offload (low confidence)")
        return ", ".join(parts)


def trainer_system_of_row(row: dict[str, str]) -> TrainerSystem:
    """Return the switches of a published row."""
    gathers = row["engine"] not in ("none", "ddp")
    fused = row["fused_kernels"] in ("yes", "compile")
    is_fsdp_qlora = row["source"].startswith("fsdp_qlora")
    logit_bytes = 0 if row["chunked_loss"] == "yes" else 8 if fused else 14
    casts = row["fused_kernels"] == "no" and row["source"].startswith("fms") and not gathers
    return TrainerSystem(
        gathers=gathers,
        fsdp1=row["engine"] == "fsdp1",
        # fsdp_qlora trains bf16 adapters with bf16 moments
        moments_bytes=4 if is_fsdp_qlora else 8,
        adapter_bytes=2 if is_fsdp_qlora else FP32,
        residual_bytes=FP32 if casts else 2,
        logit_bytes=logit_bytes,
        code=ImplementationTraits(copies_attention=False, fused_norms=fused, keeps_output=True),
        offload=row["cpu_offload"] == "yes",
        reserved_kind="nvidia-smi" if row["source"].startswith("peft") else "reserved",
    )


def run_spec_of_row(row: dict[str, str], model_config: dict[str, Any]) -> RunSpec:
    """Return a row as a run of this package, before its switches."""
    targets = row["lora_targets"]
    lora = LoraConfig(
        r=int(row["lora_rank"]),
        dropout=0.0,
        targets="all-linear" if targets == "all-linear" else [NAMES[name.strip()] for name in targets.split(",")],
    )
    world = int(row["gpus"])
    shards = 1 if row["engine"] in ("none", "ddp") else world
    return RunSpec(
        model=make_model_spec(model_config, lora),
        shard_counts=ShardCounts(world, shards, shards),
        nodes=1,
        seq_len=int(row["seq_len"]),
        micro_batch=int(row["batch_per_gpu"]),
        accumulation=1,
        checkpointing=1,
        prefetch=1,
        compute_bytes=2,
        dropout=False,
        optimizer_bits=32,
        paged_moments=False,
        optimizer_resident_bytes=None,
        page_bytes=2**24,
        is_base_paged=False,
        base_resident_bytes=None,
        ahead=1,
        offload=row["cpu_offload"] == "yes",
        packed=False,
    )


def system_memory(run: RunSpec, system: TrainerSystem) -> MemoryEstimate:
    """Return the memory between steps, and at the two moments that need most."""
    model, shards, t = run.model, run.shard_counts.base_shards, run.tokens
    codes, scales = _base(run)
    vocabulary = 2 * model.vocabulary * model.hidden * (1 if model.tied else 2)
    norms = 2 * sum(p.numel for u in model.layers for p in u.parameters if not p.is_quantized and not p.trained)
    adapters = sum(p.numel for unit in model.units for p in unit.parameters if p.trained)
    on_device = 0 if system.offload else 1
    static = {
        "base": on_device * codes // shards,
        # bitsandbytes keeps its quantization state on the module: FSDP1 does not see it
        "replicated scales": scales if system.fsdp1 or not system.gathers else on_device * scales // shards,
        "embeddings and norms": on_device * (vocabulary + norms) // shards,
        "adapters": on_device * adapters * system.adapter_bytes // shards,
        "moments": on_device * adapters * system.moments_bytes // shards,
    }
    layer = model.layers[0]
    assert layer.layer is not None
    activations = layer_activations(run, layer.layer, system.code)
    gathered = _layer_bytes(layer) if system.gathers else 0
    root = vocabulary if system.fsdp1 else 0  # embedding and head are in the root, which stays gathered
    inputs = len(model.layers) * t * model.hidden * system.residual_bytes
    loss = {
        "checkpointed inputs": inputs,
        "gathered": root,
        "hidden states": 6 * t * model.hidden,
        "loss": system.logit_bytes * t * model.vocabulary,
    }
    backward = {
        # inferred: with FSDP1 every row needs the layers' inputs twice in backward, whatever the model
        "checkpointed inputs": inputs * (2 if system.fsdp1 else 1),
        "gathered": root + 2 * gathered,
        "recomputed layer": activations.saved_bytes,
        "dequantized weight": activations.backward_weight_bytes,
        "working memory": activations.backward_peak_bytes - activations.backward_weight_bytes,
    }
    return MemoryEstimate(static, {"head": loss, "layer_backward": backward})


def system_reserved_bytes(memory: MemoryEstimate, system: TrainerSystem) -> tuple[float, float]:
    """Return the planner's bounds of the bytes that the allocator reserves.

    Unchunked logits leave blocks that nothing else fits into, and backward allocates as many again. So the upper bound
    counts them twice.
    """
    low, high = memory.reserved_bytes
    context = CUDA_CONTEXT_BYTES if system.reserved_kind == "nvidia-smi" else 0
    return low + context, high + context + memory.phases["head"]["loss"]


def _base(run: RunSpec) -> tuple[int, int]:
    """Return the bytes of the codes, and of the scales with double quantization."""
    codes = scales = 0
    for unit in run.model.layers:
        assert unit.layer is not None
        for matrix in unit.layer.matrices:
            layout = NF4Layout(shape=(matrix.rows, matrix.in_features))
            count = matrix.parts * (matrix.experts or 1)
            codes += count * layout.codes.stop
            scales += count * (layout.total_bytes - layout.codes.stop)
    return codes, scales


def _layer_bytes(unit: FsdpUnit) -> int:
    return sum(p.numel * (1 if p.is_quantized else 2) for p in unit.parameters)


def tokens_per_s(run: RunSpec, system: TrainerSystem, gpu: Gpu, link: Link, efficiency: float | None = None) -> float:
    """Return the tokens per second of one GPU.

    Layers are prefetched. A base in host memory is copied for each gather.
    """
    if efficiency is not None:
        gpu = gpu.model_copy(update={"efficiency": efficiency})
    speed = data_sheet_speeds(run, gpu, link, link)
    return run.tokens / seconds(run, system, speed)


def seconds(run: RunSpec, system: TrainerSystem, speed: RankSpeeds) -> float:
    """Return the seconds of a step of one micro-batch."""
    head = sum(head_work(run).seconds(speed).values())
    total = head
    for unit in run.model.layers:
        assert unit.layer is not None
        moved = 0.0
        if system.gathers:
            shards = run.shard_counts.world_size
            moved = _layer_bytes(unit) * (shards - 1) / shards / speed.intra_node_bytes_per_s
            if system.offload:
                moved += _layer_bytes(unit) / shards / speed.host_bytes_per_s
        for work in (forward_work(run, unit.layer), backward_work(run, unit.layer, checkpointed=True)):
            kernels = work.seconds(speed)
            if system.code.fused_norms:
                kernels["element-wise operations"] /= 2
            total += max(sum(kernels.values()), moved)
    return total
