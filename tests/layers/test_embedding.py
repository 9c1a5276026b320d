"""If this fails, an embedding in 4 bit looks up wrong rows."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

from qlora_dist.errors import UserError
from qlora_dist.layers import embedding as nf4_embedding
from qlora_dist.layers.embedding import QuantizedEmbedding, QuantizedHead, use_quantized_vocab
from qlora_dist.model.logit_scale import LogitScale
from qlora_dist.model.loss import IGNORE_INDEX, linear_cross_entropy_sum, tie_head_to_embedding, use_loss_head
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight

SCALE = LogitScale(0.5, 3.0)


def quantize_vocab_module(module: nn.Module, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
    """Quantize a module's weight, and return the dequantized weight."""
    packed, layout = quantize_weight(module.weight.detach(), **options)
    use_quantized_vocab(module, layout, dtype)
    with torch.no_grad():
        module.packed.copy_(packed)
    return dequantize_weight(packed, layout, dtype)


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.integers(1, 300),
    h=st.one_of(st.integers(1, 130), st.integers(1, 8).map(lambda k: 64 * k), st.sampled_from([2048, 4096])),
    block_size=st.sampled_from([32, 64, 128, 2048, 4096]),
    double_quant=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtypes=st.sampled_from([(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float16, torch.float32)]),
    shape=st.sampled_from([(1,), (2, 3), (), (0,), (1, 0), (5, 70)]),
)
@example(  # rows of several nested blocks
    vocabulary=300,
    h=512,
    block_size=64,
    double_quant=True,
    quant_type="nf4",
    dtypes=(torch.bfloat16, torch.bfloat16),
    shape=(2, 3),
)
@example(  # rows that end within a block
    vocabulary=300,
    h=96,
    block_size=64,
    double_quant=True,
    quant_type="nf4",
    dtypes=(torch.float32, torch.float32),
    shape=(2, 3),
)
def test_rows_equal_the_dequantized_matrix(
    vocabulary: int,
    h: int,
    block_size: int,
    quant_type: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, ...],
    *,
    double_quant: bool,
) -> None:
    torch.manual_seed(0)
    module = nn.Embedding(vocabulary, h, dtype=dtypes[0])
    module.weight.data *= torch.logspace(-3, 1, vocabulary).unsqueeze(1)
    weight = quantize_vocab_module(
        module, dtypes[1], block_size=block_size, double_quant=double_quant, quant_type=quant_type
    )
    ids = torch.randint(0, vocabulary, shape)
    looked_up = module(ids)
    assert looked_up.dtype == dtypes[1]
    assert torch.equal(looked_up, weight[ids])


def test_only_the_rows_looked_up_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Embedding(50, 128)
    weight = quantize_vocab_module(module)

    def fail(*args: object) -> None:
        raise AssertionError("the whole matrix was dequantized")

    monkeypatch.setattr(nf4_embedding, "dequantize_weight", fail)
    assert torch.equal(module(torch.tensor([3, 49, 3])), weight[[3, 49, 3]])


def test_a_padding_id_is_an_ordinary_row() -> None:
    module = nn.Embedding(50, 64, padding_idx=2)
    assert not module.weight[2].any()
    quantize_vocab_module(module)
    assert not module(torch.tensor([1, 2]))[1].any()
    trained = nn.Embedding(50, 64, padding_idx=2)
    trained.weight.data.normal_()
    weight = quantize_vocab_module(trained)
    ids = torch.tensor([[2, 2], [0, 2]])
    assert torch.equal(trained(ids), weight[ids])


def test_an_id_past_the_vocabulary_is_an_error() -> None:
    module = nn.Embedding(50, 64)
    quantize_vocab_module(module)
    with pytest.raises(IndexError):
        module(torch.tensor([50]))


def test_the_scaling_of_the_class_stays() -> None:
    module = Gemma2TextScaledWordEmbedding(50, 64, 0, embed_scale=8.0)
    plain = copy.deepcopy(module)
    plain.weight.data = quantize_vocab_module(module)
    ids = torch.randint(0, 50, (2, 7))
    assert isinstance(module, QuantizedEmbedding) and isinstance(module, Gemma2TextScaledWordEmbedding)
    assert torch.equal(module(ids), plain(ids))
    assert not torch.equal(module(ids), plain.weight[ids])


class Normalized(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight / self.weight.norm())


def test_a_class_that_computes_with_its_weight_is_refused() -> None:
    with pytest.raises(UserError, match="Normalized: this class computes with its weight itself"):
        quantize_vocab_module(Normalized(50, 64))


def test_the_placeholder_of_the_weight_is_nan() -> None:
    module = nn.Embedding(50, 64)
    quantize_vocab_module(module, torch.bfloat16)
    assert (module.weight.shape, module.weight.dtype) == ((50, 64), torch.bfloat16)
    assert module.weight.isnan().all()
    assert module.weight.untyped_storage().nbytes() == 2
    assert [(name, p.dtype, p.requires_grad) for name, p in module.named_parameters()] == [
        ("packed", torch.uint8, False)
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_gives_the_logits_and_the_loss_of_the_dequantized_matrix(*, tied: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module: nn.Module = nn.Embedding(50, 96) if tied else nn.Linear(96, 50, bias=bias)
    weight = quantize_vocab_module(module)
    if tied:
        tie_head_to_embedding(module, SCALE)
        assert isinstance(module, QuantizedEmbedding)
    else:
        use_loss_head(module, SCALE)
        assert isinstance(module, QuantizedHead)
    offsets = getattr(module, "bias", None)
    hidden = torch.randn(2, 7, 96)
    labels = torch.randint(0, 50, (2, 7))
    labels[0, :3] = IGNORE_INDEX
    hidden_in, reference_in = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    assert torch.equal(module(hidden_in), nn.functional.linear(hidden, weight, offsets))
    loss = module(hidden_in, labels)
    expected = linear_cross_entropy_sum(reference_in.flatten(0, 1), weight, offsets, labels.flatten(), SCALE)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(hidden_in.grad, reference_in.grad)
