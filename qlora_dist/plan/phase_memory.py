"""The peaks of a training step on one rank: forward layer by layer, the head, backward, the update.

Each candidate is a moment at which something is allocated; the peak of a phase is the largest of its candidates. They
follow `parallel/fsdp2.py` (what is gathered when), `model/loss.py` and `train/train_step.py`. docs/planning.md derives
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

from qlora_dist.plan.activations import LayerActivations, layer_activations
from qlora_dist.plan.gather_memory import UnitGatherMemory, unit_gather_memory
from qlora_dist.plan.model_spec import FsdpUnit
from qlora_dist.plan.run_spec import RunSpec
from qlora_dist.plan.step_traffic import trained_shard_elements

StepPhase = Literal["embedding", "layer_forward", "head", "layer_backward", "optimizer"]
MemoryTerms = dict[str, int]
_FP32 = 4
_CHUNK_LOGITS = 2**24  # of model/loss.py


def peak_terms_by_phase(run: RunSpec) -> dict[StepPhase, MemoryTerms]:
    """What each phase has at its peak, on top of what is there between steps."""
    step = _StepMemory(run)
    candidates: dict[StepPhase, Iterator[MemoryTerms]] = {
        "embedding": step.embedding(),
        "layer_forward": step.forward(),
        "head": step.head(),
        "layer_backward": step.backward(),
        "optimizer": iter([{"gradients": step.gradients(0)}]),
    }
    return {phase: max(found, key=lambda terms: sum(terms.values())) for phase, found in candidates.items()}


class _StepMemory:
    """Sums over layers that several phases need."""

    def __init__(self, run: RunSpec) -> None:
        self.run, self.layers = run, run.model.layers
        self.hidden_bytes = run.tokens * run.compute_bytes * run.model.hidden
        """Of what a layer is given, and returns."""

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
        """A tied embedding, which is not gathered twice."""
        unit = self.run.model.units[0]
        return unit_gather_memory(self.run, unit).whole if unit.kind == "shared_embedding" else 0

    def forward(self) -> Iterator[MemoryTerms]:
        previous_buffer_bytes = unit_gather_memory(self.run, self.run.model.units[0]).retained_buffer_bytes
        for index, unit in enumerate(self.layers):
            gather, layer = self._layer_memory_by_unit[id(unit)]
            prefetched = min(self.run.prefetch, len(self.layers) - 1 - index)
            kept = self._always_allocated(index)
            if not self._is_checkpointed(index):
                kept |= {"hidden states": self.hidden_bytes}
            prefetched_before = max(0, min(self.run.prefetch - 1, len(self.layers) - 1 - index))
            yield kept | {
                "gathered": self._tied_embedding_bytes
                + gather.peak_during_gather(previous_buffer_bytes)
                + prefetched_before * gather.buffer_bytes
            }
            gathered_now = (
                self._tied_embedding_bytes
                + gather.whole
                + gather.retained_buffer_bytes
                + prefetched * gather.buffer_bytes
            )
            terms = kept | {"gathered": gathered_now}
            if self._is_checkpointed(index):
                terms |= {
                    "dequantized weight": layer.forward_weight_bytes,
                    "working memory": layer.forward - layer.forward_weight_bytes,
                }
            else:
                terms["kept activations"] = terms.get("kept activations", 0) + self._kept(index)
                terms |= {"dequantized weight": layer.last_weight_bytes}
            yield terms
            previous_buffer_bytes = gather.retained_buffer_bytes

    def head(self) -> Iterator[MemoryTerms]:
        run, model, t = self.run, self.run.model, self.run.tokens
        units = [unit for unit in model.units if unit.kind in ("head", "shared_embedding")]
        gather, (last, _) = unit_gather_memory(run, units[0]), self._layer_memory_by_unit[id(self.layers[-1])]
        kept = self._always_allocated(len(self.layers))
        normed = 2 * self.hidden_bytes  # what the last norm is given, and what it returns
        coming, buffer = gather.peak_during_gather(last.retained_buffer_bytes), gather.retained_buffer_bytes
        if self._tied_embedding_bytes:
            coming, buffer = gather.whole + last.retained_buffer_bytes, last.retained_buffer_bytes
        yield kept | {"gathered": coming, "hidden states": normed}

        # a chunk, its inputs, and on top it in fp32, or the product with the weight, or the weight's gradient
        rows = min(t, max(1, _CHUNK_LOGITS // model.vocabulary))
        in_fp32 = _FP32 * ((run.compute_bytes != _FP32) + model.has_logit_softcapping)
        trained = units[0].parameters[0].trained
        on_top = [rows * model.vocabulary * in_fp32, rows * run.compute_bytes * model.hidden]
        if trained:
            on_top.append(run.compute_bytes * model.vocabulary * model.hidden)
        chunk = rows * run.compute_bytes * (model.vocabulary + model.hidden)
        terms = kept | {
            "gathered": gather.whole + buffer,
            "hidden states": normed,
            "loss": self.hidden_bytes + chunk + max(on_top),
        }
        if model.embeddings == "4bit":
            terms["dequantized weight"] = run.compute_bytes * model.vocabulary * model.hidden
        if trained:
            terms["loss"] += _FP32 * model.vocabulary * model.hidden
        yield terms

        # backward of the loss and of the last norm, while the last layer is gathered again
        working = max(2 * run.compute_bytes + 2 * _FP32, 4 * _FP32) * t * model.hidden
        yield kept | {"gathered": last.buffer_bytes, "hidden states": self.hidden_bytes, "working memory": working}

    def backward(self) -> Iterator[MemoryTerms]:
        for index in reversed(range(len(self.layers))):
            gather, layer = self._layer_memory_by_unit[id(self.layers[index])]
            ahead = min(self.run.prefetch or 1, index)  # asked for none, FSDP2 gathers one ahead in backward
            kept = self._always_allocated(index) | {"gradients": self.gradients(index + 1)}
            if index + 1 < len(self.layers):
                kept["gradients"] += self._reduced(self.layers[index + 1])
            if not self._is_checkpointed(index):
                kept["kept activations"] = kept.get("kept activations", 0) + self._kept(index)
            else:
                kept["recomputed layer"] = layer.kept - self.hidden_bytes  # its first norm's input is the checkpoint
            yield kept | {
                "gathered": gather.whole + ahead * gather.buffer_bytes,
                "dequantized weight": layer.backward_weight_bytes,
                "working memory": layer.backward - layer.backward_weight_bytes,
            }

    def gradients(self, first: int) -> int:
        """Of the shards of layers from `first` on, fp32; of all that is trained, with 0."""
        if first == 0:
            return sum(self._shards(unit) for unit in self.run.model.units if unit.layer is None) + self._behind[0]
        return self._behind[first]

    @cached_property
    def _behind(self) -> list[int]:
        """By layer, gradients' shards of it and of all behind it."""
        sums = [0]
        of_layers = {id(unit): self._shards(unit) for unit, _ in self.run.model.distinct_unit_counts}
        for unit in reversed(self.layers):
            sums.append(sums[-1] + of_layers[id(unit)])
        return sums[::-1]

    def _shards(self, unit: FsdpUnit) -> int:
        return _FP32 * trained_shard_elements(unit, self.run.shard_counts.adapter_shards)

    def _always_allocated(self, index: int) -> MemoryTerms:
        """What is there while layer `index` is at work: inputs, and what layers before it have left for backward."""
        run = self.run
        inputs = len(range(0, min(index + 1, len(self.layers)), run.checkpointing)) if run.checkpointing else 0
        kept = self._saved_before_layer[max(0, index)]
        rotary = 2 * run.compute_bytes * run.tokens * self.layers[0].layer.rope_head_dim if self.layers[0].layer else 0
        terms = {
            "batch": 3 * 8 * run.tokens * run.accumulation + rotary,
            "checkpointed inputs": inputs * self.hidden_bytes,  # each keeps its own
        }
        if kept:
            terms["kept activations"] = kept
        if run.accumulation > 1:
            terms["accumulated gradients"] = self._unsharded_gradients
        return terms

    @cached_property
    def _saved_before_layer(self) -> list[int]:
        """By layer, what those before it keep that are not checkpointed."""
        sums = [0]
        for index in range(len(self.layers)):
            sums.append(sums[-1] + (0 if self._is_checkpointed(index) else self._kept(index)))
        return sums

    @cached_property
    def _unsharded_gradients(self) -> int:
        """Of all layers, fp32: until the last micro-batch nothing is reduced."""
        return _FP32 * sum(
            count * p.numel
            for unit, count in self.run.model.distinct_unit_counts
            for p in unit.parameters
            if p.trained and unit.layer is not None
        )

    def _kept(self, index: int) -> int:
        """By a layer that is not checkpointed. The first one's input needs no gradient: its norm keeps nothing."""
        kept = self._layer_memory_by_unit[id(self.layers[index])][1].kept
        return kept - (self.hidden_bytes if index == 0 else 0)

    def _reduced(self, unit: FsdpUnit) -> int:
        """What a unit's reduce-scatter reads: kept until the next one begins."""
        return self.run.shard_counts.adapter_shards * self._shards(unit)

    def _is_checkpointed(self, index: int) -> bool:
        return bool(self.run.checkpointing) and index % self.run.checkpointing == 0
