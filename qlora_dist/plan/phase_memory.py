"""Memory peaks of a training step on one rank: forward layer by layer, the head, backward, the update.

Each candidate is a moment at which something is allocated, and the peak of a phase is its largest candidate. The
candidates follow the order of gathering in `parallel/fsdp2.py`, `model/loss.py` and `train/train_step.py`.
docs/planning.md derives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from qlora_dist.plan.activations import FP32_BYTES, LayerActivations, layer_activations
from qlora_dist.plan.model_spec import FsdpUnit
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_traffic import is_column_sharded, shard_elements, trained_shard_elements
from qlora_dist.runtime.byte_sizes import LOSS_CHUNK_LOGITS

StepPhase = Literal["embedding", "layer_forward", "head", "layer_backward", "optimizer"]
MemoryTerms = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class UnitGatherMemory:
    """Bytes of a unit's parameters, unsharded and padded, as torch 2.13's `_fsdp_param_group.py` gathers them."""

    base_bytes: int
    adapter_bytes: int
    base_buffer_bytes: int
    """Bytes of the buffer that the base's all-gather fills; 0 where nothing is sharded."""
    adapter_buffer_bytes: int
    has_one_group: bool
    """True if base and adapters share one collective, or if the unit has only one of them."""
    column_sharded_bytes: int
    """Bytes of adapters that are sharded along columns, which are copied once more to be put together."""

    @property
    def unsharded_bytes(self) -> int:
        """Bytes of the parameters that the layer computes with."""
        return self.base_bytes + self.adapter_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a unit that has been prefetched."""
        return self.base_buffer_bytes + self.adapter_buffer_bytes

    @property
    def retained_buffer_bytes(self) -> int:
        """Bytes of the buffers that FSDP2 keeps in forward until the next unit is copied out, for overlap."""
        return self.buffer_bytes if self.has_one_group else self.adapter_buffer_bytes

    def peak_during_gather(self, previous_buffer_bytes: int) -> int:
        """Return the peak bytes while buffers are copied out in forward and the previous unit's buffers still exist."""
        last_group = self.buffer_bytes + self.unsharded_bytes + self.column_sharded_bytes
        if self.has_one_group:
            return previous_buffer_bytes + last_group
        return max(previous_buffer_bytes + self.buffer_bytes + self.base_bytes, last_group)


def unit_gather_memory(run: RunSpec, unit: FsdpUnit) -> UnitGatherMemory:
    sharding, base, adapters, column_sharded = run.shard_counts, 0, 0, 0
    for parameter in unit.parameters:
        shards = sharding.adapter_shards if parameter.trained else sharding.base_shards
        nbytes = shard_elements(parameter, shards) * shards * (1 if parameter.is_quantized else run.compute_bytes)
        if parameter.trained:
            adapters += nbytes
            column_sharded += nbytes if shards > 1 and is_column_sharded(parameter, shards) else 0
        else:
            base += nbytes
    one_mesh = sharding.base_shards == sharding.adapter_shards == sharding.world_size and not run.offload
    return UnitGatherMemory(
        base_bytes=base,
        adapter_bytes=adapters,
        base_buffer_bytes=base if sharding.base_shards > 1 else 0,
        adapter_buffer_bytes=adapters if sharding.adapter_shards > 1 else 0,
        has_one_group=one_mesh or not (base and adapters),
        column_sharded_bytes=column_sharded,
    )


def peak_terms_by_phase(run: RunSpec) -> dict[StepPhase, MemoryTerms]:
    """Return the bytes that each phase allocates at its peak, on top of the bytes held between steps."""
    step = _StepMemory(run)
    candidates: dict[StepPhase, Iterator[MemoryTerms]] = {
        "embedding": step.embedding(),
        "layer_forward": step.forward(),
        "head": step.head(),
        "layer_backward": step.backward(),
        "optimizer": iter([{"gradients": step.gradients(0)}]),
    }
    return {phase: max(moments, key=lambda terms: sum(terms.values())) for phase, moments in candidates.items()}


