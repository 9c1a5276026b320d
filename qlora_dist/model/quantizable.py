"""Weight matrices of a model that are quantized, and the place of each of them in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

from torch import nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from qlora_dist.compat.torch import module_parameters
from qlora_dist.errors import UserError
from qlora_dist.layers.dequantize import WeightLayout
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.moe import is_moe_experts
from qlora_dist.model.weight_reads import find_weight_reads
from qlora_dist.model.weight_sources import WeightSource, unsupported_conversion_error
from qlora_dist.nf4.nf4_layout import NF4Layout, QuantType
from qlora_dist.nf4.quant_state import expert_key
from qlora_dist.nf4.quantize import TORCH_DTYPES

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of transformers' parameters that hold a projection of all experts, [experts, out, in] or [experts, in, out]
(`transformers.integrations.moe`)."""


@dataclass(frozen=True, kw_only=True)
class QuantizableParameter:
    """Parameter of transformers' class that can be in 4 bit."""

    name: str
    """Name in the model."""
    module: str
    """Path of the quantized module: the linear layer, or the parameter's own name for experts."""
    shape: tuple[int, ...]
    """[out_features, in_features], per expert."""
    experts: int = 0
    """Number of experts; 0: a plain matrix."""
    transposed: bool = False
    """Whether it is [in_features, out_features] in the model and in a 16-bit folder."""
    has_bias: bool = False
    role: Literal["layer", "embedding", "head"] = "layer"


@dataclass(frozen=True)
class SourceMatrix:
    """Matrix in a folder: a whole tensor, or one matrix of a three-dimensional tensor."""

    key: str
    """Name of the tensor."""
    name: str
    """Name of the matrix in a 4-bit folder."""
    index: int | None
    """Index of the matrix in its tensor; None: the whole tensor."""
    transposed: bool
    """Whether it is [in_features, out_features] in a 16-bit folder."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """Format in which the linear layers of a folder in 16 bit, or in a published format, are trained."""

    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = True
    keep_format: bool = False
    """Whether weights in a published format keep it, and others stay in 16 bit."""


def quantizable_parameters(model: PreTrainedModel, *, embeddings: bool = False) -> Iterator[QuantizableParameter]:
    """Yield every linear layer but the output head, as transformers' bitsandbytes does, and the experts' projections.

    A layer stays unquantized if the model's code clamps its weight in place, because 4-bit codes cannot be clamped.
    With `embeddings`, the input embedding and the output head are yielded too, once if they are tied.
    """
    head = model.get_output_embeddings()
    clamped = {name for name, use in find_weight_reads(model).items() if use == "clamp"}
    for name, module in model.named_modules():
        if _is_plain_linear(module) and module is not head and name not in clamped:
            transposed = isinstance(module, Conv1D)
            shape = tuple(module.weight.shape)
            yield QuantizableParameter(
                name=f"{name}.weight",
                module=name,
                shape=shape[::-1] if transposed else shape,
                transposed=transposed,
                has_bias=module.bias is not None,
            )
        for weight in EXPERT_WEIGHTS:
            parameter = module_parameters(module).get(weight)
            if parameter is not None and parameter.dim() == 3 and is_moe_experts(module):
                experts, *expert_shape = parameter.shape
                # Llama-4's class has no such attribute, and its parameters are transposed
                transposed = getattr(module, "is_transposed", True)
                path = f"{name}.{weight}"
                yield QuantizableParameter(
                    name=path,
                    module=path,
                    shape=tuple(expert_shape[::-1] if transposed else expert_shape),
                    experts=experts,
                    transposed=transposed,
                )
        if embeddings and module is model.get_input_embeddings():
            yield _vocab_parameter(name, module, "embedding")
        if embeddings and module is head and not has_tied_embeddings(model):
            yield _vocab_parameter(name, module, "head")


def _vocab_parameter(name: str, module: nn.Module, role: Literal["embedding", "head"]) -> QuantizableParameter:
    return QuantizableParameter(
        name=f"{name}.weight", module=name, shape=tuple(module.get_parameter("weight").shape), role=role
    )


def has_tied_embeddings(model: PreTrainedModel) -> bool:
    """Return whether the output head has the embedding's weight."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight is not None and weight is getattr(model.get_input_embeddings(), "weight", None)


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Return whether a module only multiplies, unlike Llama-4's router, which is a linear layer and chooses experts."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or isinstance(module, FalconLinear)
    return isinstance(module, Conv1D)


