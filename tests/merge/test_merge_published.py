"""If this fails, an adapter is merged into other weights than the ones that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from rich.console import Console

from qlora_dist.errors import UserError
from qlora_dist.merge.merge_folder import merge_folder
from qlora_dist.merge.merge_plan import MergeOptions
from qlora_dist.model.model_folder import ModelFolder
from tests.helpers import tiny_models
from tests.helpers.architectures import make_architecture
from tests.helpers.published_folders import publish_float_folder, publish_mxfp4_folder
from tests.helpers.published_integer_folders import publish_folder

PROMPT = torch.arange(3, 60).view(1, -1)
QUIET = Console(quiet=True)
QUANTIZATION_CONFIGS: dict[str, Callable[[], Any]] = {
    "fp8": lambda: transformers.FineGrainedFP8Config(dequantize=True),
    "mxfp4": lambda: transformers.Mxfp4Config(dequantize=True),
    "int4": lambda: transformers.CompressedTensorsConfig(dequantize=True),
}


def make_folders(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """Write a tiny model in a format, and one in 16 bit with its dequantized values."""
    source, published, dequantized = (tmp_path / part for part in ("source", "published", "dequantized"))
    if name == "mxfp4":
        make_architecture(source, "GptOss", torch.bfloat16)
        values = publish_mxfp4_folder(source, published)
    else:
        tiny_models.make_model(source, "Qwen3", hidden_size=64, intermediate_size=192)
        values = (
            publish_folder(source, published, name) if name == "int4" else publish_float_folder(source, published, name)
        )
    dequantized.mkdir()
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    rounded = {key: value.to(tensors[key].dtype).contiguous() for key, value in values.items()}
    safetensors.torch.save_file({**tensors, **rounded}, dequantized / "model.safetensors", {"format": "pt"})
    (dequantized / "config.json").write_bytes((source / "config.json").read_bytes())
    return published, dequantized


def make_adapter(dequantized: Path, base: Path, out: Path) -> torch.Tensor:
    """Save an adapter of attention by PEFT with random values, and return the logits with it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(dequantized, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(out)
    return logits(adapted)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT, use_cache=False).logits.float()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZATION_CONFIGS)
def test_the_merged_model_is_base_and_adapter(name: str, tmp_path: Path) -> None:
    published, dequantized = make_folders(name, tmp_path)
    expected = make_adapter(dequantized, published, tmp_path / "adapter")

    options = MergeOptions(keep_format=True, dtype="fp32")
    report = merge_folder(None, tmp_path / "adapter", tmp_path / "merged", options, QUIET)
    assert report.squared_difference == 0.0 < report.squared_updates
    merged = transformers.AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)

    # the published format stays where no adapter changes a weight
    options = MergeOptions(into="original", keep_format=True)
    out = merge_folder(None, tmp_path / "adapter", tmp_path / "original", options, QUIET).out
    before, after = ModelFolder(published), ModelFolder(out)
    changed = {key for key in before.published if "q_proj" in key or "v_proj" in key}
    assert after.published.keys() == before.published.keys() - changed
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=QUANTIZATION_CONFIGS[name]()
    )
    assert (logits(loaded.float()) - expected).norm() < 0.01 * expected.norm()  # merged matrices are in bf16
    names = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in names["ignore" if name == "int4" else "modules_to_not_convert"]


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    published, dequantized = make_folders("fp8", tmp_path)
    make_adapter(dequantized, published, tmp_path / "adapter")
    for base, options, message in (
        (published, MergeOptions(into="nf4"), "is not in 4 bit"),
        (dequantized, MergeOptions(keep_format=True), "is not in a published format such as FP8"),
    ):
        with pytest.raises(UserError, match=message):
            merge_folder(base, tmp_path / "adapter", tmp_path / "out", options, QUIET)
