"""What becomes of each tensor of a folder when an adapter is merged into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from qlora_dist.adapters.lora_experts import peft_swaps_in_out
from qlora_dist.adapters.saved_adapter import LowRankUpdate, SavedAdapter, missing_module_error
from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.model.meta_model import COMPUTE_DTYPES, causal_lm_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantizable import (
    QuantizableParameter,
    SourceMatrix,
    common_layout,
    has_tied_embeddings,
    quantizable_parameters,
    source_matrices,
)
from qlora_dist.model.weight_sources import find_weight_sources, stacked_tensor_name
from qlora_dist.nf4.nf4_layout import NF4Layout, QuantType
from qlora_dist.nf4.quant_state import quant_state_specs

MergeFormat = Literal["dequantized", "original", "nf4"]


@dataclass(frozen=True)
class MergeOptions:
    """How to merge."""

    into: MergeFormat = "dequantized"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of what is not in 4 bit; auto: as it was before it was quantized."""
    quant_type: QuantType = "nf4"
    """With a base in 16 bit, how the run quantized it; as the others."""
    block_size: int = 64
    double_quant: bool = True
    error_feedback: bool = False
    """Into nf4: round each weight with what the ones before it in its row have lost of the update."""
    file_bytes: int = 5_000_000_000


@dataclass(frozen=True)
class MatrixMerge:
    """A matrix of the model."""

    matrix: SourceMatrix
    layout: NF4Layout
    """In 4 bit: as it lies in the folder, or as the run quantized it."""
    update: LowRankUpdate | None
    trained_in_4bit: bool
    """While the adapter was trained."""
    expert: int
    """Whose it is; 0 if there are none."""
    first_update_row: int
    """Of those that belong to the expert and are together one target of the update: the matrix's first."""


