"""If this fails, ranks read wrong bytes of a weight, or chunks of its rows are decoded wrong."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis
import pytest
import safetensors.torch
import torch
from hypothesis import strategies

from qlora_dist.formats import published_entry, row_pieces
from qlora_dist.formats.find_published import find_published_weights
from qlora_dist.formats.published_entry import PublishedWeightEntry
from qlora_dist.io.safetensors_file import SafetensorsReader, read_safetensors_header
from qlora_dist.nf4.nf4_layout import BLOCK_SIZES
from tests.helpers.published_folders import FloatFormat, fp4_expert_format, fp8_partial_format, modelopt_format

FORMATS = [fp8_partial_format((16, 8)), fp4_expert_format(), modelopt_format()]


def save_weight(folder: str, made: FloatFormat, rows: int, columns: int) -> tuple[PublishedWeightEntry, torch.Tensor]:
    """Return a weight in a file, and its values."""
    parts = made.quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    path = Path(folder) / "model.safetensors"
    safetensors.torch.save_file({f"a{suffix}": part for suffix, part in parts.items()}, path)
    found = find_published_weights(read_safetensors_header(path), made.config)
    return found.weights["a.weight"], made.dequantize(parts).bfloat16()


def read_vector(weight: PublishedWeightEntry, reader: SafetensorsReader, start: int, stop: int) -> torch.Tensor:
    out = torch.full((stop - start,), 255, dtype=torch.uint8)
    weight.read_range(reader, out, start)
    return out


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(strategies.sampled_from(FORMATS), strategies.integers(1, 40), strategies.data())
def test_any_range_of_bytes_is_a_part_of_the_vector(made, rows, data):
    with tempfile.TemporaryDirectory() as folder, SafetensorsReader() as reader:
        weight, expected = save_weight(folder, made, rows, 64)
        total = weight.layout.total_bytes
        vector = read_vector(weight, reader, 0, total)
        assert torch.equal(weight.layout.dequantize(vector, torch.bfloat16), expected)
        start = data.draw(strategies.integers(0, total))
        stop = data.draw(strategies.integers(start, total))
        before = reader.bytes_read
        assert torch.equal(read_vector(weight, reader, start, stop), vector[start:stop])
        assert reader.bytes_read - before <= stop - start


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("made", FORMATS)
@pytest.mark.parametrize("columns", [32, 96, 4096])
def test_chunks_of_rows(monkeypatch, request, made, columns, threads):
    """They are decoded in several pieces, and each chunk but the last ends where a block of 4 bits ends."""
    monkeypatch.setattr(published_entry, "_DECODED_PER_CHUNK", 1)
    monkeypatch.setattr(row_pieces, "_PIECE_WEIGHTS", 100)
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # decoding sets the number that it has read; ranks that are forked from a process with more would hang
    request.addfinalizer(lambda: torch.set_num_threads(before))
    with tempfile.TemporaryDirectory() as folder, SafetensorsReader() as reader:
        weight, expected = save_weight(folder, made, 300, columns)
        chunks = list(weight.row_chunks())
        assert [first for first, _ in chunks] == [0] + [stop for _, stop in chunks[:-1]]
        assert chunks[-1][1] == 300
        assert len(chunks) > 1
        for first, stop in chunks:
            assert stop == 300 or (stop - first) * columns % max(BLOCK_SIZES) == 0
            data = torch.full((weight.rows_nbytes(first, stop),), 255, dtype=torch.uint8)
            weight.read_rows(reader, data, first, stop)
            assert torch.equal(weight.decode_rows(data, first, stop), expected[first:stop])
