"""Plan of the merge of an adapter into a folder, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from qlora_dist.adapters.lora_experts import peft_swaps_in_out
from qlora_dist.adapters.saved_adapter import LowRankUpdate, SavedAdapter, SavedTokenRows, missing_module_error
from qlora_dist.adapters.trainable_tokens import saved_vocabulary
from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import TensorEntry, tensors_equal
from qlora_dist.layers.embedding import vocab_weight_names
from qlora_dist.merge.published_config import find_exclusion_key
from qlora_dist.model.meta_model import COMPUTE_DTYPES
from qlora_dist.model.model_class import causal_lm_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantizable import (
    QuantizableParameter,
    SourceMatrix,
    WeightFormat,
    common_layout,
    has_tied_embeddings,
    quantizable_parameters,
    source_matrices,
)
from qlora_dist.model.weight_sources import find_weight_sources, stacked_tensor_name
from qlora_dist.nf4.nf4_layout import NF4Layout, QuantType
from qlora_dist.nf4.quant_state import quant_state_specs
from qlora_dist.nf4.quantize import TORCH_DTYPES

MergeFormat = Literal["dequantized", "original", "nf4"]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of `merge_folder`."""

    into: MergeFormat = "dequantized"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of tensors that are not in 4 bit; auto: their type before quantization."""
    quant_type: QuantType = "nf4"
    """Code table with which the run quantized a base in 16 bit. It used the next two options too."""
    block_size: int = 64
    double_quant: bool = True
    keep_format: bool = False
    """Whether the run trained on a base in a published format as it is (`model.keep_format`)."""
    error_feedback: bool = False
    """Whether rounding to nf4 compensates the error of earlier weights in a row."""
    file_bytes: int = 5_000_000_000
    """Largest size of a file; a larger tensor gets its own file."""


@dataclass(frozen=True, kw_only=True)
class MatrixMerge:
    """Matrix of the model, with its update."""

    matrix: SourceMatrix
    layout: NF4Layout
    """Layout in 4 bit, in the folder or as the run quantized it. Only its shape and type count for other matrices."""
    update: LowRankUpdate | None
    trained_in_4bit: bool
    """Whether the matrix was in 4 bit while the adapter was trained; else it was as it is in the folder."""
    expert: int
    """Index of the expert; 0 if there are no experts."""
    first_update_row: int
    """Row of the update at which the matrix begins, if an expert has several matrices."""


@dataclass(frozen=True, kw_only=True)
class TensorMerge:
    """Tensor of the source, and the tensors that are written for it."""

    key: str
    source_file: Path
    source_offset: int
    """Place in the source file, for reads in order."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    copied_entry: TensorEntry | None = None
    """Tensor to copy, from the base or, if it was fully trained, from the adapter."""
    matrices: tuple[MatrixMerge, ...] = ()
    written_in_4bit: bool = False
    token_rows: SavedTokenRows | None = None
    """Trained rows that replace rows of the source or follow its last row."""

    def specs(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Yield name, type and shape of the written tensors."""
        if self.written_in_4bit:
            for part in self.matrices:
                yield from quant_state_specs(part.matrix.name, part.layout)
        else:
            yield self.key, self.dtype, self.shape


@dataclass(frozen=True)
class MergePlan:
    """Tensors in the order of the source's files, and changes of config.json."""

    tensors: list[TensorMerge]
    is_untied: bool
    """Whether a tied output head becomes a separate matrix."""
    vocab_size: int | None
    """Rows of the embedding, if the adapter has rows of it."""
    unquantized_modules: tuple[str, ...] | None
    """Modules that are written in 16 bit beside others that keep their published format; None: there are no others."""


def make_merge_plan(folder: ModelFolder, adapter: SavedAdapter, options: MergeOptions) -> MergePlan:
    """Plan the merge of every tensor.

    Raises:
        UserError: the adapter belongs to another model, or `into` does not apply to the folder.
    """
    if options.keep_format and not folder.published:
        raise UserError(
            f"--keep-format: {folder.path} is not in a published format such as FP8; give the base that the run "
            "trained on, or --no-keep-format"
        )
    if options.into == "nf4" and not folder.is_quantized:
        raise UserError(f"{folder.path}: is not in 4 bit; quantize it first, or merge --into dequantized")
    if options.into == "original" and folder.is_quantized:
        raise UserError(f"{folder.path}: is in 4 bit; give the 16-bit model with --base, or merge --into dequantized")
    if options.error_feedback and options.into != "nf4":
        raise UserError(f"--error-feedback: nothing is rounded to 4 bit by --into {options.into}; use --into nf4")
    model = causal_lm_on_meta(folder, torch.bfloat16)
    sources = find_weight_sources(model, folder.names)
    weight_format = WeightFormat(
        quant_type=options.quant_type, block_size=options.block_size, double_quant=options.double_quant
    )
    updates = dict(adapter.low_rank)
    unquantized_modules: list[str] = []
    tensors: dict[str, TensorMerge] = {}
    for target in quantizable_parameters(model, embeddings=True):
        parts = source_matrices(target, sources, folder)
        in_folder = parts[0].name in folder.quantized
        if not in_folder and (folder.is_quantized or target.role != "layer") and target.module not in updates:
            continue  # it is copied below
        layout = common_layout(parts, target, folder, weight_format)
        assert isinstance(layout, NF4Layout), "the format is not kept"
        update = updates.pop(target.module, None)
        owner = model.get_submodule(target.module.rpartition(".")[0])
        if update is not None and target.experts and peft_swaps_in_out(owner):
            update = replace(update, swap_in_out=True)
        _check_shape(update, target, adapter)
        was_4_bit = in_folder or not (folder.is_quantized or options.keep_format or target.role != "layer")
        if options.into == "original" and update is None:
            continue
        unquantized_modules.append(target.module.rpartition(".")[0] if target.experts else target.module)
        matrices = _plan_matrices(target, parts, layout, update, trained_in_4bit=was_4_bit)
        for tensor in _plan_tensors(target, matrices, folder, options, in_4bit=options.into == "nf4" and was_4_bit):
            tensors[tensor.key] = tensor
    keys = {name: source.keys[0] for name, source in sources.items()}
    replaced, is_untied = _plan_replaced_tensors(keys, model, adapter)
    if updates:
        raise missing_module_error(adapter, next(iter(updates)), folder.path)
    tensors |= _plan_unused_matrices(tensors, folder, options)
    written = {part.matrix.name for tensor in tensors.values() for part in tensor.matrices}
    tensors |= _plan_published_tensors(folder, written, replaced, options)
    for key, entry in folder.entries.items():
        if key not in tensors:
            tensors[key] = _copied_tensor(key, entry, replaced.pop(key, entry), _dtype(entry.dtype, options))
    for key, entry in replaced.items():  # a head that was tied to the embedding
        tensors[key] = _copied_tensor(key, entry, entry, _dtype(torch.bfloat16, options))
    vocab_size = _plan_token_rows(tensors, keys, model, adapter, folder)
    in_order = sorted(tensors.values(), key=lambda tensor: (str(tensor.source_file), tensor.source_offset))
    keeps_codes = any(key in folder.published_tensors for key in tensors)
    return MergePlan(in_order, is_untied, vocab_size, tuple(unquantized_modules) if keeps_codes else None)


def _plan_published_tensors(
    folder: ModelFolder, written: Set[str], replaced: dict[str, TensorEntry], options: MergeOptions
) -> dict[str, TensorMerge]:
    """Return what is written for the weights in a published format that are not in `written`.

    `--into original` copies their codes and scales, if config.json can say which weights are in 16 bit. Otherwise their
    values are written. Weights that were fully trained are removed from `replaced`.
    """
    tensors: dict[str, TensorMerge] = {}
    keeps_codes = options.into == "original" and find_exclusion_key(folder.config) is not None
    for name, published in folder.published.items():
        dtype = _dtype(TORCH_DTYPES[published.layout.dtype], options)
        if name in replaced:
            tensors[name] = _copied_tensor(name, published.first_tensor, replaced.pop(name), dtype)
        elif name not in written and not keeps_codes:
            layout = NF4Layout(shape=published.layout.shape, dtype=published.layout.dtype)
            part = MatrixMerge(
                matrix=SourceMatrix(name, name, None, transposed=False),
                layout=layout,
                update=None,
                trained_in_4bit=False,
                expert=0,
                first_update_row=0,
            )
            path, start = folder.file_position(name)
            tensors[name] = TensorMerge(
                key=name, source_file=path, source_offset=start, shape=layout.shape, dtype=dtype, matrices=(part,)
            )
    if keeps_codes:
        changed = {*written, *tensors} & folder.published.keys()
        positions = {(part.path, part.start) for name in changed for part in folder.published[name].parts}
        stems = {name.rpartition(".")[0] for name in changed}
        for key, entry in folder.published_tensors.items():
            if (entry.path, entry.start) not in positions and key.rpartition(".")[0] not in stems:
                tensors[key] = _copied_tensor(key, entry, entry, entry.dtype)
    return tensors


def _plan_unused_matrices(
    planned: dict[str, TensorMerge], folder: ModelFolder, options: MergeOptions
) -> dict[str, TensorMerge]:
    """Plan the 4-bit matrices that are not the language model's, such as a tower's in the folder of another tool."""
    used = {part.matrix.name for tensor in planned.values() for part in tensor.matrices}
    tensors = {}
    for name in folder.quantized.keys() - used:
        layout = folder.quantized[name].layout
        target = QuantizableParameter(name=name, module=name, shape=layout.shape)
        parts = [SourceMatrix(name, name, None, transposed=False)]
        matrices = _plan_matrices(target, parts, layout, None, trained_in_4bit=True)
        for tensor in _plan_tensors(target, matrices, folder, options, in_4bit=options.into == "nf4"):
            tensors[tensor.key] = tensor
    return tensors


def _plan_token_rows(
    tensors: dict[str, TensorMerge],
    keys: dict[str, str],
    model: PreTrainedModel,
    adapter: SavedAdapter,
    folder: ModelFolder,
) -> int | None:
    """Add trained rows to the tensors of embedding and head, and return the embedding's rows if the adapter has any.

    `keys` has the key in the folder of each of the model's tensors.
    """
    embedding, head = vocab_weight_names(model)
    weights = [embedding] if has_tied_embeddings(model) else [embedding, head]
    rows = {name.removesuffix(".weight"): model.get_parameter(name).shape[0] for name in weights}
    vocabulary = saved_vocabulary(adapter, rows, folder.path)
    for path, saved in adapter.token_rows.items():
        stored_names = {f"{path}.weight", head} if has_tied_embeddings(model) else {f"{path}.weight"}
        for key in {keys[name] for name in stored_names if name in keys}:
            tensor = tensors.get(key)
            if tensor is None or tensor.written_in_4bit or (key in folder.published and not tensor.matrices):
                raise UserError(
                    f"{adapter.path}: trains rows of {path}, which is quantized, and single rows of it cannot change; "
                    "merge --into dequantized"
                )
            tensors[key] = replace(tensor, token_rows=saved, shape=(vocabulary, *tensor.shape[1:]))
    return vocabulary if adapter.token_rows or embedding in adapter.full_tensors else None


def _copied_tensor(key: str, source: TensorEntry, entry: TensorEntry, dtype: torch.dtype) -> TensorMerge:
    return TensorMerge(
        key=key, source_file=source.path, source_offset=source.start, shape=entry.shape, dtype=dtype, copied_entry=entry
    )


def _plan_matrices(
    target: QuantizableParameter,
    parts: list[SourceMatrix],
    layout: NF4Layout,
    update: LowRankUpdate | None,
    *,
    trained_in_4bit: bool,
) -> list[MatrixMerge]:
    per_expert = len(parts) // (target.experts or 1)
    return [
        MatrixMerge(
            matrix=matrix,
            layout=layout,
            update=update,
            trained_in_4bit=trained_in_4bit,
            expert=index // per_expert,
            first_update_row=index % per_expert * layout.shape[0],
        )
        for index, matrix in enumerate(parts)
    ]


def _plan_tensors(
    target: QuantizableParameter,
    matrices: list[MatrixMerge],
    folder: ModelFolder,
    options: MergeOptions,
    *,
    in_4bit: bool,
) -> Iterator[TensorMerge]:
    """Yield a target's tensors. Experts that were quantized from one tensor are one tensor again, unless in 4 bit."""
    by_key: dict[str, list[MatrixMerge]] = {}
    for index, part in enumerate(matrices):
        key = part.matrix.key
        by_key.setdefault(stacked_tensor_name(key, index) if target.experts and not in_4bit else key, []).append(part)
    for key, tensor_matrices in by_key.items():
        first, layout = tensor_matrices[0].matrix, tensor_matrices[0].layout
        packed = folder.packed(first.name)
        entry = packed.first_tensor if packed is not None else folder.entries[key]
        shape = layout.shape[::-1] if first.transposed else layout.shape
        stacked = shape if key == first.key and first.index is None else (len(tensor_matrices), *shape)
        yield TensorMerge(
            key=key,
            source_file=entry.path,
            source_offset=entry.start,
            shape=stacked,
            dtype=_dtype(getattr(torch, layout.dtype), options),
            matrices=tuple(tensor_matrices),
            written_in_4bit=in_4bit,
        )


def _check_shape(update: LowRankUpdate | None, target: QuantizableParameter, adapter: SavedAdapter) -> None:
    if update is None:
        return
    rows, columns = update.b.shape[0], update.a.shape[1]
    update_shape, target_shape = (rows, columns, update.experts), (*target.shape, target.experts)
    if update.swap_in_out:
        update_shape = (columns, rows, update.experts)
    if update_shape != target_shape:
        adapter_shape, base_shape = (shape if shape[-1] else shape[:-1] for shape in (update_shape, target_shape))
        raise UserError(
            f"{adapter.path}: {target.module} is {adapter_shape} there and {base_shape} in the base; give the model "
            "that it was trained on with --base"
        )


def _plan_replaced_tensors(
    keys: dict[str, str], model: PreTrainedModel, adapter: SavedAdapter
) -> tuple[dict[str, TensorEntry], bool]:
    """Return the fully trained tensors by their keys in the folder, and whether a tied head becomes untied.

    `keys` has the key in the folder of each of the model's tensors.
    """
    replaced, is_untied, trained = {}, False, adapter.full_tensors
    tied = has_tied_embeddings(model)
    embedding, head = vocab_weight_names(model)
    for name, entry in trained.items():
        if tied and name == head:
            is_untied = embedding not in trained or not tensors_equal(entry, trained[embedding])
            if is_untied or head in keys:  # the folder may store a tied head too
                replaced[keys.get(head, head)] = entry
        elif name not in keys:
            raise UserError(
                f"{adapter.path}: has {name}, which the base lacks; give the model that it was trained on with --base"
            )
        else:
            replaced[keys[name]] = entry
    return replaced, is_untied


def _dtype(before: torch.dtype, options: MergeOptions) -> torch.dtype:
    return before if options.dtype == "auto" or not before.is_floating_point else COMPUTE_DTYPES[options.dtype]
