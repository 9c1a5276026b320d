"""If this fails, a rank's shard of a published 4-bit model is wrong, or bitsandbytes cannot load saved weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import SafetensorsReader, read_safetensors_header
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.nf4.quant_state import (
    QuantizedWeightEntry,
    find_quantized_weights,
    is_part_of_quantized,
    quant_state_specs,
    quant_state_tensors,
)
from qlora_dist.nf4.quantize import dequantize_weight, quantize_weight

NAME = "model.layers.0.mlp.down_proj.weight"
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def make_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def saved_by_bitsandbytes(
    weight: torch.Tensor, storage: torch.dtype = torch.uint8, quant_type: str = "nf4", *, double_quant: bool = True
) -> dict[str, torch.Tensor]:
    """Return the tensors that bnb.nn.Linear4bit puts into its state dict."""
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type=quant_type, quant_storage=storage
    )
    return {NAME: codes} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}


@contextmanager
def open_weight(content: dict[str, torch.Tensor]) -> Iterator[tuple[QuantizedWeightEntry, SafetensorsReader]]:
    """Yield the only 4-bit weight in a file of these tensors, and a reader."""
    with tempfile.TemporaryDirectory() as folder, SafetensorsReader() as reader:
        path = Path(folder) / "model.safetensors"
        safetensors.torch.save_file(content, path)
        weights = find_quantized_weights(read_safetensors_header(path), reader)
        assert list(weights) == [NAME]
        yield weights[NAME], reader


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20).map(lambda k: 8 * k),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    storage=st.sampled_from(STORAGES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    data=st.data(),
)
def test_shards_cut_anywhere_join_to_the_vector(rows, columns, dtype, storage, quant_type, double_quant, data):
    weight = make_weight((rows, columns), dtype)
    packed, layout = quantize_weight(weight, quant_type, 64, double_quant=double_quant)
    cuts = data.draw(st.lists(st.integers(0, layout.total_bytes), max_size=6).map(sorted))
    with open_weight(saved_by_bitsandbytes(weight, storage, quant_type, double_quant=double_quant)) as (entry, reader):
        assert entry.layout == layout
        read_before = reader.bytes_read
        shards = []
        for start, stop in zip([0, *cuts], [*cuts, layout.total_bytes], strict=True):
            shard = torch.full((stop - start,), 255, dtype=torch.uint8)
            entry.read_range(reader, shard, start)
            shards.append(shard)
        assert torch.equal(torch.cat(shards), packed)
        assert reader.bytes_read - read_before <= layout.total_bytes, "each byte once"


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 70)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
)
def test_tensors_equal_bitsandbytes(shape, dtype, quant_type, double_quant):
    weight = make_weight(shape, dtype)
    packed, layout = quantize_weight(weight, quant_type, 64, double_quant=double_quant)
    tensors, reference = (
        quant_state_tensors(NAME, packed, layout),
        saved_by_bitsandbytes(weight, torch.uint8, quant_type, double_quant=double_quant),
    )
    assert tensors.keys() == reference.keys()
    for key, tensor in tensors.items():
        if "quant_state" in key:
            state, reference_state = (json.loads(bytes(values.numpy())) for values in (tensor, reference[key]))
            assert state == reference_state
        else:
            assert tensor.dtype == reference[key].dtype
            assert tensor.shape == reference[key].shape
            assert torch.equal(tensor, reference[key])
    assert list(quant_state_specs(NAME, layout)) == [
        (key, value.dtype, tuple(value.shape)) for key, value in tensors.items()
    ]


def test_bitsandbytes_loads_the_tensors():
    weight = make_weight((24, 128))
    packed, layout = quantize_weight(weight)
    tensors = quant_state_tensors(NAME, packed, layout)
    parameter = bnb.nn.Params4bit.from_prequantized(
        tensors.pop(NAME), {key.removeprefix(f"{NAME}."): value for key, value in tensors.items()}, device="cpu"
    )
    loaded = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert torch.equal(loaded, dequantize_weight(packed, layout, torch.bfloat16))


@pytest.mark.parametrize("offset", [0.1, 1e-40, -1.2345678901234567e-300, 3.4028234663852886e38, 0.0])
def test_the_length_of_a_file_does_not_depend_on_the_offset(offset):
    packed, layout = quantize_weight(make_weight((24, 128)))
    packed[layout.offset] = torch.tensor([offset], dtype=torch.float32).view(torch.uint8)
    written = quant_state_tensors(NAME, packed, layout)
    specs = {key: shape for key, _, shape in quant_state_specs(NAME, layout)}
    state = written[f"{NAME}.quant_state.bitsandbytes__nf4"]
    assert specs[f"{NAME}.quant_state.bitsandbytes__nf4"] == tuple(state.shape)
    with open_weight(written) as (entry, reader):
        back = torch.empty_like(packed)
        entry.read_range(reader, back, 0)
        assert torch.equal(back, packed)


def test_parts_of_a_quantized_weight_are_recognized_by_name():
    quantized = {"a.weight": None, "indexer.weights_proj.weight": None}
    parts = [
        "a.weight",
        "a.weight.absmax",
        "a.weight.quant_state.bitsandbytes__nf4",
        "indexer.weights_proj.weight.absmax",
    ]
    others = ["a.bias", "b.weight", "aa.weight", "a.weights", "weight", "indexer.weights_proj.bias", "b.a.weight"]
    assert all(is_part_of_quantized(name, quantized) for name in parts)
    assert not any(is_part_of_quantized(name, quantized) for name in others)


def with_state(content: dict[str, torch.Tensor], **changes: object) -> None:
    (key,) = (key for key in content if "quant_state" in key)
    state = json.loads(bytes(content[key].numpy())) | changes
    content[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def set_table(content: dict[str, torch.Tensor], part: str) -> None:
    content[f"{NAME}.{part}"][3] += 0.01


def set_garbage(content: dict[str, torch.Tensor]) -> None:
    content[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(b"\x00{not json"), dtype=torch.uint8)


DAMAGES = {
    "no absmax": lambda content: content.pop(f"{NAME}.absmax"),
    "no codes": lambda content: content.pop(NAME),
    "no code table": lambda content: content.pop(f"{NAME}.quant_map"),
    "no nested absmax": lambda content: content.pop(f"{NAME}.nested_absmax"),
    "no nested code table": lambda content: content.pop(f"{NAME}.nested_quant_map"),
    "another code table": lambda content: set_table(content, "quant_map"),
    "another nested code table": lambda content: set_table(content, "nested_quant_map"),
    "fewer codes": lambda content: content.update({NAME: content[NAME][:-1]}),
    "another shape": lambda content: with_state(content, shape=[24, 256]),
    "no shape": lambda content: with_state(content, shape=None),
    "an impossible block size": lambda content: with_state(content, blocksize=48),
    "another nested block size": lambda content: with_state(content, nested_blocksize=128),
    "an unknown type": lambda content: with_state(content, dtype="float8_e4m3fn"),
    "another code": lambda content: with_state(content, quant_type="fp4"),
    "garbage": set_garbage,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_foreign_weights_are_refused(damage):
    content = saved_by_bitsandbytes(make_weight((24, 128)))
    DAMAGES[damage](content)
    with pytest.raises(UserError) as caught, open_weight(content):
        pass
    message = str(caught.value)
    assert "model.safetensors: the 4-bit weight " + NAME in message
    assert message.endswith("quantize the model again")
    assert "\n" not in message


def test_layout_of_a_weight_without_double_quantization():
    with open_weight(saved_by_bitsandbytes(make_weight((6, 32)), double_quant=False)) as (entry, _):
        assert entry.layout == NF4Layout(shape=(6, 32), double_quant=False)
