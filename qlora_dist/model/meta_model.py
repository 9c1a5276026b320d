"""A model without weights: transformers' own class on the meta device, with 4-bit layers and a head for the loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from qlora_dist.compat.torch import module_buffers, module_parameters
from qlora_dist.compat.transformers import keep_in_fp32_modules
from qlora_dist.config.sections import ModelConfig
from qlora_dist.errors import UserError
from qlora_dist.layers.dequantize import WeightLayout
from qlora_dist.layers.embedding import QuantizedVocabMixin, use_quantized_vocab
from qlora_dist.layers.experts import QuantizedExperts
from qlora_dist.layers.linear import QuantizedLinear
from qlora_dist.model.attention import add_sequence_starts, numbers_positions_itself, set_packed_attention
from qlora_dist.model.language_model import Towers, find_decoder
from qlora_dist.model.logit_scale import LogitScale, measure_logit_scale
from qlora_dist.model.loss import TiedHead, tie_head_to_embedding, use_loss_head
from qlora_dist.model.model_class import keep_language_model, whole_model_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.moe import replace_experts_forward
from qlora_dist.model.norm import fuse_rms_norms
from qlora_dist.model.quantizable import (
    QuantizableParameter,
    SourceMatrix,
    WeightFormat,
    common_layout,
    has_tied_embeddings,
    quantizable_parameters,
    source_matrices,
)
from qlora_dist.model.weight_reads import find_weight_reads
from qlora_dist.model.weight_sources import WeightSource, find_weight_sources
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quantize import TORCH_DTYPES

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_meta_model(folder: ModelFolder, config: ModelConfig, *, quantize: bool = True) -> LossModel:
    """Build a causal language model on meta with quantized layers, whose forward gives the loss.

    Parameters that stay unquantized have the compute type. All parameters are frozen. Without `quantize`, matrices stay
    in 16 bit or in a published format, as the folder has them.

    Raises:
        UserError: the folder holds no causal language model that this transformers supports, or weights are missing.
    """
    dtype = COMPUTE_DTYPES[config.compute_dtype]
    weight_format = WeightFormat(
        quant_type=config.quant_type,
        block_size=config.block_size,
        double_quant=config.double_quant,
        keep_format=config.keep_format or not quantize,
    )
    if config.keep_format and not folder.published:
        raise UserError(
            f"model.keep_format: {folder.path} is in {4 if folder.is_quantized else 16} bit, not in a published format "
            "such as FP8; set model.keep_format: false"
        )
    model = whole_model_on_meta(folder, dtype, config.attention)
    towers = keep_language_model(model, folder.path)
    if config.attention != "eager":
        set_packed_attention(model, config.attention)
    fuse_rms_norms(model)
    _keep_buffers_in_fp32(model)
    sources = find_weight_sources(model, folder.names)
    scale, tied = measure_logit_scale(model), has_tied_embeddings(model)
    in_4_bit: dict[str, Sequence[SourceMatrix]] = {}
    reads = find_weight_reads(model)
    for target in list(quantizable_parameters(model, embeddings=True)):
        parts = source_matrices(target, sources, folder)
        if config.keep_format and target.role == "layer" and not (target.experts or target.transposed):
            _pack_unquantized(parts, folder)
        if not _is_quantized_layer(target, parts, folder, config, weight_format):
            continue  # embeddings that stay in 16 bit, or layers that the folder's quantizer skipped
        layout = common_layout(parts, target, folder, weight_format)
        _replace_with_quantized(model, target, layout, len(parts), dtype)
        if isinstance(layer := model.get_submodule(target.module), QuantizedLinear):
            layer.is_weight_read = target.module in reads
        in_4_bit[target.name] = parts
    _replace_head(model, scale, tied=tied)
    model.requires_grad_(False)
    _check_weights_present(model, sources, folder)
    attributes = {
        "origins": sources,
        "matrices": in_4_bit,
        "towers": towers,
        "takes_position_ids": _takes_position_ids(model),
        "forward": _loss_forward_like(type(model).forward),
    }
    model.__class__ = type(f"Loss{type(model).__name__}", (LossModel, type(model)), attributes)
    assert isinstance(model, LossModel)
    return model


def _takes_position_ids(model: transformers.PreTrainedModel) -> bool:
    """Return whether the decoder takes position_ids that begin at 0."""
    if numbers_positions_itself(model):
        return False
    return "position_ids" in inspect.signature(find_decoder(model).forward).parameters


def _pack_unquantized(parts: Sequence[SourceMatrix], folder: ModelFolder) -> None:
    """Let layers in 16 bit beside others in a published format be byte vectors too, so that they get adapters."""
    for part in parts:
        if folder.packed(part.name) is None and folder.entries[part.key].dtype in TORCH_DTYPES.values():
            folder.pack_unquantized(part.key)


def _is_quantized_layer(
    target: QuantizableParameter,
    parts: Sequence[SourceMatrix],
    folder: ModelFolder,
    config: ModelConfig,
    weight_format: WeightFormat,
) -> bool:
    """Return whether a parameter becomes a byte vector."""
    if any(part.name in folder.quantized for part in parts):
        return True
    if target.role != "layer":
        return config.embeddings == "4bit" and (config.keep_format or not weight_format.keep_format)
    if weight_format.keep_format:
        return any(part.name in folder.published for part in parts)
    return not folder.is_quantized


def transformers_names(model: nn.Module) -> dict[str, str]:
    """Map the name of each parameter of a meta model to the name that transformers' own class has for it."""
    names: dict[str, str] = {}
    for path, module in model.named_modules():
        plain_path = path.replace(".base_layer", "")  # the name inside a LoRA layer
        for name in module_parameters(module):
            full = f"{plain_path}.{name}" if plain_path else name
            if isinstance(module, QuantizedLinear | QuantizedVocabMixin) and name == "packed":
                full = f"{plain_path}.weight"
            elif isinstance(module, QuantizedExperts):
                full = plain_path
            names[f"{path}.{name}" if path else name] = full
    return names


