"""A decoder model's parameters and their sizes, from its config.json, in the units that FSDP2 gathers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from qlora_dist.config.sections import LoraConfig
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.plan.kept_format import read_kept_format
from qlora_dist.plan.layer_spec import LayerSpec, LinearSpec, decoder_layer_specs, head_dim

FsdpUnitKind = Literal["embedding", "shared_embedding", "layer", "head", "root"]


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter in the form in which the engine holds it."""

    shape: tuple[int, ...]
    trained: bool = False
    is_quantized: bool = False
    """True for the byte vector of a quantized weight; other parameters have a floating type."""
    always_row_sharded: bool = False
    """True for a weight of `modules_to_save`, which is sharded along its rows whatever its shape."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class FsdpUnit:
    """Parameters that are gathered and freed together."""

    kind: FsdpUnitKind
    parameters: tuple[ParameterSpec, ...]
    layer: LayerSpec | None = None
    """Specification of a decoder layer; None for other units."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model with its adapters."""

    units: tuple[FsdpUnit, ...]
    """Units in forward order."""
    hidden: int
    vocabulary: int
    tied: bool
    """True if embedding and head are one matrix."""
    embeddings: Literal["16bit", "4bit"]
    block_size: int
    double_quant: bool
    keep_format: bool
    """True if linear layers are in the published format of the folder."""
    r: int
    """Rank of the adapters."""
    has_logit_softcapping: bool
    buffer_bytes: int
    """Bytes of buffers that every rank holds whole: rotary frequencies, score corrections of routers."""

    @cached_property
    def layers(self) -> list[FsdpUnit]:
        return [unit for unit in self.units if unit.layer is not None]

    @cached_property
    def distinct_unit_counts(self) -> list[tuple[FsdpUnit, int]]:
        """Distinct units with their counts, because most layers are equal."""
        return count_distinct_units(self.units)

    def layout(self, matrix: LinearSpec) -> NF4Layout:
        shape = matrix.rows, matrix.in_features
        return NF4Layout(shape=shape, block_size=self.block_size, double_quant=self.double_quant)


def count_distinct_units(units: Iterable[FsdpUnit]) -> list[tuple[FsdpUnit, int]]:
    """Return the distinct units with their counts."""
    all_units = list(units)
    counts = Counter(map(id, all_units))
    return [(unit, counts[key]) for key, unit in {id(unit): unit for unit in all_units}.items()]


def make_model_spec(
    config: Mapping[str, Any],
    lora: LoraConfig,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    embeddings: Literal["16bit", "4bit"] = "16bit",
    new_tokens: int = 0,
    keep_format: bool = False,
) -> ModelSpec:
    """Return the specification of a model with its adapters, from the content of config.json.

    Each of the `new_tokens` has a trained row of embedding and head, after the rows that config.json counts.
    With `keep_format`, linear layers are in the published format that config.json describes.

    Raises:
        UserError: the architecture is not supported.
    """
    hidden, base_rows = config["hidden_size"], config["vocab_size"]
    vocabulary = base_rows + new_tokens
    tied = bool(config.get("tie_word_embeddings", config["model_type"] in _TIED_BY_DEFAULT))
    layers = decoder_layer_specs(config, lora)

    def layout(rows: int, columns: int) -> NF4Layout:
        return NF4Layout(shape=(rows, columns), block_size=block_size, double_quant=double_quant)

    kept = read_kept_format(config) if keep_format else None

    def matrix_bytes(layer: LayerSpec, index: int, matrix: LinearSpec) -> int:
        if kept is None:
            return layout(matrix.rows, matrix.in_features).total_bytes
        covered = kept.covers(f"model.layers.{index}.{module_path(layer, matrix)}")
        return kept.vector_bytes(matrix.rows, matrix.in_features, covered=covered)

    units: dict[tuple[LayerSpec, tuple[int, ...]], FsdpUnit] = {}
    layer_units: list[FsdpUnit] = []
    for index, layer in enumerate(layers):
        sizes = tuple(matrix_bytes(layer, index, matrix) for matrix in layer.matrices)
        if (layer, sizes) not in units:
            units[layer, sizes] = FsdpUnit("layer", tuple(_parameters(layer, lora, sizes)), layer)
        layer_units.append(units[layer, sizes])

    def matrices(name: str) -> tuple[ParameterSpec, ...]:
        if name in lora.modules_to_save or (tied and {"embed_tokens", "lm_head"} & {*lora.modules_to_save}):
            return (ParameterSpec((vocabulary, hidden), trained=True, always_row_sharded=True),)
        base = ParameterSpec((base_rows, hidden))
        if embeddings == "4bit":
            base = ParameterSpec((layout(base_rows, hidden).total_bytes,), is_quantized=True)
        return (base, *([ParameterSpec((new_tokens, hidden), trained=True)] if new_tokens else []))

    return ModelSpec(
        units=(
            FsdpUnit("shared_embedding" if tied else "embedding", matrices("embed_tokens")),
            *layer_units,
            *([] if tied else [FsdpUnit("head", matrices("lm_head"))]),
            FsdpUnit("root", (ParameterSpec((hidden,)),)),
        ),
        hidden=hidden,
        vocabulary=vocabulary,
        tied=tied,
        embeddings=embeddings,
        block_size=block_size,
        double_quant=double_quant,
        keep_format=keep_format,
        r=lora.r,
        has_logit_softcapping=bool(config.get("final_logit_softcapping")),
        buffer_bytes=sum(layer.buffer_bytes for layer in layers) + _rotary_bytes(config),
    )


_TIED_BY_DEFAULT = ("gemma2",)  # model types whose config.json may omit `tie_word_embeddings: true`


def module_path(layer: LayerSpec, matrix: LinearSpec) -> str:
    """Return the path of a matrix's module within its layer, as checkpoints name it; for experts, of the first one."""
    if matrix.name.endswith(("gate_proj", "up_proj", "down_proj")):
        owner = "mlp.experts.0" if matrix.experts else "mlp.shared_experts" if layer.is_sparse else "mlp"
        return f"{owner}.{matrix.name.replace('gate_up_proj', 'gate_proj')}"
    return f"self_attn.{matrix.name}"


def _parameters(layer: LayerSpec, lora: LoraConfig, sizes: Sequence[int]) -> list[ParameterSpec]:
    """Return a layer's parameters. `sizes` are the bytes of each matrix, of one part of one expert."""
    parameters = [ParameterSpec(shape) for shape in layer.plain]
    for matrix, matrix_bytes in zip(layer.matrices, sizes, strict=True):
        count = matrix.experts * matrix.parts if matrix.experts else 1
        parameters.append(ParameterSpec((count * matrix_bytes,), is_quantized=True))
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
    """Return the bytes of the fp32 frequencies, of which transformers keeps a copy, and of Gemma's embedding scale."""
    rotated = config.get("qk_rope_head_dim") or head_dim(config)
    return 2 * 4 * -(-rotated // 2) + (2 if config["model_type"] == "gemma2" else 0)
