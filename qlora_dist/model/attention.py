"""Causal attention within each sequence of packed rows, without dense masks.

transformers builds a dense mask for a row of several sequences. `scaled_dot_product_attention` then computes all pairs
of positions, nearly all of which are masked. Here the attention function receives the sequences' starts instead.

transformers calls `packed_attention_forward`, registered as `PACKED_ATTENTION`. The starts travel as `attention_mask`,
which transformers passes through unchanged when it has four dimensions. A call without starts (plain logits, a cache, a
user's padding mask) runs transformers' own SDPA with its own masks.

`packed_flex_attention_forward`, registered as `PACKED_FLEX_ATTENTION`, uses torch's flex_attention instead. One kernel
computes all sequences of a row, with their windows, soft caps and sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Conv1d
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_dist.compat.transformers import attention_name, looks_attention_up
from qlora_dist.errors import UserError
from qlora_dist.model.block_mask import create_packed_block_mask, create_packed_mask
from qlora_dist.model.language_model import find_decoder
from qlora_dist.sequence_starts import sequence_slices, sequence_starts

PACKED_ATTENTION = "qlora_packed"
PACKED_FLEX_ATTENTION = "qlora_flex"
PACKABLE_MODEL_TYPES = frozenset(
    """
    apertus arcee cohere cohere2 cohere2_moe cwm deepseek_v3 ernie4_5 ernie4_5_moe exaone4 gemma gemma2 gemma3_text
    glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe jais2 llama llama4_text minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron olmo
    olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm
    starcoder2 vaultgemma
    """.split()  # noqa: SIM905
)
"""Values of `model_type` for which transformers' masks follow position_ids. The masks of GPT-OSS, OPT, Falcon and AFMoE
(transformers 5.23) silently let a sequence see the previous ones in its row."""

_ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Options of an attention call besides its tensors and its mask."""

    scale: float
    """Factor of the scores."""
    dropout: float = 0.0
    window: int | None = None
    """Number of positions that a position sees, itself included; None: all before it."""
    softcap: float | None = None
    """Soft cap c of the scores, c * tanh(score / c) (Gemma 2)."""
    s_aux: torch.Tensor | None = None
    """Sinks of GPT-OSS, [heads]: the score of a place that each position sees and that has no value."""

    @property
    def needs_eager(self) -> bool:
        """Whether SDPA cannot compute it."""
        return self.softcap is not None or self.s_aux is not None


def set_packed_attention(model: PreTrainedModel, attention: str = "sdpa") -> None:
    """Replace transformers' attention in a model that follows the contract of its flash attention.

    "sdpa" selects `packed_attention_forward`, "flex" `packed_flex_attention_forward`. Under that contract attention is
    causal and looked up by name, and the function receives window, soft cap and sinks as arguments.

    Other models keep SDPA with masks. Falcon computes its own attention, Llama 4 cuts rows into chunks, and hybrids
    have layers without attention.

    Raises:
        UserError: "flex" was given for another model, or for one with dropout of attention probabilities.
    """
    config, decoder = model.config.get_text_config(), find_decoder(model)
    if not isinstance(decoder, PreTrainedModel):
        decoder = model
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    qualifies = (
        looks_attention_up(decoder)
        and getattr(config, "attention_chunk_size", None) is None
        and getattr(config, "is_causal", True)
        and kinds <= {"full_attention", "sliding_attention"}
    )
    if attention == "flex":
        if not qualifies:
            raise UserError(
                f"model.attention: flex does not support the attention of a model of type {config.model_type}; use sdpa"
            )
        if getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0):
            raise UserError(
                "model.attention: flex has no dropout of attention probabilities, and the model's config.json asks for "
                "it; use sdpa, or set attention_dropout (GPT-2: attn_pdrop) to 0 there"
            )
    if qualifies:
        decoder.set_attn_implementation(PACKED_FLEX_ATTENTION if attention == "flex" else PACKED_ATTENTION)


