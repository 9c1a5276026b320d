"""If this fails, a model of a GGUF file is trained with other weights, names, settings or tokens than the file's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import SafetensorsReader
from qlora_dist.model.gguf_folder import open_model
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from tests.helpers.gguf_files import MIXED_TYPES, write_gguf
from tests.helpers.tiny_models import make_model

SIZES: dict[str, Any] = {
    "hidden_size": 256,  # a block of K-quants
    "intermediate_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,  # the tokenizer's
    "rope_theta": 50_000.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"num_attention_heads": 2},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 160},
    "Qwen3Moe": {**EXPERTS, "norm_topk_prob": True},
}


def make_source(folder: Path, arch: str = "Llama", **config: Any) -> Path:
    return make_model(folder, arch, **{**SIZES, **MODELS[arch], **config})


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}


def read_values(folder: ModelFolder) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder, dequantized."""
    with SafetensorsReader() as reader:
        values = {name: reader.read(entry) for name, entry in folder.entries.items()}
        for name, weight in folder.published.items():
            rows = weight.layout.shape[0]
            data = torch.empty(weight.rows_nbytes(0, rows), dtype=torch.uint8)
            weight.read_rows(reader, data, 0, rows)
            values[name] = weight.decode_rows(data, 0, rows)
    return values


@pytest.mark.parametrize("arch", MODELS)
def test_a_file_in_16_bit_holds_the_model_that_was_written(tmp_path, arch):
    source = make_source(tmp_path / "source", arch)
    path = write_gguf(source, tmp_path / "model.gguf", "BF16")
    expected = load_tensors(source)
    with open_model(path) as folder:
        values = read_values(folder)
        config = folder.config
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(values[name], tensor), name
    published = transformers.AutoConfig.from_pretrained(source)
    for key, value in config.items():
        if arch != "Mistral" or key not in ("architectures", "model_type"):  # its files say llama
            assert getattr(published, key) == (torch.bfloat16 if key == "dtype" else value), key


@pytest.mark.parametrize("arch", MODELS)
def test_values_and_4_bit_weights_equal_transformers(tmp_path, arch):
    """transformers leaves the size of heads and experts to defaults, so it gets our config.json."""
    path = write_gguf(make_source(tmp_path / "source", arch), tmp_path / "model.gguf", MIXED_TYPES)
    with open_model(path) as folder:
        config = transformers.AutoConfig.from_pretrained(folder.config_folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            gguf_file=path.name,
            config=config,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(tmp_path / "expected")  # the model from the file would save stacked experts
        values, expected = read_values(folder), load_tensors(tmp_path / "expected")
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(values[name], tensor), name
    options = QuantizeOptions(min_share=0.5)
    quantize_folder(path, tmp_path / "nf4", options)
    quantize_folder(tmp_path / "expected", tmp_path / "expected-nf4", options)
    packed, expected = load_tensors(tmp_path / "nf4"), load_tensors(tmp_path / "expected-nf4")
    assert packed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert packed[name].dtype == tensor.dtype, name
        assert torch.equal(packed[name], tensor), name
    assert len([name for name in packed if name.endswith(".absmax")]) >= 14


@pytest.mark.parametrize("arch", ["Llama", "Qwen2"])
def test_config_is_that_of_transformers(tmp_path, arch):
    path = write_gguf(make_source(tmp_path / "source", arch), tmp_path / "model.gguf", "BF16")
    expected = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    with open_model(path) as folder:
        config = transformers.AutoConfig.from_pretrained(folder.config_folder).to_dict()
    assert config.pop("rms_norm_eps") == pytest.approx(expected.pop("rms_norm_eps"), rel=1e-7)
    for key in ("_name_or_path", "_model_name_or_path", "head_dim", "dtype", "architectures"):
        config.pop(key, None)  # transformers has the name in the file, and does not set the others
        expected.pop(key, None)
    assert config == expected


def test_tokens_and_template_are_the_makers(tmp_path):
    source = make_source(tmp_path / "source")
    path = write_gguf(source, tmp_path / "model.gguf", MIXED_TYPES)
    quantize_folder(path, tmp_path / "nf4", QuantizeOptions(min_share=0.5))
    ours, expected = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("nf4", "source"))
    text = "<|im_start|>user\nhello  world 2024, what's naïve?<|im_end|>"
    assert ours(text)["input_ids"] == expected(text)["input_ids"]
    assert (ours.eos_token, ours.pad_token) == (expected.eos_token, expected.pad_token)
    messages = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(messages, tokenize=False) == expected.apply_chat_template(messages, tokenize=False)
    assert ours.model_max_length == 512


def test_digits_are_split_as_smollm_does(tmp_path):
    path = write_gguf(make_source(tmp_path / "source"), tmp_path / "model.gguf", MIXED_TYPES, pre="smollm")
    with open_model(path) as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder.config_folder)
    assert [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x  12")] == [
        "x",
        "ĠĠ",
        "1",
        "2",
    ]


