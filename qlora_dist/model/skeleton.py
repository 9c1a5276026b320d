"""The model without its weights: transformers' own class, on the meta device, with 4-bit layers and our head."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from qlora_dist.config import ModelConfig
from qlora_dist.errors import UserError
from qlora_dist.model.attention import choose_attention, with_boundaries
from qlora_dist.model.folder import ModelFolder
from qlora_dist.model.head import LossHead, SharedEmbedding, SharedHead
from qlora_dist.nf4.layout import NF4Layout, QuantType
from qlora_dist.nf4.linear import NF4Linear
from qlora_dist.nf4.quantize import TORCH_DTYPES

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""Values of config.json's `model_type` whose forward pass ours is known to equal. Others scale or cap their embeddings
or logits, or keep their experts in one three-dimensional parameter: trained all the same, they would learn from a
wrong loss without a message."""

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_skeleton(folder: ModelFolder, config: ModelConfig) -> transformers.PreTrainedModel:
    """A causal language model on meta whose quantizable layers are NF4Linear and whose forward gives the loss.

    Parameters that stay unquantized have the compute type. Nothing is trained yet.

    Raises:
        UserError: the folder holds no causal language model that this transformers knows, or weights are missing.
    """
    dtype = COMPUTE_DTYPES[config.compute_dtype]
    model = causal_lm_on_meta(folder, dtype, config.attention)
    if config.attention == "sdpa":
        choose_attention(model)
    for name in linear_names(model):
        linear = model.get_submodule(name)
        layout = _layout(folder, f"{name}.weight", tuple(linear.weight.shape), config)
        if layout is not None:
            model.set_submodule(name, NF4Linear(layout, linear.bias is not None, dtype, "meta"))
    _replace_head(model)
    model.requires_grad_(False)
    model.__class__ = type(f"Loss{type(model).__name__}", (_WithLoss, type(model)), {})
    _check_complete(model, folder)
    return model


def causal_lm_on_meta(folder: ModelFolder, dtype: torch.dtype, attention: str = "sdpa") -> transformers.PreTrainedModel:
    """Transformers' causal language model for the folder's config.json, without weights.

    Raises:
        UserError: the architecture is not supported, or transformers has no such class.
    """
    model_type = folder.config.get("model_type")
    if model_type not in SUPPORTED:
        known = ", ".join(SUPPORTED)
        raise UserError(f"{folder.path / 'config.json'}: model_type {model_type} is not supported; give one of {known}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it describes how transformers would load the folder; we load it
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{folder.path / 'config.json'}: transformers {transformers.__version__} makes no causal language model "
            f"of it ({reason}); give another model or upgrade transformers"
        ) from None


def linear_names(model: transformers.PreTrainedModel) -> list[str]:
    """Names of the layers to quantize: every linear layer but the output head, as transformers' bitsandbytes does."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def future_layout(
    folder: ModelFolder, name: str, quant_type: QuantType, block_size: int, double_quant: bool
) -> NF4Layout:
    """The layout of a weight that is to be quantized.

    Raises:
        UserError: the folder does not hold it, or not in 16 or 32 bit.
    """
    if name not in folder.entries:
        raise UserError(f"{folder.path}: the weight {name} is missing; get the folder anew")
    entry = folder.entries[name]
    dtype = str(entry.dtype).removeprefix("torch.")
    if dtype not in TORCH_DTYPES:
        raise UserError(f"{folder.path}: {name} is {dtype}, not a 16 or 32 bit float; give the original model")
    return NF4Layout(entry.shape, quant_type, block_size, double_quant, dtype)


def checkpoint_name(parameter_name: str) -> str:
    """The name, in a folder, of the tensor behind a model's parameter."""
    return parameter_name.replace(".base_layer.", ".").replace(".packed", ".weight")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks: the longest list of modules that all have one class."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return max(lists, key=len)


def _layout(folder: ModelFolder, name: str, shape: tuple[int, ...], config: ModelConfig) -> NF4Layout | None:
    if not folder.is_quantized:
        layout = future_layout(folder, name, config.quant_type, config.block_size, config.double_quant)
    elif name in folder.quantized:
        layout = folder.quantized[name].layout
    else:
        return None  # whoever quantized the folder left this layer as it was
    if layout.shape != shape:
        raise UserError(
            f"{folder.path}: {name} has the shape {layout.shape}, config.json asks for {shape}; get the folder anew"
        )
    return layout


def _replace_head(model: transformers.PreTrainedModel) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        embedding.__class__ = SharedEmbedding
        model.set_output_embeddings(SharedHead(embedding))
    else:
        head.__class__ = LossHead


def _check_complete(model: nn.Module, folder: ModelFolder) -> None:
    for name, parameter in model.named_parameters():
        key = checkpoint_name(name)
        if key in folder.quantized:
            if parameter.dtype != torch.uint8:
                raise UserError(
                    f"{folder.path}: {key} is in 4 bit, which only linear layers other than the output head can be; "
                    "quantize the original model"
                )
            continue
        if key not in folder.entries:
            raise UserError(f"{folder.path}: the weight {key} is missing; get the folder anew")
        shape = folder.entries[key].shape
        if parameter.dtype != torch.uint8 and shape != tuple(parameter.shape):
            raise UserError(
                f"{folder.path}: {key} has the shape {shape} and config.json asks for {tuple(parameter.shape)}; "
                "get the folder anew"
            )


class _WithLoss:
    """Mixed into transformers' class: with labels, forward gives the summed loss straight from the head."""

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """labels: int64[batch, sequence], each the target of its own position, IGNORE where not trained."""
        if labels is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        decoder: nn.Module = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        hidden = decoder(*args, **with_boundaries(self, kwargs), use_cache=False).last_hidden_state  # type: ignore[arg-type]
        return self.get_output_embeddings()(hidden, labels)  # type: ignore[attr-defined]