def takes_sequence_starts(model: PreTrainedModel) -> bool:
    """Return whether the model's attention takes the starts of packed sequences."""
    return attention_name(model) in (PACKED_ATTENTION, PACKED_FLEX_ATTENTION)


def check_packing_support(model: PreTrainedModel) -> None:
    """Raise a UserError unless the model is known to keep the sequences of packed rows apart."""
    kind = model.config.get_text_config().model_type
    if numbers_positions_itself(model):
        raise UserError(
            f"data.packing: a model of type {kind} numbers the positions of a row itself, so they would not begin anew "
            "at each sequence; set data.packing: none"
        )
    known = takes_sequence_starts(model) or kind in PACKABLE_MODEL_TYPES
    if not known or not _has_only_attention(model):
        raise UserError(
            f"data.packing: a model of type {kind} with {attention_name(model)} "
            "attention may let the sequences of a packed row see each other; set data.packing: none"
        )


def numbers_positions_itself(model: PreTrainedModel) -> bool:
    """Return whether the model counts a row's tokens, beginning after its padding token's number (RoBERTa, Kosmos-2.5).

    Its position_ids have that offset too.
    """
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())


def _has_only_attention(model: PreTrainedModel) -> bool:
    """Return whether positions meet in attention alone, and not in a convolution, a recurrence or linear attention.

    transformers' code for a CPU carries the states of such layers from one sequence of a row into the next one.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return kinds <= _ATTENTION_LAYER_TYPES and not any(isinstance(module, Conv1d) for module in model.modules())


def add_sequence_starts(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the decoder's keyword arguments, with the sequences' starts if its attention takes them."""
    positions = inputs.get("position_ids")
    if not takes_sequence_starts(model) or positions is None or inputs.get("attention_mask") is not None:
        return inputs
    return inputs | {"attention_mask": sequence_starts(positions)}


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with the signature that transformers calls.

    Args:
        module: the layer's attention.
        query: [batch, heads, length, d].
        key: [batch, heads / groups, length, d], never repeated: all paths take grouped heads as they are.
        value: [batch, heads / groups, length, d].
        attention_mask: result of `sequence_starts`, or transformers' mask, or None.
        dropout: dropout rate of the probabilities.
        scaling: factor of the scores; None: 1 / sqrt(d).
        sliding_window: number of positions that a position sees, itself included.
        softcap: soft cap of the scores.
        s_aux: sinks, [heads].
        kwargs: further arguments of a model; only `position_bias` would change the result.

    Returns:
        [batch, length, heads, d], and no probabilities.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scale=scale, dropout=dropout, window=sliding_window, softcap=softcap, s_aux=s_aux)
    if attention_mask is None or attention_mask.dtype != torch.int32:
        if options.needs_eager:
            mask = attention_mask if attention_mask is not None else _causal_mask(query, key.shape[2], None)
            return _eager_attention(query, key, value, mask, options).transpose(1, 2).contiguous(), None
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs
        )
        return output, None
    assert kwargs.get("position_bias") is None, "attention with a position bias needs model.attention=eager"
    if query.device.type == "cpu" and has_cpu_kernel(query, value, options):
        from qlora_dist.cpu.cpu_attention import packed_causal_attention_cpu

        return packed_causal_attention_cpu(query, key, value, attention_mask, scale), None
    return _uncompiled_sdpa(query, key, value, attention_mask, options), None


def has_cpu_kernel(query: torch.Tensor, value: torch.Tensor, options: AttentionOptions) -> bool:
    """Return whether `packed_causal_attention_cpu` can compute this attention on a CPU."""
    windowed = options.window is not None and options.window < query.shape[2]
    if windowed or options.dropout or options.softcap or options.s_aux is not None:
        return False
    return query.shape[-1] == value.shape[-1]


def packed_flex_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute `packed_attention_forward` by flex_attention if sequences have starts. There is no dropout."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return packed_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert not kwargs.pop("dropout", 0.0), "flex_attention has no dropout"
    return _uncompiled_flex(module, query, key, value, attention_mask, **kwargs), None