def test_the_factors_of_llama_3_become_its_rope_scaling(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = make_source(tmp_path / "source", rope_parameters=rope, rope_theta=None)
    config = transformers.LlamaConfig.from_pretrained(source)
    default = rope["rope_theta"] ** -(torch.arange(0, 64, 2) / 64)
    factors = (default / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]).numpy()
    assert len(set(factors.round(3))) > 3

    def add_factors(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", factors)

    with open_model(write_gguf(source, tmp_path / "model.gguf", "BF16", edit=add_factors)) as folder:
        assert folder.config["rope_parameters"] == rope
        assert "rope_freqs.weight" not in folder.names
    factors = factors * 1.1
    with (
        pytest.raises(
            UserError, match=r"rope_freqs.weight has other factors than Llama 3.1 and 3.2; put the file into"
        ),
        open_model(write_gguf(source, tmp_path / "other.gguf", "BF16", edit=add_factors)),
    ):
        pass


def test_yarn_of_the_metadata_becomes_rope_scaling(tmp_path):
    def add_yarn(writer: Any) -> None:
        writer.add_string("qwen3.rope.scaling.type", "yarn")
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    path = write_gguf(make_source(tmp_path / "source", "Qwen3"), tmp_path / "model.gguf", "BF16", edit=add_yarn)
    with open_model(path) as folder:
        assert folder.config["rope_parameters"] == {
            "rope_type": "yarn",
            "rope_theta": 50_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }


def test_a_split_model_is_read_from_all_files(tmp_path):
    source = make_source(tmp_path / "source")
    parts = tmp_path / "parts"
    parts.mkdir()
    write_gguf(source, parts / "model.gguf", "BF16", split_tensors=8)
    files = sorted(parts.glob("*.gguf"))
    assert len(files) == 3
    with open_model(parts) as folder:
        values = read_values(folder)
        assert folder.config["tie_word_embeddings"] is False  # the head is in another file
    for name, tensor in load_tensors(source).items():
        assert torch.equal(values[name], tensor), name
    with pytest.raises(UserError, match="is part 2 of a model; give the first part"), open_model(files[1]):
        pass
    files[2].unlink()
    with pytest.raises(UserError, match=r"is part 1 of 3, and model-00003-of-00003.gguf is missing"), open_model(parts):
        pass


def test_files_of_the_maker_beside_the_file_are_preferred(tmp_path):
    source = make_source(tmp_path / "source", "Mistral", sliding_window=128)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf(source, folder / "model.gguf", MIXED_TYPES, pre="unknown")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((source / name).read_text())
    quantize_folder(folder, tmp_path / "nf4", QuantizeOptions(min_share=0.5))
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 128)
    assert (tmp_path / "nf4" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(UserError, match=r"has the model_type qwen2, and model.gguf holds llama"), open_model(folder):
        pass


def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    path = write_gguf(make_source(tmp_path / "source"), tmp_path / "model.gguf", MIXED_TYPES)
    options = QuantizeOptions(min_share=0.5, file_bytes=100_000)
    with monkeypatch.context() as patch:
        patch.setattr("qlora_dist.model.quantize_folder.finish_model_folder", lambda *_: None)
        patch.setattr("pathlib.Path.unlink", lambda *_: None)  # the plan stays, as when a run is killed
        quantize_folder(path, tmp_path / "nf4", options)
    first = sorted((tmp_path / "nf4.partial").glob("*.safetensors"))[0]
    written = first.stat().st_mtime_ns
    quantize_folder(path, tmp_path / "nf4", options)
    assert (tmp_path / "nf4" / first.name).stat().st_mtime_ns == written


def add_bias(writer: Any) -> None:
    writer.add_tensor("blk.0.attn_q.bias", torch.zeros(256).numpy())


def add_scale(writer: Any) -> None:
    writer.add_float32("llama.attention.scale", 0.5)


def add_half_rope(writer: Any) -> None:
    writer.add_key_length(128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": add_bias}, r"holds blk.0.attn_q.bias, which LlamaForCausalLM of transformers does not have"),
        ({"edit": add_scale}, r"has llama.attention.scale = 0.5, which is not supported; put the file into a folder"),
        ({"edit": add_half_rope}, r"has llama.rope.dimension_count = 64, which is not supported"),
        ({"pre": "poro-chat"}, r"its tokenizer splits texts as 'poro-chat', which is not supported; put the file"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, options, message):
    path = write_gguf(make_source(tmp_path / "source"), tmp_path / "model.gguf", "BF16", **options)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{message}"):
        quantize_folder(path, tmp_path / "nf4", QuantizeOptions())
    assert not list(tmp_path.glob("nf4*"))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = write_gguf(make_source(tmp_path / "source"), tmp_path / "model.gguf", "BF16")
    data = path.read_bytes()

    def message() -> str:
        with pytest.raises(UserError) as caught, open_model(path):
            pass
        return str(caught.value)

    path.write_bytes(data[:-100_000])
    assert re.search(r"is truncated: [\d,]+ of [\d,]+ bytes are there; copy it again", message())
    path.write_bytes(data[:300])
    assert "is not a GGUF file that can be read" in message()
    path.write_bytes(b"GGUF" + bytes(40))
    assert "version 0" in message()
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom", 1))
    assert "has the architecture bloom, but of GGUF files only llama, qwen2" in message()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model.gguf is a GGUF file, which only the command quantize reads"):
        ModelFolder(path)
    path.with_name("other.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"holds 2 GGUF files, such as model.gguf; give one of them"):
        ModelFolder(tmp_path)
