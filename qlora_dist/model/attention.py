"""Attention over packed rows without dense masks: each sequence of a row by itself, causally.

transformers builds a dense mask for a row of several sequences, and `scaled_dot_product_attention` then computes all
pairs of positions, nearly all of which are masked. Here the places where sequences begin reach the attention function
instead of a mask: `packed_attention_forward` is registered with transformers under `PACKED_ATTENTION`, and the boundaries travel as
`attention_mask`, which transformers hands through untouched when it has four dimensions. A call without boundaries
(plain logits, a cache, a user's padding mask) is transformers' own SDPA with its own masks.

`packed_flex_attention_forward`, registered under `PACKED_FLEX_ATTENTION`, is the same by torch's flex_attention: one kernel for all sequences of a
row, with their windows, soft caps and sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
from qlora_dist.sequence_starts import sequence_slices, sequence_starts

PACKED_ATTENTION = "qlora_packed"
PACKED_FLEX_ATTENTION = "qlora_flex"


def set_packed_attention(model: PreTrainedModel, attention: str = "sdpa") -> None:
    """Replace transformers' attention by `packed_attention_forward` ("sdpa") or `packed_flex_attention_forward` ("flex") in a model that keeps to the
    contract of its flash attention.

    That is: attention is looked up by name, it is causal, and window, soft cap and sinks are handed to the function, as
    no mask could carry them. Others (Falcon computes its own attention, Llama 4 cuts rows into chunks, hybrids have
    layers without attention) keep SDPA with masks.

    Raises:
        UserError: "flex" for such a model, or for one with dropout of attention probabilities.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    by_name = looks_attention_up(model)
    chunked = getattr(config, "attention_chunk_size", None) is not None
    qualifies = (
        by_name
        and not chunked
        and getattr(config, "is_causal", True)
        and kinds <= {"full_attention", "sliding_attention"}
    )
    if attention == "flex":
        if not qualifies:
            raise UserError(
                f"model.attention: flex: a model of type {config.model_type} does more in its attention than can be "
                "handed over; use sdpa"
            )
        if getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0):
            raise UserError(
                "model.attention: flex has no dropout of attention probabilities, and the model's config.json asks for "
                "it; use sdpa, or set attention_dropout (GPT-2: attn_pdrop) to 0 there"
            )
    if qualifies:
        model.set_attn_implementation(PACKED_FLEX_ATTENTION if attention == "flex" else PACKED_ATTENTION)


def takes_sequence_starts(model: PreTrainedModel) -> bool:
    """Whether attention takes the boundaries of packed sequences."""
    return attention_name(model) in (PACKED_ATTENTION, PACKED_FLEX_ATTENTION)


def add_sequence_starts(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The decoder's keyword arguments, with the sequences' boundaries where its attention takes them."""
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
    """Attention as transformers calls it.

    Args:
        module: the layer's attention.
        query: [batch, heads, length, d].
        key: [batch, heads / groups, length, d], never repeated: all paths take grouped heads as they are.
        value: as key.
        attention_mask: of `sequence_starts`, or transformers' mask, or None.
        dropout: of the probabilities.
        scaling: of the scores; None: 1 / sqrt(d).
        sliding_window: a position sees so many, itself included.
        softcap: c, for scores c * tanh(score / c) (Gemma 2).
        s_aux: [heads], the score of a place that each position sees and that has no value (the sinks of GPT-OSS).
        kwargs: what else a model hands over; of these only `position_bias` would change the result.

    Returns:
        [batch, length, heads, d], and no probabilities.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    needs_eager = softcap is not None or s_aux is not None
    if attention_mask is None or attention_mask.dtype != torch.int32:
        if needs_eager:
            mask = attention_mask if attention_mask is not None else _causal_mask(query, key.shape[2], None)
            output = _eager_attention(query, key, value, mask, dropout, scale, softcap, s_aux)
            return output.transpose(1, 2).contiguous(), None
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs
        )
        return output, None
    assert kwargs.get("position_bias") is None, "attention with a position bias needs model.attention=eager"
    if query.device.type == "cpu" and has_cpu_kernel(query, value, dropout, sliding_window, softcap, s_aux):
        from qlora_dist.cpu.cpu_attention import packed_causal_attention_cpu

        return packed_causal_attention_cpu(query, key, value, attention_mask, scale), None
    return _uncompiled_sdpa(query, key, value, attention_mask, dropout, scale, sliding_window, softcap, s_aux), None