class _StepMemory:
    """Candidates of each phase, and the sums over layers that several phases need."""

    def __init__(self, run: RunSpec) -> None:
        self.run, self.layers = run, run.model.layers
        self.hidden_bytes = run.tokens * run.compute_bytes * run.model.hidden
        """Bytes of a layer's input, and of its output."""

    @cached_property
    def _layer_memory_by_unit(self) -> dict[int, tuple[UnitGatherMemory, LayerActivations]]:
        return {
            id(unit): (unit_gather_memory(self.run, unit), layer_activations(self.run, unit.layer))
            for unit, _ in self.run.model.distinct_unit_counts
            if unit.layer is not None
        }

    def embedding(self) -> Iterator[MemoryTerms]:
        unit = self.run.model.units[0]
        gather = unit_gather_memory(self.run, unit)
        yield self._always_allocated(-1) | {
            "gathered": gather.peak_during_gather(0),
            "hidden states": self.hidden_bytes,
        }

    @cached_property
    def _tied_embedding_bytes(self) -> int:
        """Bytes of a tied embedding, which stays gathered until the head has used it."""
        unit = self.run.model.units[0]
        return unit_gather_memory(self.run, unit).unsharded_bytes if unit.kind == "shared_embedding" else 0

    def forward(self) -> Iterator[MemoryTerms]:
        previous_buffer_bytes = unit_gather_memory(self.run, self.run.model.units[0]).retained_buffer_bytes
        for index, unit in enumerate(self.layers):
            gather, layer = self._layer_memory_by_unit[id(unit)]
            prefetched = min(self.run.prefetch, len(self.layers) - 1 - index)
            allocated = self._always_allocated(index)
            if not self._is_checkpointed(index):
                allocated |= {"hidden states": self.hidden_bytes}
            prefetched_before = max(0, min(self.run.prefetch - 1, len(self.layers) - 1 - index))
            yield allocated | {
                "gathered": self._tied_embedding_bytes
                + gather.peak_during_gather(previous_buffer_bytes)
                + prefetched_before * gather.buffer_bytes
            }
            gathered_now = (
                self._tied_embedding_bytes
                + gather.unsharded_bytes
                + gather.retained_buffer_bytes
                + prefetched * gather.buffer_bytes
            )
            terms = allocated | {"gathered": gathered_now}
            if self._is_checkpointed(index):
                terms |= {
                    "dequantized weight": layer.forward_weight_bytes,
                    "working memory": layer.forward_peak_bytes - layer.forward_weight_bytes,
                }
            else:
                terms["kept activations"] = terms.get("kept activations", 0) + self._saved_bytes(index)
                terms |= {"dequantized weight": layer.last_weight_bytes}
            yield terms
            previous_buffer_bytes = gather.retained_buffer_bytes

    def head(self) -> Iterator[MemoryTerms]:
        run, model, t = self.run, self.run.model, self.run.tokens
        units = [unit for unit in model.units if unit.kind in ("head", "shared_embedding")]
        gather, (last, _) = unit_gather_memory(run, units[0]), self._layer_memory_by_unit[id(self.layers[-1])]
        allocated = self._always_allocated(len(self.layers))
        norm_bytes = 2 * self.hidden_bytes  # input and output of the last norm
        gather_peak, buffer = gather.peak_during_gather(last.retained_buffer_bytes), gather.retained_buffer_bytes
        if self._tied_embedding_bytes:
            gather_peak = gather.unsharded_bytes + last.retained_buffer_bytes
            buffer = last.retained_buffer_bytes
        yield allocated | {"gathered": gather_peak, "hidden states": norm_bytes}

        # a chunk of logits, its inputs, and the largest of: the chunk in fp32, its product with the weight, and the
        # weight's gradient
        rows = min(t, max(1, LOSS_CHUNK_LOGITS // model.vocabulary))
        fp32_bytes = FP32_BYTES * ((run.compute_bytes != FP32_BYTES) + model.has_logit_softcapping)
        trained = units[0].parameters[0].trained
        temporaries = [rows * model.vocabulary * fp32_bytes, rows * run.compute_bytes * model.hidden]
        if trained:
            temporaries.append(run.compute_bytes * model.vocabulary * model.hidden)
        chunk = rows * run.compute_bytes * (model.vocabulary + model.hidden)
        terms = allocated | {
            "gathered": gather.unsharded_bytes + buffer,
            "hidden states": norm_bytes,
            "loss": self.hidden_bytes + chunk + max(temporaries),
        }
        if model.embeddings == "4bit":
            terms["dequantized weight"] = run.compute_bytes * model.vocabulary * model.hidden
        if trained:
            terms["loss"] += FP32_BYTES * model.vocabulary * model.hidden
        yield terms

        # backward of the loss and of the last norm, while the last layer is gathered again
        working = max(2 * run.compute_bytes + 2 * FP32_BYTES, 4 * FP32_BYTES) * t * model.hidden
        yield allocated | {"gathered": last.buffer_bytes, "hidden states": self.hidden_bytes, "working memory": working}

    def backward(self) -> Iterator[MemoryTerms]:
        for index in reversed(range(len(self.layers))):
            gather, layer = self._layer_memory_by_unit[id(self.layers[index])]
            ahead = min(self.run.prefetch or 1, index)  # without prefetching, FSDP2 still gathers one ahead in backward
            allocated = self._always_allocated(index) | {"gradients": self.gradients(index + 1)}
            if index + 1 < len(self.layers):
                allocated["gradients"] += self._reduced_bytes(self.layers[index + 1])
            if not self._is_checkpointed(index):
                allocated["kept activations"] = allocated.get("kept activations", 0) + self._saved_bytes(index)
            else:  # the checkpoint is the input of the layer's first norm
                allocated["recomputed layer"] = layer.saved_bytes - self.hidden_bytes
            yield allocated | {
                "gathered": gather.unsharded_bytes + ahead * gather.buffer_bytes,
                "dequantized weight": layer.backward_weight_bytes,
                "working memory": layer.backward_peak_bytes - layer.backward_weight_bytes,
            }

    def gradients(self, first: int) -> int:
        """Return the bytes of the fp32 gradient shards of the layers from `first` on; with 0, of all parameters."""
        sums = self._gradients_from_layer
        if first == 0:
            return sum(self._gradient_bytes(unit) for unit in self.run.model.units if unit.layer is None) + sums[0]
        return sums[first]

    @cached_property
    def _gradients_from_layer(self) -> list[int]:
        """Bytes of the gradient shards of each layer and of all later layers."""
        sums = [0]
        unit_bytes = {id(unit): self._gradient_bytes(unit) for unit, _ in self.run.model.distinct_unit_counts}
        for unit in reversed(self.layers):
            sums.append(sums[-1] + unit_bytes[id(unit)])
        return sums[::-1]

    def _gradient_bytes(self, unit: FsdpUnit) -> int:
        return FP32_BYTES * trained_shard_elements(unit, self.run.shard_counts.adapter_shards)

    def _always_allocated(self, index: int) -> MemoryTerms:
        """Return the bytes allocated while layer `index` runs: inputs, and tensors that earlier layers saved."""
        run = self.run
        inputs = len(range(0, min(index + 1, len(self.layers)), run.checkpointing)) if run.checkpointing else 0
        saved = self._saved_before_layer[max(0, index)]
        rotary = 2 * run.compute_bytes * run.tokens * self.layers[0].layer.rope_head_dim if self.layers[0].layer else 0
        terms = {
            "batch": 3 * 8 * run.tokens * run.accumulation + rotary,
            "checkpointed inputs": inputs * self.hidden_bytes,
        }
        if saved:
            terms["kept activations"] = saved
        if run.accumulation > 1:
            terms["accumulated gradients"] = self._unsharded_gradients
        return terms

    @cached_property
    def _saved_before_layer(self) -> list[int]:
        """Bytes that the layers before each layer save without checkpointing."""
        sums = [0]
        for index in range(len(self.layers)):
            sums.append(sums[-1] + (0 if self._is_checkpointed(index) else self._saved_bytes(index)))
        return sums

    @cached_property
    def _unsharded_gradients(self) -> int:
        """Bytes of all layers' unsharded fp32 gradients, which only the last micro-batch reduces."""
        return FP32_BYTES * sum(
            count * p.numel
            for unit, count in self.run.model.distinct_unit_counts
            for p in unit.parameters
            if p.trained and unit.layer is not None
        )

    def _saved_bytes(self, index: int) -> int:
        """Return the bytes that a layer saves if it is not checkpointed.

        The first layer's input needs no gradient, so its norm saves nothing.
        """
        saved = self._layer_memory_by_unit[id(self.layers[index])][1].saved_bytes
        return saved - (self.hidden_bytes if index == 0 else 0)

    def _reduced_bytes(self, unit: FsdpUnit) -> int:
        """Return the input bytes of a unit's reduce-scatter, which stay until the next one begins."""
        return self.run.shard_counts.adapter_shards * self._gradient_bytes(unit)

    def _is_checkpointed(self, index: int) -> bool:
        return bool(self.run.checkpointing) and index % self.run.checkpointing == 0
