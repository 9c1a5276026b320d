"""If this fails, a GGUF file's weights get other values than llama.cpp gives them."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from qlora_dist.errors import UserError
from qlora_dist.formats.gguf import GgufLayout, check_ggml_type, gguf_weight
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.gguf_file import GgufTensor
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from tests.helpers.gguf_files import SCALE_PLACES, random_blocks

ROWS, COLUMNS, HEAD_ROWS = 48, 512, 8


def expected_values(data: np.ndarray, type_name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name]).copy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("type_name", SCALE_PLACES)
def test_values_of_blocks(type_name, dtype):
    data = random_blocks((ROWS, COLUMNS), type_name)
    layout = GgufLayout(shape=(ROWS, COLUMNS), ggml_type=type_name, dtype=dtype)
    packed = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    packed[: data.size] = torch.from_numpy(data).flatten()
    expected = expected_values(data, type_name).to(getattr(torch, dtype))
    assert len(expected.unique()) > 3
    assert expected.isfinite().all()
    assert torch.equal(layout.dequantize(packed, expected.dtype), expected)


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_values_of_numbers(type_name):
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name])
    layout = GgufLayout(shape=(ROWS, COLUMNS), ggml_type=type_name, dtype="float32")
    packed = torch.from_numpy(data.view(np.uint8).copy()).flatten()
    assert torch.equal(layout.dequantize(packed, torch.float32), expected_values(data, type_name))


def test_rows_of_heads_are_put_into_the_order_of_transformers(tmp_path):
    """The expected order is that of `LlamaTensorProcessor` in `transformers.modeling_gguf_pytorch_utils`."""
    data = random_blocks((ROWS, COLUMNS), "Q4_K")
    (tmp_path / "data").write_bytes(bytes(7) + data.tobytes())
    entry = TensorEntry(path=tmp_path / "data", dtype=torch.uint8, shape=data.shape, start=7, stop=7 + data.nbytes)
    tensor = GgufTensor(ggml_type="Q4_K", shape=(ROWS, COLUMNS), entry=entry)
    weight = gguf_weight(tensor, "bfloat16", head_rows=HEAD_ROWS)
    heads = expected_values(data, "Q4_K").view(-1, HEAD_ROWS // 2, 2, COLUMNS)
    expected = heads.swapaxes(2, 1).reshape(ROWS, COLUMNS).bfloat16()
    with SafetensorsReader() as reader:
        for first, stop in ((0, ROWS), (HEAD_ROWS, 3 * HEAD_ROWS)):
            rows = torch.empty(weight.rows_nbytes(first, stop), dtype=torch.uint8)
            weight.read_rows(reader, rows, first, stop)
            assert torch.equal(weight.decode_rows(rows, first, stop), expected[first:stop])
    assert isinstance(weight, PublishedWeightEntry)
    assert weight.layout.row_unit == HEAD_ROWS


def test_a_type_without_values_is_refused(tmp_path):
    entry = TensorEntry(path=tmp_path / "x.gguf", dtype=torch.uint8, shape=(1, 40), start=0, stop=40)
    tensor = GgufTensor(ggml_type="Q8_1", shape=(1, 32), entry=entry)
    with pytest.raises(UserError, match=r"x.gguf: blk.0.w is in Q8_1, which is not supported"):
        check_ggml_type(tensor, "blk.0.w")
    check_ggml_type(replace(tensor, ggml_type="Q5_0", entry=replace(entry, shape=(1, 22))), "blk.0.w")
