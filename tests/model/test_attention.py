"""If this fails, a packed sequence sees its neighbour or only a part of itself, or has a wrong gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from qlora_dist.errors import UserError
from qlora_dist.model.attention import (
    PACKED_ATTENTION,
    PACKED_FLEX_ATTENTION,
    packed_attention_forward,
    packed_flex_attention_forward,
    set_packed_attention,
)
from qlora_dist.sequence_starts import sequence_slices, sequence_starts
from tests.helpers import tiny_models

ROWS = [[5, 20, 1, 14], [40]]
"""Lengths of the sequences in each row."""


def positions(rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def inputs(heads: int = 6, kv_heads: int = 2, dtype: torch.dtype = torch.float64, **shape: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    rows, size = shape.get("rows", ROWS), 8
    length = sum(rows[0])
    return [torch.randn(len(rows), n, length, size, dtype=dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: list[list[int]] = ROWS, **options: Any
) -> torch.Tensor:
    """Compute attention from the whole matrix of scores, by definition."""
    window, softcap, sinks = (options.get(name) for name in ("window", "softcap", "sinks"))
    scale = options.get("scale", 8**-0.5)
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    position = torch.arange(length)
    sequence = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    visible = (sequence[:, :, None] == sequence[:, None, :]) & (position[:, None] >= position)
    if window is not None:
        visible &= position[:, None] - position < window
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], -torch.inf).exp()
    total = scores.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return (scores / total @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def compare(tensors: list[torch.Tensor], rows: list[list[int]] = ROWS, tolerance: float = 1e-6, **kwargs: Any) -> None:
    starts = sequence_starts(positions(rows))
    names = {"window": "sliding_window", "softcap": "softcap", "sinks": "s_aux", "scale": "scaling"}
    given = {names[name]: value for name, value in kwargs.items()}
    reference = dense(*tensors, rows=rows, **kwargs)
    trained = [*tensors, *([kwargs["sinks"]] if "sinks" in kwargs else [])]
    grad = torch.randn_like(reference)
    expected_grads = torch.autograd.grad(reference, trained, grad)
    for attention, tolerated in (
        (packed_attention_forward, tolerance),
        (packed_flex_attention_forward, max(tolerance, 1e-5)),
    ):  # the latter in fp32
        actual, _ = attention(SimpleNamespace(), *tensors, starts, **given)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, reference, rtol=tolerated, atol=tolerated)
        for a, b in zip(torch.autograd.grad(actual, trained, grad), expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerated, atol=tolerated)


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("rows", [ROWS, [[40], [40]], [[1] * 40, [39, 1]]])
def test_sequences_are_separate(rows: list[list[int]], kv_heads: int) -> None:
    compare(inputs(kv_heads=kv_heads), rows)
    compare(inputs(kv_heads=kv_heads), rows, scale=0.3)


@pytest.mark.parametrize("window", [1, 7, 20, 40, 100])
def test_sliding_window(window: int) -> None:
    compare(inputs(), window=window)


def test_soft_cap_and_sinks() -> None:
    sinks = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for kwargs in ({"softcap": 2.0}, {"sinks": sinks}, {"sinks": sinks, "window": 7}, {"softcap": 2.0, "window": 7}):
        compare(inputs(), tolerance=1e-5, **kwargs)  # in fp32


def test_gradients_of_short_sequences_are_at_least_as_exact_as_of_long_ones() -> None:
    tensors = inputs(dtype=torch.bfloat16, rows=[[384, 64, 192]])
    exact = [t.detach().double().requires_grad_() for t in tensors]
    starts = sequence_starts(positions([[384, 64, 192]]))
    actual, _ = packed_attention_forward(SimpleNamespace(), *tensors, starts)  # type: ignore[arg-type]
    reference = dense(*exact, rows=[[384, 64, 192]])
    torch.testing.assert_close(actual.double(), reference, rtol=2e-2, atol=1e-2)
    grad = torch.randn_like(reference)
    expected_grads = torch.autograd.grad(reference, exact, grad)
    for a, b in zip(torch.autograd.grad(actual, tensors, grad.bfloat16()), expected_grads, strict=True):
        short, long = (float((a - b)[:, :, i].norm() / b[:, :, i].norm()) for i in (slice(384, 640), slice(384)))
        assert short < 1.1 * long < 0.02


def test_dropout_is_applied() -> None:
    query, key, value = inputs(dtype=torch.float32)
    starts = sequence_starts(positions(ROWS))
    plain, _ = packed_attention_forward(SimpleNamespace(), query, key, value, starts)  # type: ignore[arg-type]
    total = torch.zeros_like(plain)
    for _ in range(300):
        total += packed_attention_forward(SimpleNamespace(), query, key, value, starts, dropout=0.2)[0]  # type: ignore[arg-type]
    assert (total / 300 - plain).abs().mean() < 0.05
    assert (total / 300 - plain).abs().max() > 1e-4


def test_sequence_starts_and_slices() -> None:
    starts = sequence_starts(positions(ROWS))
    assert starts[0, 0, :, :6].tolist() == [[0, 5, 25, 26, 40, 40], [0, 40, 40, 40, 40, 40]]
    assert starts.shape == (1, 1, 2, 64)
    assert [(rows.start, first, end) for rows, first, end in sequence_slices(starts, 40)] == [
        (0, 0, 5),
        (0, 5, 25),
        (0, 25, 26),
        (0, 26, 40),
        (1, 0, 40),
    ]
    assert sequence_slices(sequence_starts(positions([[40], [40]])), 40) == [(slice(0, 2), 0, 40)]
    assert sequence_starts(positions([[1] * 100])).shape == (1, 1, 1, 128)


def test_without_starts_it_is_transformers_sdpa() -> None:
    query, key, value = inputs(dtype=torch.float32)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3)
    actual, _ = packed_attention_forward(module, query, key, value, None)  # type: ignore[arg-type]
    reference = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(actual, reference.transpose(1, 2))


def test_it_is_set_if_the_architecture_allows() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    for arch, packed in {"Llama": True, "Mistral": True, "Qwen3": True, "Falcon": False}.items():
        config = getattr(transformers, f"{arch}Config")(**small)
        with torch.device("meta"):
            model = getattr(transformers, f"{arch}ForCausalLM")(config)
        set_packed_attention(model)
        assert (model.config._attn_implementation == PACKED_ATTENTION) == packed
        if packed:
            set_packed_attention(model, "flex")
            assert model.config._attn_implementation == PACKED_FLEX_ATTENTION
        else:
            with pytest.raises(
                UserError,
                match=r"model\.attention: flex does not support the attention of a model of type falcon; use sdpa",
            ):
                set_packed_attention(model, "flex")


def test_flex_refuses_dropout() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, attention_dropout=0.1))
    set_packed_attention(model)
    with pytest.raises(UserError, match=r"no dropout of attention .*; use sdpa, or set attention_dropout"):
        set_packed_attention(model, "flex")


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("arch", ["Llama", "Mistral", "Qwen3"])
def test_logits_with_a_cache_or_padding_are_transformers(arch: str, attention: str, tmp_path: Any) -> None:
    """Generation and evaluation pass no labels, and must equal transformers."""
    window = {"sliding_window": 8} if arch == "Mistral" else {}
    folder = tiny_models.make_model(tmp_path, arch, torch.float32, **window)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, 300, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return [logits, tokens]

    reference = outputs()
    set_packed_attention(model, attention)
    assert model.config._attn_implementation == {"sdpa": PACKED_ATTENTION, "flex": PACKED_FLEX_ATTENTION}[attention]
    for actual, other in zip(outputs(), reference, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-5)
