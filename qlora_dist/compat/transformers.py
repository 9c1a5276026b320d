"""Private names of transformers 5.23.

The functions import the library, because the processes that tokenize import this file and need little of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from jinja2 import Template
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TRANSFORMERS_PRIVATE_NAMES = (
    "transformers.PreTrainedConfig._attn_implementation",
    "transformers.PreTrainedModel._init_weights",
    "transformers.PreTrainedModel._keep_in_fp32_modules",
    "transformers.PreTrainedModel._keep_in_fp32_modules_strict",
    "transformers.PreTrainedModel._supports_attention_backend",
    "transformers.PreTrainedModel._supports_flash_attn",
    "transformers.PreTrainedTokenizerFast._encode_plus",
    "transformers.initialization._is_hf_initialized",
    "transformers.integrations.moe._apply_gate",
    "transformers.utils.chat_template_utils._compile_jinja_template",
    "transformers.utils.chat_template_utils._render_with_assistant_indices",
)
OPTIONAL_PRIVATE_NAMES = ("transformers.utils.chat_template_utils._alias_reasoning_fields",)

_MODEL_TYPE_ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers does not know, although it has their class: Kimi-K2's is DeepseekV3ForCausalLM."""


def load_model_config(folder: Path) -> PreTrainedConfig:
    """Load the configuration of a folder. Code in the folder is never run.

    Raises:
        ValueError: transformers does not know the model type, or a value is not valid.
        OSError: config.json cannot be read.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    for alias, model_type in _MODEL_TYPE_ALIASES.items():
        if alias not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(alias, CONFIG_MAPPING[model_type])
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # transformers looks the conversion of a checkpoint's tensors up by this
    config.model_type = _MODEL_TYPE_ALIASES.get(config.model_type, config.model_type)
    return config


def attention_name(model: PreTrainedModel) -> str:
    """Return the name of the attention function that a model's language model calls."""
    name: str = model.config.get_text_config()._attn_implementation
    return name


def looks_attention_up(model: PreTrainedModel) -> bool:
    """Whether a model's class calls its attention by name and could run FlashAttention."""
    return bool(model._supports_attention_backend and model._supports_flash_attn)


def keep_in_fp32_modules(model: PreTrainedModel) -> set[str]:
    """Return names of modules and tensors that a model's class wants in fp32."""
    return {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}


def init_module(model: PreTrainedModel, module: nn.Module) -> None:
    """Give one module the first values that a model's class defines for it."""
    model._init_weights(module)


def mark_initialized(tensor: torch.Tensor) -> None:
    """Mark a tensor as initialized, because transformers would give it first values otherwise."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def has_expert_gate(module: nn.Module) -> bool:
    """Whether a module's class is decorated with `use_experts_implementation`."""
    return hasattr(module, "_apply_gate")


def apply_expert_gate(module: Any, gate_up_out: torch.Tensor) -> torch.Tensor:
    """Return act(gate) * up of the joint projection's result, as the experts' class computes it."""
    gated: torch.Tensor = module._apply_gate(gate_up_out)
    return gated


def compile_chat_template(template: str) -> Template:
    """Compile a chat template in the sandbox of transformers. An error is a `jinja2.TemplateSyntaxError`."""
    from transformers.utils import chat_template_utils

    compiled: Template = chat_template_utils._compile_jinja_template(template)
    return compiled


def assistant_span_renderer() -> Callable[..., tuple[str, list[tuple[int, int]]]]:
    """Return the function that renders a template and gives the spans of its `{% generation %}` blocks."""
    from transformers.utils import chat_template_utils

    renderer: Callable[..., tuple[str, list[tuple[int, int]]]] = chat_template_utils._render_with_assistant_indices
    return renderer


def reasoning_field_aliaser() -> Callable[[Any], Any]:
    """Return the function that adds the other names of `reasoning_content` to messages.

    Older releases of transformers 5 have no such names, and messages stay as they are.
    """
    from transformers.utils import chat_template_utils

    alias: Callable[[Any], Any] = getattr(chat_template_utils, "_alias_reasoning_fields", lambda messages: messages)
    return alias


def has_stock_encoding(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's class encodes texts as `PreTrainedTokenizerFast` does. Code Llama's differs."""
    from transformers import PreTrainedTokenizerFast

    stock: bool = type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
    return stock
