"""If this fails, flex_attention omits blocks that a sequence should see, or computes its neighbour's."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint
from transformers.integrations import flex_attention as transformers_flex

from qlora_dist.model import attention
from qlora_dist.model.attention import packed_flex_attention_forward
from qlora_dist.model.block_mask import create_packed_block_mask, create_packed_mask
from qlora_dist.sequence_starts import sequence_starts

ROWS = [[130, 200, 3, 167], [500]]  # four blocks, the last one not full


def positions(rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


@st.composite
def packed_rows(draw: st.DrawFn) -> list[list[int]]:
    length = draw(st.one_of(st.integers(1, 700), st.sampled_from([127, 128, 129, 256, 384])))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = []
        while sum(row) < length:
            row.append(draw(st.integers(1, draw(st.sampled_from([2, 60, 300])))))
        row[-1] -= sum(row) - length
        rows.append([n for n in row if n])
    return rows


@settings(max_examples=25, deadline=None)
@given(packed_rows(), st.one_of(st.none(), st.integers(1, 300), st.sampled_from([1, 127, 128, 129, 255, 256, 257])))
def test_blocks_equal_torchs_create_block_mask(rows: list[list[int]], window: int | None) -> None:
    length = sum(rows[0])
    sequence = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])

    def mask_mod(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        in_window = query - key < (length if window is None else window)
        return (sequence[row, query] == sequence[row, key]) & (key <= query) & in_window

    reference = torch_flex.create_block_mask(mask_mod, len(rows), None, length, length, "cpu")
    starts = sequence_starts(positions(rows))
    actual = create_packed_block_mask(starts, length, window, torch.device("cpu"))
    for a, b in zip(actual.as_tuple()[:-1], reference.as_tuple()[:-1], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
    pairs = torch_flex.create_mask(mask_mod, len(rows), None, length, length, "cpu")
    assert torch.equal(create_packed_mask(starts, length, window), pairs)


def tensors(heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(len(ROWS), n, sum(ROWS[0]), 16) for n in (heads, 2, 2)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def attend(tensors: list[torch.Tensor], rows: list[list[int]] = ROWS, **kwargs: Any) -> torch.Tensor:
    module = SimpleNamespace(training=True)
    return packed_flex_attention_forward(module, *tensors, sequence_starts(positions(rows)), **kwargs)[0]  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "checkpointed", "kwargs"),
    [
        (4, False, {}),
        (6, True, {"sliding_window": 150}),
        (4, True, {"sliding_window": 20, "softcap": 2.0, "scaling": 0.3}),
    ],
)
def test_the_call_for_gpus_gives_the_same_values_and_gradients(
    *, heads: int, checkpointed: bool, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's flex_attention and its backward are traced as for a GPU, and run without kernels on a CPU."""
    actual, reference = tensors(heads), tensors(heads)
    dense = attend(reference, **kwargs)
    monkeypatch.setattr(attention, "_has_flex_kernels", lambda device: True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    called = []
    traced = torch.compile(torch_flex.flex_attention, backend="aot_eager")

    def without_kernels(*args: Any, training: bool, **others: Any) -> Any:
        called.append(training)
        return traced(*args, **others)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", without_kernels)
    run = partial(checkpoint, attend, use_reentrant=False) if checkpointed else attend
    output = run(actual, dropout=0.0, **kwargs)
    torch.testing.assert_close(output, dense, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(dense)
    for a, b in zip(
        torch.autograd.grad(output, actual, grad), torch.autograd.grad(dense, reference, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert called == [True] * (2 if checkpointed else 1)


@pytest.mark.slow
def test_a_compiled_kernel_needs_no_more_than_the_listed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's kernel for CPUs has no backward. As on GPUs it computes only the listed blocks."""
    inputs, others = [t.detach() for t in tensors()], [[1, 499], [250, 100, 150]]
    expected = [attend(inputs, rows, sliding_window=150) for rows in (ROWS, others)]
    monkeypatch.setattr(attention, "_has_flex_kernels", lambda device: True)
    torch.testing.assert_close(attend(inputs, sliding_window=150), expected[0], rtol=1e-5, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(attend(inputs, others, sliding_window=150), expected[1], rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0  # other sequences need no compilation
    # the kernel reads the lists: without the blocks beside the diagonal, a window of 150 is cut
    monkeypatch.setattr(attention, "create_packed_block_mask", lambda *args: _diagonal(create_packed_block_mask(*args)))
    assert (attend(inputs, sliding_window=150) - expected[0]).abs().max() > 0.1


def _diagonal(mask: torch_flex.BlockMask) -> torch_flex.BlockMask:
    blocks = mask.kv_indices.shape[-1]
    only = torch.arange(blocks, dtype=torch.int32).view(1, 1, -1, 1).expand_as(mask.kv_indices).contiguous()
    nothing = torch.zeros_like(mask.kv_num_blocks)
    return torch_flex.BlockMask.from_kv_blocks(
        torch.ones_like(nothing), only, nothing, only.clone(), mask.BLOCK_SIZE, mask.mask_mod, mask.seq_lengths, False
    )
