"""If this fails, rows of single tokens are looked up, multiplied or trained otherwise than by PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.trainable_tokens import TrainableTokensConfig, TrainableTokensLayer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

from qlora_dist.errors import UserError
from qlora_dist.layers.embedding import use_quantized_vocab
from qlora_dist.layers.token_rows import TOKEN_ROWS_NAME, use_token_rows
from qlora_dist.model import loss as loss_module
from qlora_dist.model.logit_scale import LogitScale
from qlora_dist.model.loss import IGNORE_INDEX, tie_head_to_embedding, use_loss_head
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight

SCALE = LogitScale(0.5, 3.0)
ROWS, H = 20, 64
ID_SETS = [(20, 21), (3, 11), (0, 19, 20)]


def make_head(kind: str, ids: tuple[int, ...]) -> tuple[Any, torch.Tensor]:
    """Return a head with token rows, and the weight of its other rows."""
    head: Any = nn.Embedding(ROWS, H) if kind.startswith("tied") else nn.Linear(H, ROWS, bias=False)
    head.requires_grad_(False)
    weight = head.weight.clone()
    if kind.endswith("4bit"):
        packed, layout = quantize_weight(weight)
        use_quantized_vocab(head, layout, torch.float32)
        head.packed.copy_(packed)
        weight = dequantize_weight(packed, layout, torch.float32)
    if kind.startswith("tied"):
        tie_head_to_embedding(head, SCALE)
    else:
        use_loss_head(head, SCALE)
    use_token_rows(head, ids, "head")
    nn.init.normal_(head.get_parameter(TOKEN_ROWS_NAME))
    return head, weight


def compose(weight: torch.Tensor, ids: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """Return the whole matrix in which the rows have their own values."""
    added = torch.zeros(max(0, ids[-1] + 1 - len(weight)), weight.shape[1])
    return torch.cat([weight, added]).index_copy(0, torch.tensor(ids), values)


@pytest.mark.parametrize("ids", ID_SETS)
@pytest.mark.parametrize("kind", ["tied", "untied", "tied 4bit", "untied 4bit"])
def test_loss_and_gradients_equal_the_whole_matrixs(
    kind: str, ids: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "LOSS_CHUNK_LOGITS", 5 * 22)  # several chunks, of several blocks
    monkeypatch.setattr(loss_module, "_BLOCK_LOGITS", 2 * 22)
    torch.manual_seed(0)
    head, weight = make_head(kind, ids)
    values = head.get_parameter(TOKEN_ROWS_NAME)
    hidden = torch.randn(3, 7, H, requires_grad=True)
    labels = torch.randint(0, max(ROWS, ids[-1] + 1), (3, 7))
    labels[0, :4], labels[1, 0], labels[1, 1] = IGNORE_INDEX, ids[0], ids[-1]

    logits = hidden @ compose(weight, ids, values).t()
    torch.testing.assert_close(head(hidden), logits, rtol=1e-5, atol=1e-5)
    assert SCALE.cap is not None
    scaled = SCALE.cap * torch.tanh(SCALE.factor * logits / SCALE.cap)
    expected = cross_entropy(scaled.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    loss = head(hidden, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for actual, reference in zip(
        torch.autograd.grad(loss * 0.7, [hidden, values]),
        torch.autograd.grad(expected * 0.7, [hidden, values]),
        strict=True,
    ):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden, labels), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ids", ID_SETS)
@pytest.mark.parametrize("scaled", [False, True])
def test_lookups_and_gradients_equal_pefts(scaled: bool, ids: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    vocabulary = max(ROWS, ids[-1] + 1)

    def embedding(rows: int) -> nn.Embedding:
        return Gemma2TextScaledWordEmbedding(rows, H, 0, embed_scale=8.0) if scaled else nn.Embedding(rows, H)

    resized, own = embedding(vocabulary), embedding(ROWS)
    own.weight.data = resized.weight.data[:ROWS].clone()
    own.requires_grad_(False)
    use_token_rows(own, ids, "embedding")
    values = own.get_parameter(TOKEN_ROWS_NAME)
    nn.init.normal_(values)
    config = TrainableTokensConfig(token_indices=list(ids))
    layer = TrainableTokensLayer(resized, "default", config)
    layer.update_layer("default", config)
    layer.set_adapter(["default"])
    reference = layer.trainable_tokens_delta["default"]
    reference.data.copy_(values)
    tokens = torch.randint(0, vocabulary, (2, 30))
    tokens[0, :3], tokens[1, 0] = ids[0], ids[-1]
    looked_up, expected = own(tokens), layer(tokens)
    assert torch.equal(looked_up, expected)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(looked_up, values, gradient), torch.autograd.grad(expected, reference, gradient)
    )


class Normalized(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(ids), dim=-1)


def test_modules_that_peft_computes_otherwise_are_refused() -> None:
    message = "model.add_tokens: path {}, so PEFT cannot train single rows of it; leave model.add_tokens"
    with pytest.raises(UserError, match=message.format("is a Normalized, which computes in its own way")):
        use_token_rows(Normalized(ROWS, H), [20], "path")
    with pytest.raises(UserError, match=message.format("has a bias")):
        use_token_rows(nn.Linear(H, ROWS), [20], "path")
