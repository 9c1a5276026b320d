"""If this fails, a published 4-bit model is read wrongly, or a damaged folder causes a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import safetensors.torch
import torch
import transformers

from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.model.model_folder import ModelFolder, read_model_json
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.nf4.quantize import dequantize_weight
from tests.helpers import tiny_models


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """Copy a folder in order to damage it."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """Save the model in several files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def test_a_folder_in_16_bit(tiny_llama):
    folder = ModelFolder(tiny_llama)
    expected = safetensors.torch.load_file(tiny_llama / "model.safetensors")
    assert not folder.is_quantized
    assert not folder.quantized
    assert folder.config["model_type"] == "llama"
    assert {name: (entry.shape, entry.dtype) for name, entry in folder.entries.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()
    }


def test_several_files_are_one_model(sharded, tiny_llama):
    folder, whole = ModelFolder(sharded), ModelFolder(tiny_llama)
    assert len({entry.path for entry in folder.entries.values()}) > 2
    assert folder.entries.keys() == whole.entries.keys()
    with SafetensorsReader() as reader:
        for name, entry in folder.entries.items():
            assert torch.equal(reader.read(entry), reader.read(whole.entries[name]))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_folder_saved_by_transformers_in_4_bit(tiny_llama, tmp_path, storage, double_quant):
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "published")
    folder = ModelFolder(tmp_path / "published")
    assert folder.is_quantized
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert {f"{name}.weight" for name in layers} == folder.quantized.keys()
    assert folder.entries.keys() == {
        name for name, p in model.named_parameters() if not isinstance(p, bnb.nn.Params4bit)
    }
    with SafetensorsReader() as reader:
        for name, layer in layers.items():
            entry = folder.quantized[f"{name}.weight"]
            packed = torch.empty(entry.layout.total_bytes, dtype=torch.uint8)
            entry.read_range(reader, packed, 0)
            assert torch.equal(dequantize_weight(packed, entry.layout, torch.bfloat16), bitsandbytes_weight(layer))


def bitsandbytes_weight(layer: bnb.nn.Linear4bit) -> torch.Tensor:
    """Dequantize by bitsandbytes as a vector, because its kernel may err with the matrix's shape."""
    state = layer.weight.quant_state
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    try:
        return bnb.functional.dequantize_4bit(layer.weight.data.view(-1), state).view(shape)
    finally:
        state.shape = shape


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def set_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


DAMAGES = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: is missing"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
    "config is not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a pickle": (as_pickle, "pytorch_model.bin is a pickle, which is never read"),
    "another quantization": (
        lambda folder: set_config(folder, quantization_config={"quant_method": "hqq"}),
        "is quantized with hqq, which is not supported; give a copy of the model in 16 bit",
    ),
    "8 bit": (
        lambda folder: set_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "is quantized with bitsandbytes, but has no weights in 4 or 8 bit of it",
    ),
    "some parts without an index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        "holds 1 of the 2 parts of a model, and no model.safetensors.index.json; get the folder anew",
    ),
    "Mistral's own file": (
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
        "get the files that transformers loads",
    ),
    "index names a file that is not there": (
        lambda folder: set_index(folder, {"weight_map": {"a": "model-00001-of-00002.safetensors"}}),
        "model-00001-of-00002.safetensors: cannot be read",
    ),
    "index names a file elsewhere": (
        lambda folder: set_index(folder, {"weight_map": {"a": "../other/model.safetensors"}}),
        "outside the folder",
    ),
    "index without files": (lambda folder: set_index(folder, {"metadata": {}}), "names no files"),
    "index of numbers": (lambda folder: set_index(folder, {"weight_map": {"a": 1}}), "names no files"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_one_sentence(copy, damage):
    change, message = DAMAGES[damage]
    change(copy)
    with pytest.raises(UserError) as caught:
        ModelFolder(copy)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(copy))
    assert "\n" not in str(caught.value)


def test_read_json(tmp_path):
    (tmp_path / "x.json").write_text('{"ä": 1}', encoding="utf-8")
    assert read_model_json(tmp_path / "x.json") == {"ä": 1}


def test_a_tied_head_is_no_separate_tensor(tmp_path):
    folder = ModelFolder(tiny_models.make_model(tmp_path, tie_word_embeddings=True))
    assert "model.embed_tokens.weight" in folder.entries
    assert "lm_head.weight" not in folder.entries


def test_weights_in_8_bit_beside_others_in_4_bit_are_refused(tiny_llama, tmp_path):
    """Their codes would be taken for values."""
    out = quantize_folder(tiny_llama, tmp_path / "nf4", QuantizeOptions()).out
    name = "model.layers.0.mlp.up_proj.weight"
    for path in out.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        if name in tensors:
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(torch.randn(176, 64).half())
            left = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
            mixed = left | {name: codes, name.removesuffix(".weight") + ".SCB": scales}
            safetensors.torch.save_file(mixed, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is int8 beside weights in 4 bit, which is not supported; give a copy"):
        ModelFolder(out)
