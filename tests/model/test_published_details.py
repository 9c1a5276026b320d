"""If this fails, a detail in which published folders differ from freshly saved ones changes the loss or ends a run."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from qlora_dist.config.sections import ModelConfig
from qlora_dist.errors import UserError
from qlora_dist.model.load_weights import load_weights
from qlora_dist.model.meta_model import LossModel, build_meta_model
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import print_quantize_report, quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from tests.helpers import architectures
from tests.helpers.tiny_models import make_tokenizer

Tensors = dict[str, torch.Tensor]
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": architectures.ARCHITECTURES["GPT2"],
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "gpt_oss": {"num_experts_per_tok": 2, "num_local_experts": 4, "head_dim": 16},
    "deepseek_v3": architectures.ARCHITECTURES["DeepseekV3"] | {"head_dim": 8},
    "glm4_moe": architectures.ARCHITECTURES["DeepseekV3"] | {"n_group": 1, "head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "expand": 2, "state_size": 16},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
LAST = "model.layers.1."


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a bf16 model of two layers, whose widths are multiples of the block size."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            settings = architectures.SETTINGS_OF_ALL | {"intermediate_size": 128, "moe_intermediate_size": 64}
            config = transformers.CONFIG_MAPPING[model_type](
                **(settings | {"num_hidden_layers": 2} | TYPES[model_type])
            )
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() > 1 and "conv1d" not in name:
                        parameter.normal_(std=0.15)
            made[model_type] = tmp_path_factory.mktemp(model_type) / "model"
            model.to(torch.bfloat16).save_pretrained(made[model_type])
            make_tokenizer().save_pretrained(made[model_type])
        return made[model_type]

    return make


def load(folder: Path, *, quantize: bool = True) -> LossModel:
    """Load a folder as training does, in fp32."""
    model_folder = ModelFolder(folder)
    model = build_meta_model(model_folder, ModelConfig(base=str(folder), compute_dtype="fp32"), quantize=quantize)
    with process_group(read_rank_info({}), torch.device("cpu")):
        load_weights(model, model_folder, torch.device("cpu"))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(3, 40).view(1, -1), use_cache=False).logits
    return result


def plain_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return logits(model.eval())


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_next_token_layer(tensors: Tensors) -> None:
    """Add the layer behind the last one, as DeepSeek-V3 and GLM-4.5 publish it."""
    prefix, width = "model.layers.2.", tensors["model.norm.weight"].numel()
    tensors |= {name.replace(LAST, prefix): tensor for name, tensor in tensors.items() if name.startswith(LAST)}
    tensors |= {
        f"{prefix}eh_proj.weight": torch.randn(width, 2 * width).bfloat16(),
        f"{prefix}enorm.weight": torch.ones(width).bfloat16(),
        f"{prefix}hnorm.weight": torch.ones(width).bfloat16(),
        f"{prefix}embed_tokens.weight": tensors["model.embed_tokens.weight"],
        f"{prefix}shared_head.norm.weight": torch.ones(width).bfloat16(),
        f"{prefix}shared_head.head.weight": tensors["lm_head.weight"],
    }


def add_mtp_module(tensors: Tensors) -> None:
    """Add the module that Qwen3.5 publishes beside the model."""
    layer = {name.replace(LAST, "mtp.layers.0."): value for name, value in tensors.items() if name.startswith(LAST)}
    tensors |= layer | {"mtp.fc.weight": torch.randn(64, 128).bfloat16(), "mtp.norm.weight": torch.ones(64).bfloat16()}


def add_rotary_buffers(tensors: Tensors) -> None:
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((8,), 7.0)


def rename(tensors: Tensors, old: str, new: str) -> None:
    for name in [name for name in tensors if name.startswith(old)]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)


def split_into_parts(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part, half in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        save_file({name: tensors[name] for name in half}, folder / f"model-0000{part}-of-00002.safetensors")


def zeros_in(folder: Path, name: str) -> None:
    """Write another file of weights, which must not be read."""
    tensors = {key: torch.zeros_like(tensor) for key, tensor in load_file(folder / "model.safetensors").items()}
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)


def add_stale_index(folder: Path) -> None:
    zeros_in(folder, "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


DETAILS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a next-token layer of DeepSeek-V3": (
        "deepseek_v3",
        lambda folder: change_tensors(folder, add_next_token_layer),
        "neither loaded by transformers nor trained: model.layers.2 (",
    ),
    "a next-token layer of GLM-4.5": (
        "glm4_moe",
        lambda folder: change_tensors(folder, add_next_token_layer),
        "neither loaded by transformers nor trained: model.layers.2 (",
    ),
    "a next-token module of Qwen3.5": (
        "qwen3_5_text",
        lambda folder: change_tensors(folder, add_mtp_module),
        "neither loaded by transformers nor trained: mtp (",
    ),
    "stored rotary frequencies": (
        "llama",
        lambda folder: change_tensors(folder, add_rotary_buffers),
        "nor trained: model.layers.*.self_attn.rotary_emb (16 elements)",
    ),
    "a tied head that is stored": (
        "qwen2",
        lambda folder: change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})),
        "",
    ),
    "no prefix": ("llama", lambda folder: change_tensors(folder, lambda t: rename(t, "model.", "")), ""),
    "no transformer prefix": (
        "gpt2",
        lambda folder: change_tensors(folder, lambda t: rename(t, "transformer.", "")),
        "",
    ),
    "an old pickle beside": ("llama", lambda folder: zeros_in(folder, "pytorch_model.bin"), ""),
    "Mistral's own file beside": ("llama", lambda folder: zeros_in(folder, "consolidated.safetensors"), ""),
    "an old index beside": ("llama", add_stale_index, ""),
}
"""A model's type, a change of its folder, and words of the report of `quantize`."""


