"""A decoder model's parameters, from its config.json: what the engine gathers together, and how large it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from qlora_dist.config.sections import LoraConfig
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.plan.layer_spec import LayerSpec, LinearSpec, decoder_layer_specs, head_dim

FsdpUnitKind = Literal["embedding", "shared_embedding", "layer", "head", "root"]


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as the engine sees it."""

    shape: tuple[int, ...]
    trained: bool = False
    is_quantized: bool = False
    """A quantized weight's byte vector; every other one has a floating type."""
    always_row_sharded: bool = False
    """Trained, and cut along its first dimension whatever its shape: a module that is trained whole."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FsdpUnit:
    """Parameters that are gathered and freed together."""

    kind: FsdpUnitKind
    parameters: tuple[ParameterSpec, ...]
    layer: LayerSpec | None = None
    """What a decoder layer computes; None for other units."""


@dataclass(frozen=True)
class ModelSpec:
    """A model with its adapters."""

    units: tuple[FsdpUnit, ...]
    """In forward order."""
    hidden: int
    vocabulary: int
    tied: bool
    """Embedding and head are one matrix."""
    embeddings: Literal["16bit", "4bit"]
    block_size: int
    double_quant: bool
    r: int
    """Rank of the adapters."""
    has_logit_softcapping: bool
    """The logits are."""
    buffer_bytes: int
    """Of tensors that are on every rank whole: rotary frequencies, corrections of routers."""

    @cached_property
    def layers(self) -> list[FsdpUnit]:
        """The decoder layers."""
        return [unit for unit in self.units if unit.layer is not None]

    @cached_property
    def distinct_unit_counts(self) -> list[tuple[FsdpUnit, int]]:
        """Units that differ, and how many there are of each: layers are mostly alike."""
        return count_distinct_units(self.units)

    def layout(self, matrix: LinearSpec) -> NF4Layout:
        """Of one of a layer's quantized matrices."""
        return NF4Layout(
            shape=(matrix.rows, matrix.in_features),
            quant_type="nf4",
            block_size=self.block_size,
            double_quant=self.double_quant,
        )


def count_distinct_units(units: Iterable[FsdpUnit]) -> list[tuple[FsdpUnit, int]]:
    """Units that differ, and how many there are of each."""
    every = list(units)
    counts = Counter(map(id, every))
    return [(unit, counts[key]) for key, unit in {id(unit): unit for unit in every}.items()]


def make_model_spec(
    config: Mapping[str, Any],
    lora: LoraConfig,
    block_size: int = 64,
    double_quant: bool = True,
    embeddings: Literal["16bit", "4bit"] = "16bit",
) -> ModelSpec:
    """A model with its adapters.

    Args:
        config: config.json.
        lora: the section `lora`.
        block_size: of the quantized base.
        double_quant: of the quantized base.
        embeddings: of the input embedding and the output head.

    Raises:
        UserError: an architecture whose shapes are not known here.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    tied = bool(config.get("tie_word_embeddings", config["model_type"] in _TIED_BY_DEFAULT))
    layers = decoder_layer_specs(config, lora)
    units = {
        layer: FsdpUnit("layer", tuple(_parameters(layer, lora, block_size, double_quant)), layer) for layer in layers
    }

    def matrix(name: str) -> ParameterSpec:
        if name in lora.modules_to_save or (tied and {"embed_tokens", "lm_head"} & {*lora.modules_to_save}):
            return ParameterSpec((vocabulary, hidden), trained=True, always_row_sharded=True)
        if embeddings == "4bit":
            layout = NF4Layout(shape=(vocabulary, hidden), block_size=block_size, double_quant=double_quant)
            return ParameterSpec((layout.total_bytes,), is_quantized=True)
        return ParameterSpec((vocabulary, hidden))

    return ModelSpec(
        (
            FsdpUnit("shared_embedding" if tied else "embedding", (matrix("embed_tokens"),)),
            *(units[layer] for layer in layers),
            *([] if tied else [FsdpUnit("head", (matrix("lm_head"),))]),
            FsdpUnit("root", (ParameterSpec((hidden,)),)),
        ),
        hidden,
        vocabulary,
        tied,
        embeddings,
        block_size,
        double_quant,
        lora.r,
        bool(config.get("final_logit_softcapping")),
        sum(layer.buffer_bytes for layer in layers) + _rotary_bytes(config),
    )


_TIED_BY_DEFAULT = ("gemma2",)  # of the classes here, whose config.json may leave `tie_word_embeddings` out


def _parameters(layer: LayerSpec, lora: LoraConfig, block_size: int, double_quant: bool) -> list[ParameterSpec]:
    parameters = [ParameterSpec(shape) for shape in layer.plain]
    for matrix in layer.matrices:
        layout = NF4Layout(shape=(matrix.rows, matrix.in_features), block_size=block_size, double_quant=double_quant)
        count = matrix.experts * matrix.parts if matrix.experts else 1
        parameters.append(ParameterSpec((count * layout.total_bytes,), is_quantized=True))
        if matrix.has_bias:
            parameters.append(ParameterSpec((matrix.rows,)))
        if matrix.has_lora:
            pairs, rows = matrix.experts or 1, matrix.rows * matrix.parts
            parameters += [
                ParameterSpec((pairs * lora.r, matrix.in_features), trained=True),
                ParameterSpec((rows, lora.r * pairs), trained=True),
            ]
            if lora.dora:
                parameters.append(ParameterSpec((rows,), trained=True))
    return parameters


def _rotary_bytes(config: Mapping[str, Any]) -> int:
    """The frequencies, fp32, of which transformers keeps a copy, and with Gemma the embedding's scale."""
    rotated = config.get("qk_rope_head_dim") or head_dim(config)
    return 2 * 4 * -(-rotated // 2) + (2 if config["model_type"] == "gemma2" else 0)
