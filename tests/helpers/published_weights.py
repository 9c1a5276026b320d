"""Checks of one weight in a published format: found in a file, read by bytes and by rows, and decoded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from qlora_dist.formats.folder_tensors import PublishedWeights
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry, read_safetensors_header

STEM = "model.layers.0.mlp.down_proj"
Finder = Callable[[Mapping[str, TensorEntry], Mapping[str, Any], str], PublishedWeights]


@contextmanager
def saved_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, TensorEntry]]:
    """Yield the entries of a file with these tensors, while it exists."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        safetensors.torch.save_file(dict(tensors), path)
        yield read_safetensors_header(path)


def find_in(tensors: Mapping[str, torch.Tensor], find: Finder, config: Mapping[str, Any]) -> PublishedWeights:
    """Find the weights among tensors that are saved in a file."""
    with saved_tensors(tensors) as entries:
        return find(entries, config, "bfloat16")


def check_weight(
    parts: Mapping[str, torch.Tensor], find: Finder, config: Mapping[str, Any], expected: torch.Tensor
) -> None:
    """Check that the weight of these tensors, by the ends of their names, has the expected values to the last bit.

    It is decoded from the whole vector, from a vector that is read in pieces, and by rows from each possible row on.
    """
    tensors = {STEM + suffix: tensor for suffix, tensor in parts.items()}
    others = {"model.norm.weight": torch.ones(3), f"{STEM}.bias": torch.ones(len(expected))}
    with saved_tensors(tensors | others) as entries, SafetensorsReader() as reader:
        found = find(entries, config, str(expected.dtype).removeprefix("torch."))
        assert list(found.weights) == [f"{STEM}.weight"]
        assert found.tensors == tensors.keys()
        weight = found.weights[f"{STEM}.weight"]
        layout = weight.layout
        assert layout.shape == expected.shape
        vector = torch.full((layout.total_bytes,), 255, dtype=torch.uint8)
        for start in range(0, layout.total_bytes, 333):
            weight.read_range(reader, vector[start : start + 333], start)
        assert_equal(layout.dequantize(vector, expected.dtype), expected)
        assert layout.dequantize(vector, torch.float32).equal(expected.float())
        firsts = range(0, layout.shape[0], layout.row_unit)
        for first, stop in [(first, layout.shape[0]) for first in firsts] + [(0, stop) for stop in firsts if stop]:
            data = torch.full((weight.rows_nbytes(first, stop),), 255, dtype=torch.uint8)
            weight.read_rows(reader, data, first, stop)
            assert_equal(weight.decode_rows(data, first, stop), expected[first:stop])


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that two tensors have the same type, shape and values."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)