@pytest.mark.parametrize("detail", list(DETAILS))
def test_a_detail_changes_no_loss(detail: str, make_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model_type, change, words = DETAILS[detail]
    source = make_folder(model_type)
    folder = shutil.copytree(source, tmp_path / "model")
    change(folder)
    assert_same(logits(load(folder, quantize=False)), plain_logits(folder))
    assert_same(plain_logits(folder), plain_logits(source))
    check_quantized(source, folder, tmp_path, words)


def check_quantized(source: Path, folder: Path, tmp_path: Path, words: str) -> None:
    """Check that both folders are equal in 4 bit, and that the report of `quantize` has these words."""
    console = Console(file=io.StringIO(), width=200)
    options = QuantizeOptions(min_share=0.9)
    report = quantize_folder(folder, tmp_path / "changed-nf4", options)
    print_quantize_report(report, console)
    assert words in console.file.getvalue()
    expected = quantize_folder(source, tmp_path / "nf4", options)
    assert report.counts.quantized_share == expected.counts.quantized_share
    actual = logits(load(report.out))
    assert torch.equal(actual, logits(load(expected.out)))
    assert torch.equal(actual, logits(load(folder)))  # quantized while it is loaded


def test_the_report_names_layers_without_an_adapter(make_folder: Callable[[str], Path], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_quantize_report(quantize_folder(make_folder("mamba2"), tmp_path / "nf4", QuantizeOptions()), console)
    assert (
        "because the model's code reads the weight itself: backbone.layers.*.mixer.out_proj" in console.file.getvalue()
    )


def test_buffers_are_no_parameters(make_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """MiniMax saves the decay of its linear attention for each pair of positions in a block."""
    source = make_folder("minimax")
    counts = quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).counts
    plain = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert counts.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert counts.unused == 0


def test_parts_without_an_index(make_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = make_folder("llama")
    folder = shutil.copytree(source, tmp_path / "model")
    split_into_parts(folder)
    assert_same(logits(load(folder, quantize=False)), plain_logits(source))
    check_quantized(source, folder, tmp_path, "")


def test_rows_of_the_vocabulary_beyond_the_tokenizer(make_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(make_folder("llama"), tmp_path / "model")
    rows = len(make_tokenizer()) + 74
    change_config(folder, vocab_size=rows)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change_tensors(folder, lambda t: t.update({n: torch.cat([t[n], t[n]])[:rows] for n in names}))
    assert_same(logits(load(folder, quantize=False)), plain_logits(folder))
    assert load(folder).get_output_embeddings().weight.shape[0] == rows


def as_unsloth(tensors: Tensors) -> None:
    """Name the experts of GPT-OSS as unsloth's uploads in 4 bit do."""
    for name in [name for name in tensors if ".experts." in name]:
        kind = "bias" if name.endswith("_bias") else "weight"
        parts = enumerate(tensors.pop(name).mT if kind == "weight" else tensors.pop(name))
        tensors |= {f"{name.removesuffix('_bias')}s.{expert}.{kind}": value for expert, value in parts}
    for name in [name for name in tensors if ".router." in name]:
        tensors[name.replace(".router.", ".router.linear.")] = tensors.pop(name)


def quantize_with_bitsandbytes(folder: Path, out: Path, *, left: str = "$^", storage: str = "uint8") -> Path:
    """Write a folder's linear layers in 4 bit of bitsandbytes, and to `out` what bitsandbytes dequantizes them to.

    Layers whose names match the pattern `left` stay in 16 bit.
    """
    plain = shutil.copytree(folder, out)
    dequantized: Tensors = {}

    def quantize(tensors: Tensors) -> None:
        for name in [
            name for name in tensors if name.endswith("proj.weight") or re.search(r"lm_head|gate|\.w\d", name)
        ]:
            if re.search(left, name):
                continue
            flat, shape = tensors[name].view(-1, 64), tensors[name].shape
            codes, state = bitsandbytes.functional.quantize_4bit(
                flat, quant_type="nf4", compress_statistics=True, quant_storage=getattr(torch, storage)
            )
            dequantized[name] = bitsandbytes.functional.dequantize_4bit(codes, state).view(shape)
            state.shape = shape
            tensors[name] = codes
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    change_tensors(folder, quantize)
    change_tensors(plain, lambda tensors: tensors.update(dequantized))
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": storage}
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", **settings})
    return plain


UPLOADS = {
    "whole layers in 16 bit": ("llama", {"left": r"lm_head|layers\.1\.mlp"}),
    "single matrices in 16 bit": ("qwen3_5_text", {"left": r"lm_head|layers\.0\..*out_proj|layers\.1\..*[kq]_proj"}),
    "the output head in 4 bit": ("llama", {}),
    "codes stored as bf16": ("llama", {"left": "lm_head", "storage": "bfloat16"}),
    "experts one by one": ("mixtral", {"left": r"lm_head|block_sparse_moe\.gate"}),
    "a router in 4 bit": ("mixtral", {"left": "lm_head"}),
    "one sparse layer in 16 bit": ("mixtral", {"left": r"lm_head|layers\.1\.block_sparse_moe"}),
}
"""Uploads in 4 bit by others: a model's type, and arguments of `quantize_with_bitsandbytes`."""


@pytest.mark.parametrize("upload", list(UPLOADS))
def test_an_upload_in_4_bit_by_others(upload: str, make_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model_type, arguments = UPLOADS[upload]
    folder = shutil.copytree(make_folder(model_type), tmp_path / "model")
    plain = quantize_with_bitsandbytes(folder, tmp_path / "plain", **arguments)
    assert_same(logits(load(folder)), plain_logits(plain))


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "Mistral's own file alone": (
        "llama",
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
        "consolidated.safetensors has Mistral's own names of tensors; get the files that transformers loads",
    ),
    "an old pickle alone": (
        "llama",
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which is never read; save the model as safetensors",
    ),
    "the text's config.json beside weights of the whole model": (
        "llama",
        lambda folder: change_tensors(folder, lambda t: rename(t, "model.", "language_model.model.")),
        "q_proj.weight is missing; language_model.model.layers.0.self_attn.q_proj.weight is there, which belongs to "
        "another class than config.json names; get the config.json that was published with the weights",
    ),
    "GPT-OSS with unsloth's names": (
        "gpt_oss",
        lambda folder: change_tensors(folder, as_unsloth),
        "gate_up_projs.0.bias is there, which has an unsupported format; give the model as its maker published it",
    ),
}


@pytest.mark.parametrize("detail", list(REFUSED))
def test_a_detail_is_refused_with_a_true_sentence(
    detail: str, make_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model_type, change, message = REFUSED[detail]
    folder = shutil.copytree(make_folder(model_type), tmp_path / "model")
    change(folder)
    with pytest.raises(UserError) as caught:
        quantize_folder(folder, tmp_path / "out", QuantizeOptions())
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
