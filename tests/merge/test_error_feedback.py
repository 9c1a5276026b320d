"""If this fails, rounding with error feedback loses the update, or disturbs weights that have none."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.merge.error_feedback import round_with_feedback, update_directions
from qlora_dist.merge.lora_update import LoraUpdate
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),  # a row may end within a block or a byte
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from([32, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    double_quant=st.booleans(),
)
def test_weights_without_an_update_stay(
    rows: int, columns: int, quant_type: str, block_size: int, dtype: torch.dtype, *, double_quant: bool
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight.view(-1)[:block_size] = 0
    packed, layout = quantize_weight(weight, quant_type, block_size, double_quant=double_quant)  # type: ignore[arg-type]
    before = dequantize_weight(packed, layout, torch.float32)
    again = round_with_feedback(packed, iter([before]), layout, torch.randn(3, columns))
    assert torch.equal(dequantize_weight(again, layout, torch.float32), before)


def test_an_update_that_rounding_loses() -> None:
    """Error feedback keeps most of the update's effect in its input directions, and plain rounding loses it."""
    torch.manual_seed(0)
    packed, layout = quantize_weight(torch.randn(256, 1024).bfloat16())
    before = dequantize_weight(packed, layout, torch.float32)
    update = LoraUpdate(torch.randn(4, 1024) / 32, torch.randn(256, 4) * 5e-2, 1.0, None)
    merged = before + update.b @ update.a
    with_feedback = dequantize_weight(
        round_with_feedback(packed, iter([merged]), layout, update_directions(update)), layout, torch.float32
    )
    rounded = dequantize_weight(quantize_weight(merged.bfloat16())[0], layout, torch.float32)
    directions = torch.linalg.qr(update.a.T)[0]
    effect = (merged - before) @ directions
    assert ((with_feedback - merged) @ directions).norm() < 0.15 * effect.norm()
    assert ((rounded - merged) @ directions).norm() > 0.9 * effect.norm()
    assert (with_feedback - merged).norm() < 0.05 * before.norm()  # the first quantization cost a tenth


def test_directions_have_the_norm_of_the_update() -> None:
    torch.manual_seed(0)
    update = LoraUpdate(torch.randn(4, 50), torch.randn(30, 4), 1.0, None)
    x = torch.randn(50, 20)
    torch.testing.assert_close((update_directions(update) @ x).norm(dim=0), (update.b @ update.a @ x).norm(dim=0))