def get_decoder_layers(model: transformers.PreTrainedModel) -> nn.ModuleList:
    """Return the list of the model's layers. LongCat-Flash's layers hold lists too, of attention."""
    count = model.config.get_text_config().num_hidden_layers
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    blocks = [path for path in outermost if len(lists[path]) == count]
    return lists[min(blocks or outermost, key=lambda path: path.count("."))]


def _replace_with_quantized(
    model: transformers.PreTrainedModel,
    target: QuantizableParameter,
    layout: WeightLayout,
    parts: int,
    dtype: torch.dtype,
) -> None:
    if target.role != "layer":
        assert isinstance(layout, NF4Layout), "an embedding in a published format is dequantized on loading"
        use_quantized_vocab(model.get_submodule(target.module), layout, dtype)
        return
    if not target.experts:
        model.set_submodule(
            target.module, QuantizedLinear(layout, bias=target.has_bias, bias_dtype=dtype, device="meta")
        )
        return
    path, _, name = target.module.rpartition(".")
    experts = model.get_submodule(path)
    delattr(experts, name)
    setattr(experts, name, QuantizedExperts(layout, target.experts, parts // target.experts, "meta"))
    replace_experts_forward(experts)


def _replace_head(model: transformers.PreTrainedModel, scale: LogitScale, *, tied: bool) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if tied:
        tie_head_to_embedding(embedding, scale)
        model.set_output_embeddings(TiedHead(embedding))
    else:
        use_loss_head(head, scale)


def _check_weights_present(model: nn.Module, sources: Mapping[str, WeightSource], folder: ModelFolder) -> None:
    names = transformers_names(model)
    for name, parameter in model.named_parameters():
        source = sources.get(names[name])
        if source is None:
            raise folder.missing_weight_error(names[name])
        if parameter.dtype == torch.uint8:
            continue  # `common_layout` has checked it
        shapes = [folder.shape(key) for key in source.keys]
        shape, equal_shapes = shapes[0], len(set(shapes)) == 1
        if source.experts:
            shape = (source.experts, len(source.keys) // source.experts * shape[0], *shape[1:])
        elif len(shapes) > 1:  # one above the other
            equal_shapes = len({part[1:] for part in shapes}) == 1
            shape = (sum(rows for rows, *_ in shapes), *shape[1:])
        if source.may_be_transposed and shape != tuple(parameter.shape):
            raise UserError(
                f"{folder.path}: {source.keys[0]} is transposed on loading, which is only done while it is quantized; "
                "quantize the model"
            )
        if not equal_shapes or shape != tuple(parameter.shape):
            raise UserError(
                f"{folder.path}: {source.keys[0]} has the shape {shape} and config.json asks for "
                f"{tuple(parameter.shape)}; get the folder anew"
            )

    saved = model.state_dict()
    for name, _ in model.named_buffers():
        if name in saved and name not in sources:
            raise folder.missing_weight_error(name)


def _keep_buffers_in_fp32(model: transformers.PreTrainedModel) -> None:
    """Keep the buffers in fp32 that the class lists: DeepSeek's router chooses other experts if its bias is rounded.

    Listed parameters are not kept, because the engine gathers all parameters in the compute type.
    """
    kept = keep_in_fp32_modules(model)
    for path, module in model.named_modules():
        for name, buffer in module_buffers(module).items():
            if buffer is not None and buffer.is_floating_point() and kept.intersection([*path.split("."), name]):
                module_buffers(module)[name] = buffer.float()


def _loss_forward_like(transformers_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss model's forward with transformers' signature, in which `generate` looks for position_ids."""

    @functools.wraps(transformers_forward)
    def forward(self: LossModel, *args: Any, **kwargs: Any) -> Any:
        return LossModel.forward(self, *args, **kwargs)

    return forward


class LossModel(transformers.PreTrainedModel):
    """Mixin for transformers' class whose forward, given labels, returns the summed loss."""

    origins: Mapping[str, WeightSource]
    """The folder's tensors behind each tensor of transformers' own class, by that tensor's name."""
    matrices: Mapping[str, Sequence[SourceMatrix]]
    """The folder's matrices behind each tensor that is in 4 bit in this model, by the same name."""
    towers: Towers
    """Parts of transformers' class that this model lacks, because they are not its language model."""
    takes_position_ids: bool
    """Whether the decoder takes position_ids that begin at 0. BLOOM and Mamba take none."""

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Return the summed loss if labels are given, else transformers' output.

        Labels are int64[batch, sequence], the target of each position; IGNORE_INDEX if it is not trained.
        """
        if labels is None:
            return super().forward(*args, **kwargs)
        if not self.takes_position_ids:
            kwargs.pop("position_ids", None)  # such a model does not train on packed rows
        hidden = find_decoder(self)(*args, **add_sequence_starts(self, kwargs), use_cache=False).last_hidden_state
        return self.get_output_embeddings()(hidden, labels)