def has_cpu_kernel(
    query: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> bool:
    """Whether `packed_causal_attention_cpu` does on a CPU what `packed_attention_forward` is to do."""
    windowed = window is not None and window < query.shape[2]
    return not (windowed or dropout or softcap or s_aux is not None) and query.shape[-1] == value.shape[-1]


def packed_flex_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`packed_attention_forward`, its arguments and its result, by flex_attention where sequences have boundaries. Without dropout."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return packed_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert not kwargs.pop("dropout", 0.0), "flex_attention has no dropout"
    return _flex_attention(module, query, key, value, attention_mask, **kwargs), None


@torch.compiler.disable  # flex_attention is compiled by itself, and the mask is made of numbers
def _flex_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """By transformers' call of the compiled flex_attention; that branch was not run on a GPU.

    On a CPU torch 2.13 refuses its backward, and the same mask becomes dense: as slow as `eager`, for tests and trials.
    """
    assert kwargs.get("position_bias") is None, "attention with a position bias needs model.attention=eager"
    length = query.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _has_flex_kernels(query.device):
        mask = create_packed_block_mask(starts, length, window, query.device)
        output: torch.Tensor
        output, _ = flex_attention_forward(module, query, key, value, mask, scaling=scale, softcap=softcap, s_aux=s_aux)
        return output
    output = _eager_attention(query, key, value, create_packed_mask(starts, length, window), 0.0, scale, softcap, s_aux)
    return output.transpose(1, 2).contiguous()


def _has_flex_kernels(device: torch.device) -> bool:
    """Whether flex_attention has a forward and a backward there."""
    return device.type != "cpu"


@torch.compiler.disable
def _uncompiled_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, *kernel_options: Any
) -> torch.Tensor:
    return sdpa_per_sequence(sequence_slices(starts, query.shape[2]), query, key, value, *kernel_options)


def sdpa_per_sequence(
    slices: Sequence[tuple[slice, int, int]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scale: float,
    window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """One call per sequence, by differentiable operations. Of `sequence_slices` the pieces; the rest as `packed_attention_forward` takes it."""
    batch = query.shape[0]
    ends = [end - first for _, first, end in slices]
    if len(slices) > 1:  # the rows one after another, so that one split, whose gradient is one copy, gives the pieces
        query, key, value = (t.transpose(0, 1).flatten(1, 2).unsqueeze(0) for t in (query, key, value))
    outputs = []
    for q, k, v in zip(*(t.split(ends, dim=2) for t in (query, key, value)), strict=True):
        windowed = window is not None and window < q.shape[2]
        if softcap is not None or s_aux is not None:
            seen = _causal_mask(q, q.shape[2], window)
            outputs.append(_eager_attention(q, k, v, seen, dropout, scale, softcap, s_aux))
            continue
        mask = _causal_mask(q, q.shape[2], window) if windowed else None
        grouped = q.shape[1] != k.shape[1]
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    output = torch.cat(outputs, dim=2).transpose(1, 2)
    return output.reshape(batch, -1, *output.shape[2:]).contiguous()  # some models take a view of it


def _causal_mask(query: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """bool[queries, keys], the last query being the last key's."""
    queries = query.shape[2]
    q = torch.arange(keys - queries, keys, device=query.device).unsqueeze(1)
    k = torch.arange(keys, device=query.device)
    seen = k <= q
    return seen if window is None else seen & (k > q - window)


def _eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scale: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """[batch, heads, length, d] from the whole matrix of scores in fp32, for what SDPA cannot do."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # not -inf: padding in front of a prompt sees nothing, and its NaN would reach those whose weight for it is zero
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    probabilities = scores.softmax(dim=3)[..., : key.shape[2]]
    return drop(probabilities, dropout).to(value.dtype) @ value


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention_forward)
ALL_ATTENTION_FUNCTIONS.register(PACKED_FLEX_ATTENTION, packed_flex_attention_forward)
for _name in (PACKED_ATTENTION, PACKED_FLEX_ATTENTION):
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, sdpa_mask)
