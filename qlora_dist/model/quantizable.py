"""The weight matrices of a model that are quantized, and where in a folder each of them lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeGuard

from torch import nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from qlora_dist.compat.torch import module_parameters
from qlora_dist.errors import UserError
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.moe import is_moe_experts
from qlora_dist.model.weight_reads import find_weight_reads
from qlora_dist.model.weight_sources import WeightSource, expert_key, unsupported_conversion_error
from qlora_dist.nf4.nf4_layout import NF4Layout, QuantType
from qlora_dist.nf4.quantize import TORCH_DTYPES

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers calls the parameters that hold a projection of all experts, [experts, out, in] or
[experts, in, out] (`transformers.integrations.moe`)."""


@dataclass(frozen=True)
class QuantizableParameter:
    """A parameter of transformers' class that is to be in 4 bit."""

    name: str
    """The parameter's, in the model."""
    module: str
    """The module that stands for it once it is quantized: the linear layer, or the parameter's own name."""
    shape: tuple[int, ...]
    """[out_features, in_features], of each expert if there are several."""
    experts: int
    """0: a plain matrix."""
    transposed: bool
    """[in_features, out_features] in the model and in a 16 bit folder."""
    has_bias: bool = False
    role: Literal["layer", "embedding", "head"] = "layer"


@dataclass(frozen=True)
class SourceMatrix:
    """A matrix in a folder, a tensor of its own or one of those of a three-dimensional one."""

    key: str
    """The tensor."""
    name: str
    """What the matrix is called in a 4-bit folder."""
    index: int | None
    """Which of the tensor's matrices; None: all of it."""
    transposed: bool


def quantizable_parameters(model: PreTrainedModel, embeddings: bool = False) -> Iterator[QuantizableParameter]:
    """Every linear layer but the output head, as transformers' bitsandbytes has it, and the experts' projections.

    A layer whose weight the model's code limits in place stays as it is: the code could not reach codes.

    Args:
        model: transformers' own class.
        embeddings: the input embedding and the output head too; one target where they are one matrix.
    """
    head = model.get_output_embeddings()
    limited = {name for name, use in find_weight_reads(model).items() if use == "clamp"}
    for name, module in model.named_modules():
        if _is_plain_linear(module) and module is not head and name not in limited:
            transposed = isinstance(module, Conv1D)
            shape = tuple(module.weight.shape)
            has_bias = module.bias is not None
            yield QuantizableParameter(
                f"{name}.weight", name, shape[::-1] if transposed else shape, 0, transposed, has_bias
            )
        for weight in EXPERT_WEIGHTS:
            parameter = module_parameters(module).get(weight)
            if parameter is not None and parameter.dim() == 3 and is_moe_experts(module):
                experts, *matrix = parameter.shape
                transposed = getattr(module, "is_transposed", True)  # Llama-4's, which has no such attribute, is
                path = f"{name}.{weight}"
                yield QuantizableParameter(
                    path, path, tuple(matrix[::-1] if transposed else matrix), experts, transposed
                )
        if embeddings and module is model.get_input_embeddings():
            yield QuantizableParameter(f"{name}.weight", name, tuple(module.weight.shape), 0, False, role="embedding")
        if embeddings and module is head and not has_tied_embeddings(model):
            yield QuantizableParameter(f"{name}.weight", name, tuple(module.weight.shape), 0, False, role="head")


def has_tied_embeddings(model: PreTrainedModel) -> bool:
    """Whether the output head has the embedding's weight."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight is not None and weight is getattr(model.get_input_embeddings(), "weight", None)


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module is a linear layer and nothing else; Llama-4's router, for one, is also a choice of experts."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or isinstance(module, FalconLinear)
    return isinstance(module, Conv1D)


def source_matrices(
    target: QuantizableParameter, origins: Mapping[str, WeightSource], folder: ModelFolder
) -> list[SourceMatrix]:
    """The matrices that a target is made of, expert by expert, an expert's own from top to bottom.

    Raises:
        UserError: the folder does not hold it.
    """
    if target.name not in origins:
        raise folder.missing(target.name)
    origin = origins[target.name]
    if len(origin.keys) > 1 and not origin.experts:
        raise unsupported_conversion_error(target.name, "Concatenate")
    if origin.experts or not target.experts:
        return [SourceMatrix(key, key, None, target.transposed) for key in origin.keys]
    (key,) = origin.keys
    return [SourceMatrix(key, expert_key(key, index), index, target.transposed) for index in range(target.experts)]


def common_layout(
    parts: list[SourceMatrix],
    target: QuantizableParameter,
    folder: ModelFolder,
    quant_type: QuantType,
    block_size: int,
    double_quant: bool,
) -> NF4Layout:
    """The layout that each of a target's matrices has in 4 bit: in the folder, or once it is quantized.

    Raises:
        UserError: they are not alike, not of the shape that config.json asks for, or of another type than 16 or 32
            bit floats.
    """
    unquantized = [matrix.name for matrix in parts if matrix.name not in folder.quantized]
    if 0 < len(unquantized) < len(parts):
        raise UserError(
            f"{folder.path}: {unquantized[0]} is not in 4 bit and others of its layer are; quantize the model anew"
        )
    layouts = {_layout(matrix, folder, quant_type, block_size, double_quant): matrix for matrix in parts}
    if len(layouts) > 1:
        one, other = list(layouts.values())[:2]
        raise UserError(f"{folder.path}: {one.name} and {other.name} differ in shape or type; quantize the model anew")
    ((layout, matrix),) = layouts.items()
    count = len(parts) // (target.experts or 1)
    rows, columns = layout.shape
    if (count * rows, columns) != target.shape or len(parts) != count * (target.experts or 1):
        raise UserError(
            f"{folder.path}: {matrix.name} has the shape {layout.shape}, config.json asks for "
            f"{target.shape if count == 1 else f'{count} that make {target.shape}'}; get the folder anew"
        )
    return layout


def _layout(
    matrix: SourceMatrix, folder: ModelFolder, quant_type: QuantType, block_size: int, double_quant: bool
) -> NF4Layout:
    if matrix.name in folder.quantized:
        return folder.quantized[matrix.name].layout
    entry = folder.entries[matrix.key]
    dtype = str(entry.dtype).removeprefix("torch.")
    if dtype not in TORCH_DTYPES:
        raise UserError(f"{folder.path}: {matrix.key} is {dtype}, not a 16 or 32 bit float; give the original model")
    shape = entry.shape if matrix.index is None else entry.shape[1:]
    if len(shape) != 2:
        raise UserError(f"{folder.path}: {matrix.key} has {len(entry.shape)} dimensions; get the folder anew")
    return NF4Layout(shape[::-1] if matrix.transposed else shape, quant_type, block_size, double_quant, dtype)