def source_matrices(
    target: QuantizableParameter, sources: Mapping[str, WeightSource], folder: ModelFolder
) -> list[SourceMatrix]:
    """Return a target's matrices in the folder, expert by expert, each expert's from top to bottom."""
    if target.name not in sources:
        raise folder.missing_weight_error(target.name)
    source = sources[target.name]
    if len(source.keys) > 1 and not source.experts:
        raise unsupported_conversion_error(target.name, "Concatenate")
    if source.experts or not target.experts:
        return [SourceMatrix(key, key, None, target.transposed) for key in source.keys]
    (key,) = source.keys
    transposed = target.transposed
    if source.may_be_transposed:
        shape = folder.entries[key].shape[1:]
        transposed ^= shape != (target.shape[::-1] if transposed else target.shape)
    return [SourceMatrix(key, expert_key(key, index), index, transposed) for index in range(target.experts)]


def common_layout(
    parts: list[SourceMatrix], target: QuantizableParameter, folder: ModelFolder, weight_format: WeightFormat
) -> WeightLayout:
    """Return the layout that all of a target's matrices have, in the folder or after quantization.

    Raises:
        UserError: their layouts or types differ, their shape is not config.json's, or they are no 16- or 32-bit floats.
    """
    if target.role != "layer":
        weight_format = replace(weight_format, keep_format=False)
    kept = folder.packed if weight_format.keep_format else folder.quantized.get
    unquantized = [matrix.name for matrix in parts if kept(matrix.name) is None]
    if 0 < len(unquantized) < len(parts):
        raise UserError(
            f"{folder.path}: {unquantized[0]} is not quantized and others of its layer are; quantize the model anew"
        )
    layouts = {_layout(matrix, folder, weight_format): matrix for matrix in parts}
    if len(layouts) > 1:
        one, other = list(layouts.values())[:2]
        raise UserError(f"{folder.path}: {one.name} and {other.name} differ in shape or type; quantize the model anew")
    ((layout, matrix),) = layouts.items()
    count = len(parts) // (target.experts or 1)
    if target.experts and len(parts) % target.experts:
        raise UserError(
            f"{folder.path}: {matrix.name} is one of {len(parts)} matrices, which {target.experts} experts in "
            "config.json cannot share; get the folder anew"
        )
    rows, columns = layout.shape
    if (count * rows, columns) != target.shape:
        raise UserError(
            f"{folder.path}: {matrix.name} has the shape {layout.shape}, config.json asks for "
            f"{target.shape if count == 1 else f'{count} matrices of {target.shape} together'}; get the folder anew"
        )
    return layout


def _layout(matrix: SourceMatrix, folder: ModelFolder, weight_format: WeightFormat) -> WeightLayout:
    packed = folder.packed(matrix.name)
    if packed is None:
        shape, dtype = _unquantized_shape_and_dtype(matrix, folder)
    elif matrix.name in folder.quantized or weight_format.keep_format:
        return packed.layout
    else:
        shape, dtype = packed.layout.shape, packed.layout.dtype
    return NF4Layout(
        shape=shape,
        quant_type=weight_format.quant_type,
        block_size=weight_format.block_size,
        double_quant=weight_format.double_quant,
        dtype=dtype,
    )


def _unquantized_shape_and_dtype(matrix: SourceMatrix, folder: ModelFolder) -> tuple[tuple[int, ...], str]:
    entry = folder.entries[matrix.key]
    dtype = str(entry.dtype).removeprefix("torch.")
    if dtype not in TORCH_DTYPES:
        raise UserError(
            f"{folder.path}: {matrix.key} is {dtype}, which quantization_config in config.json does not describe; get "
            "the config.json that was published with it, or a copy of the model in 16 bit"
        )
    shape = entry.shape if matrix.index is None else entry.shape[1:]
    if len(shape) != 2:
        raise UserError(f"{folder.path}: {matrix.key} has {len(entry.shape)} dimensions; get the folder anew")
    return shape[::-1] if matrix.transposed else shape, dtype