# torch has compiled flex_attention already, and the mask is built from Python numbers
@torch.compiler.disable
def _uncompiled_flex(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """Call the compiled flex_attention as transformers does. The branch with its kernels has not been run on a GPU.

    On a CPU torch 2.13 refuses the backward of flex_attention. The same mask is then made dense, which is as slow as
    `eager` and meant for tests and trials.
    """
    assert kwargs.get("position_bias") is None, "attention with a position bias needs model.attention=eager"
    length, scaling, window = query.shape[2], kwargs.get("scaling"), kwargs.get("sliding_window")
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window if window is not None and window < length else None,
        softcap=kwargs.get("softcap"),
        s_aux=kwargs.get("s_aux"),
    )
    if _has_flex_kernels(query.device):
        mask = create_packed_block_mask(starts, length, options.window, query.device)
        output: torch.Tensor
        output, _ = flex_attention_forward(
            module, query, key, value, mask, scaling=options.scale, softcap=options.softcap, s_aux=options.s_aux
        )
        return output
    output = _eager_attention(query, key, value, create_packed_mask(starts, length, options.window), options)
    return output.transpose(1, 2).contiguous()


def _has_flex_kernels(device: torch.device) -> bool:
    """Return whether flex_attention has a forward and a backward kernel for the device."""
    return device.type != "cpu"


@torch.compiler.disable
def _uncompiled_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    return sdpa_per_sequence(sequence_slices(starts, query.shape[2]), query, key, value, options)


def sdpa_per_sequence(
    slices: Sequence[tuple[slice, int, int]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Compute attention, [batch, length, heads, d], by one differentiable call per sequence.

    `slices` is the result of `sequence_slices`. The shapes are the same as in `packed_attention_forward`.
    """
    batch, window = query.shape[0], options.window
    lengths = [end - first for _, first, end in slices]
    if len(slices) > 1:  # rows are joined because one split then yields all sequences, and its gradient is one copy
        query, key, value = (t.transpose(0, 1).flatten(1, 2).unsqueeze(0) for t in (query, key, value))
    outputs = []
    for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True):
        windowed = window is not None and window < q.shape[2]
        if options.needs_eager:
            outputs.append(_eager_attention(q, k, v, _causal_mask(q, q.shape[2], window), options))
            continue
        mask = _causal_mask(q, q.shape[2], window) if windowed else None
        grouped = q.shape[1] != k.shape[1]
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, mask, options.dropout, is_causal=mask is None, scale=options.scale, enable_gqa=grouped
            )
        )
    output = torch.cat(outputs, dim=2).transpose(1, 2)
    return output.reshape(batch, -1, *output.shape[2:]).contiguous()  # some models call view on it


def _causal_mask(query: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """Return bool[queries, keys]; the last query has the position of the last key."""
    queries = query.shape[2]
    q = torch.arange(keys - queries, keys, device=query.device).unsqueeze(1)
    k = torch.arange(keys, device=query.device)
    seen = k <= q
    return seen if window is None else seen & (k > q - window)


def _eager_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """Return [batch, heads, length, d] from the whole matrix of scores in fp32, because SDPA lacks some options."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * options.scale
    if (cap := options.softcap) is not None:
        scores = cap * torch.tanh(scores / cap)
    # not -inf: padding before a prompt sees nothing, and its NaN would reach positions that give it zero weight
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if options.s_aux is not None:
        sinks = options.s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    probabilities = scores.softmax(dim=3)[..., : key.shape[2]]
    return drop(probabilities, options.dropout).to(value.dtype) @ value


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention_forward)
ALL_ATTENTION_FUNCTIONS.register(PACKED_FLEX_ATTENTION, packed_flex_attention_forward)
for _name in (PACKED_ATTENTION, PACKED_FLEX_ATTENTION):
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, sdpa_mask)
