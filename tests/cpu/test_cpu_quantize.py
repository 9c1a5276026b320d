"""If this fails, codes of a model quantized on a CPU differ from bitsandbytes'."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.cpu.cpu_quantize import CodeBounds, quantize_4bit_cpu
from qlora_dist.nf4.quantize import code_table, quantize_weight

QUANT_TYPES = ["nf4", "fp4"]


def code_bounds(quant_type: str) -> CodeBounds:
    return CodeBounds.from_code_table(code_table(quant_type))  # type: ignore[arg-type]


def assert_equals_bitsandbytes(weights: torch.Tensor, block_size: int, quant_type: str) -> None:
    codes, absmax = quantize_4bit_cpu(weights.clone(), block_size, code_bounds(quant_type))
    expected, state = bnb.quantize_4bit(weights, blocksize=block_size, quant_type=quant_type)
    assert torch.equal(codes, expected.flatten())
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_bf16_value_between_minus_one_and_one(quant_type: str) -> None:
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    inside = every[every.float().abs() <= 1]
    inside = torch.nn.functional.pad(inside, (0, -inside.numel() % 31)).view(-1, 31)
    blocks = torch.cat([torch.ones(len(inside), 1, dtype=torch.bfloat16), inside], dim=1)  # an absmax of 1 in each
    assert_equals_bitsandbytes(blocks.flatten(), 32, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_floats_next_to_every_bound_and_every_step(quant_type: str) -> None:
    steps = np.arange(-127, 128, dtype=np.float32) / np.float32(127)
    centres = np.concatenate([code_bounds(quant_type).bounds, steps])  # type: ignore[arg-type]
    near = [centres]
    for direction in (np.float32(-2), np.float32(2)):
        value = centres
        for _ in range(3):
            value = np.nextafter(value, direction)
            near.append(value)
    weights = torch.from_numpy(np.clip(np.concatenate(near), -1, 1))
    weights = torch.nn.functional.pad(weights, (0, -weights.numel() % 31)).view(-1, 31)
    assert_equals_bitsandbytes(torch.cat([torch.ones(len(weights), 1), weights], dim=1).flatten(), 32, quant_type)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    blocks=st.integers(1, 40),
    block_size=st.sampled_from([32, 64, 256, 4096]),
    quant_type=st.sampled_from(QUANT_TYPES),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    scale=st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 1e4]),
    zeros=st.booleans(),
)
def test_random_weights(
    seed: int, blocks: int, block_size: int, quant_type: str, dtype: torch.dtype, scale: float, *, zeros: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(blocks * block_size, generator=generator) * scale).to(dtype)
    if zeros:
        weights[:block_size] = 0
    assert_equals_bitsandbytes(weights, block_size, quant_type)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_quantized_by_bitsandbytes(value: float) -> None:
    weights = torch.randn(8, 64)
    weights[3, 5] = value
    packed, layout = quantize_weight(weights, double_quant=False)
    expected, state = bnb.quantize_4bit(weights.flatten(), blocksize=64, quant_type="nf4")
    assert torch.equal(packed[layout.codes], expected.flatten())
    assert torch.equal(packed[layout.absmax].view(torch.float32), state.absmax) or value != value


def test_the_weights_are_not_changed() -> None:
    weights = torch.randn(64)
    before = weights.clone()
    quantize_4bit_cpu(weights, 64, code_bounds("nf4"))
    assert torch.equal(weights, before)