@dataclass(frozen=True)
class TensorMerge:
    """A tensor of the source, and what is written for it."""

    key: str
    source: Path
    """The file it is in, and where: for reading in order."""
    source_offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    copied_entry: TensorEntry | None = None
    """From the base, or from the adapter where it was trained whole."""
    parts: tuple[MatrixMerge, ...] = ()
    written_in_4bit: bool = False

    def specs(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of what is written."""
        if self.written_in_4bit:
            for part in self.parts:
                yield from quant_state_specs(part.matrix.name, part.layout)
        else:
            yield self.key, self.dtype, self.shape


@dataclass(frozen=True)
class MergePlan:
    """The tensors in the order of the source's files."""

    tensors: list[TensorMerge]
    untied: bool
    """The output head is a matrix of its own from now on."""
    vocabulary: int | None
    """Rows of the embedding, if it was trained whole."""


def make_merge_plan(folder: ModelFolder, adapter: SavedAdapter, options: MergeOptions) -> MergePlan:
    """Decide on every tensor.

    Raises:
        UserError: the adapter is of another model, or the folder is in other bits than `into` asks for.
    """
    if options.into == "nf4" and not folder.is_quantized:
        raise UserError(f"{folder.path}: is not in 4 bit; quantize it first, or merge --into dequantized")
    if options.into == "original" and folder.is_quantized:
        raise UserError(f"{folder.path}: is in 4 bit; give the 16-bit model with --base, or merge --into dequantized")
    if options.error_feedback and options.into != "nf4":
        raise UserError(f"--error-feedback: nothing is rounded to 4 bit by --into {options.into}; use --into nf4")
    model = causal_lm_on_meta(folder, torch.bfloat16)
    origins = find_weight_sources(model, [*folder.entries, *folder.quantized])
    updates, whole = dict(adapter.low_rank), dict(adapter.whole)
    work: dict[str, TensorMerge] = {}
    for target in quantizable_parameters(model, embeddings=True):
        parts = source_matrices(target, origins, folder)
        in_folder = parts[0].name in folder.quantized
        if not in_folder and (folder.is_quantized or target.role != "layer") and target.module not in updates:
            continue  # it stays as it is
        layout = common_layout(parts, target, folder, options.quant_type, options.block_size, options.double_quant)
        update = updates.pop(target.module, None)
        if (
            update is not None
            and target.experts
            and peft_swaps_in_out(model.get_submodule(target.module.rpartition(".")[0]))
        ):
            update = replace(update, swapped=True)
        _check_shape(update, target, adapter)
        was_4_bit = in_folder or (not folder.is_quantized and target.role == "layer")
        if options.into == "original" and update is None:
            continue
        for item in _plan_matrices(target, parts, layout, update, folder, options, was_4_bit):
            work[item.key] = item
    replaced, untied = _plan_replaced_tensors(
        whole, {name: origin.keys[0] for name, origin in origins.items()}, model, adapter
    )
    if updates:
        raise missing_module_error(adapter, next(iter(updates)), folder.path)
    for key, entry in folder.entries.items():
        if key not in work:
            replacement = replaced.pop(key, entry)
            work[key] = TensorMerge(
                key, entry.path, entry.start, replacement.shape, _dtype(entry.dtype, options), replacement
            )
    for key, entry in replaced.items():  # a head that was the embedding
        work[key] = TensorMerge(key, entry.path, entry.start, entry.shape, _dtype(torch.bfloat16, options), entry)
    embedding = adapter.whole.get(_embedding(model))
    vocabulary = embedding.shape[0] if embedding is not None else None
    return MergePlan(sorted(work.values(), key=lambda item: (str(item.source), item.source_offset)), untied, vocabulary)


def _plan_matrices(
    target: QuantizableParameter,
    parts: list[SourceMatrix],
    layout: NF4Layout,
    update: LowRankUpdate | None,
    folder: ModelFolder,
    options: MergeOptions,
    was_4_bit: bool,
) -> Iterator[TensorMerge]:
    """A work per tensor: that of a plain matrix, or of all experts if they were in one."""
    in_4_bit = options.into == "nf4" and was_4_bit
    by_key: dict[str, list[MatrixMerge]] = {}
    each = len(parts) // (target.experts or 1)
    for index, matrix in enumerate(parts):
        key = stacked_tensor_name(matrix.key, index) if target.experts and not in_4_bit else matrix.key
        part = MatrixMerge(matrix, layout, update, was_4_bit, index // each, index % each * layout.shape[0])
        by_key.setdefault(key, []).append(part)
    for key, tensor_matrices in by_key.items():
        first = tensor_matrices[0].matrix
        entry = folder.quantized[first.name].parts[0][1] if first.name in folder.quantized else folder.entries[key]
        shape = layout.shape[::-1] if first.transposed else layout.shape
        stacked = shape if key == first.key and first.index is None else (len(tensor_matrices), *shape)
        dtype = _dtype(getattr(torch, layout.dtype), options)
        yield TensorMerge(key, entry.path, entry.start, stacked, dtype, None, tuple(tensor_matrices), in_4_bit)


def _check_shape(update: LowRankUpdate | None, target: QuantizableParameter, adapter: SavedAdapter) -> None:
    if update is None:
        return
    rows, columns = update.b.shape[0], update.a.shape[1]
    update_shape, target_shape = (rows, columns, update.experts), (*target.shape, target.experts)
    if update.swapped:
        update_shape = (columns, rows, update.experts)
    if update_shape != target_shape:
        adapter_shape, base_shape = (shape if shape[-1] else shape[:-1] for shape in (update_shape, target_shape))
        raise UserError(
            f"{adapter.path}: {target.module} is {adapter_shape} there and {base_shape} in the base; give the model that it was "
            "trained on with --base"
        )


def _plan_replaced_tensors(
    whole: dict[str, TensorEntry], keys: dict[str, str], model: PreTrainedModel, adapter: SavedAdapter
) -> tuple[dict[str, TensorEntry], bool]:
    """What replaces tensors of the folder, by their names there; whether a tied head becomes a matrix of its own."""
    replaced, untied = {}, False
    tied = has_tied_embeddings(model)
    paths = {id(module): path for path, module in model.named_modules()}
    head = f"{paths[id(model.get_output_embeddings())]}.weight"
    embedding = _embedding(model)
    for name, entry in whole.items():
        if tied and name == head:
            untied = embedding not in whole or not _equal(entry, whole[embedding])
            if untied:
                replaced[head] = entry
        elif name not in keys:
            raise UserError(
                f"{adapter.path}: has {name}, which the base lacks; give the model that it was trained on with --base"
            )
        else:
            replaced[keys[name]] = entry
    return replaced, untied


def _embedding(model: PreTrainedModel) -> str:
    """Name of its parameter."""
    embedding = model.get_input_embeddings()
    return next(f"{path}.weight" for path, module in model.named_modules() if module is embedding)


def _equal(one: TensorEntry, other: TensorEntry) -> bool:
    with SafetensorsReader() as reader:
        return one.shape == other.shape and torch.equal(reader.read(one), reader.read(other))


def _dtype(before: torch.dtype, options: MergeOptions) -> torch.dtype:
    return before if options.dtype == "auto" or not before.is_floating_point else COMPUTE_DTYPES[options.dtype]
