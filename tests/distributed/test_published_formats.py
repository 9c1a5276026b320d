"""If this fails, a folder in a published format is trained on other weights than its dequantized values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers

from qlora_dist.config.config_file import load_config
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runs.run_dir import run_path
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.architectures import make_architecture
from tests.helpers.published_folders import FLOAT_FORMATS, publish_float_folder, publish_mxfp4_folder
from tests.helpers.published_integer_folders import INTEGER_FORMATS, KIMI_K2, publish_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import PROMPT, first_loss, losses, train_and_get_logits

Publish = Callable[[Path, Path], Mapping[str, torch.Tensor]]
PUBLISH: dict[str, Publish] = {
    **{name: partial(publish_float_folder, name=name) for name in FLOAT_FORMATS},
    **{name: partial(publish_folder, name=name) for name in INTEGER_FORMATS},
    "mxfp4": publish_mxfp4_folder,
    "fp8-experts": partial(publish_float_folder, name="fp8-partial"),
    "kimi-k2": lambda source, out: publish_folder(source, out, "int4", "mlp.experts", **KIMI_K2),
}
ARCHITECTURES = {"mxfp4": "GptOss", "fp8-experts": "DeepseekV3", "kimi-k2": "DeepseekV3"}
IN_ALL_MODES = ("fp8", "mxfp4", "kimi-k2")
"""Formats that are trained on every number of ranks and engine; the others share all code but their arithmetic."""


def make_folders(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """Write a tiny model in a format, and one in 16 bit with its dequantized values."""
    source, published, dequantized = (tmp_path / part for part in ("source", "published", "dequantized"))
    if name in ARCHITECTURES:
        make_architecture(source, ARCHITECTURES[name], torch.bfloat16)
    else:
        tiny_models.make_model(source, "Qwen3", hidden_size=64, intermediate_size=192)
    values = PUBLISH[name](source, published)
    dequantized.mkdir()
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    assert values
    assert values.keys() <= tensors.keys()
    rounded = {key: value.to(tensors[key].dtype) for key, value in values.items()}  # as transformers does on loading
    safetensors.torch.save_file({**tensors, **rounded}, dequantized / "model.safetensors", {"format": "pt"})
    for path in source.glob("*.json*"):
        (dequantized / path.name).write_bytes(path.read_bytes())
    return published, dequantized


def train_on(ranks: int, path: Path, name: str, *overrides: str) -> list[float]:
    config = load_config(path, [f"run.name={name}", f"train.micro_batch={12 // ranks}", *overrides])
    run_ranks(ranks, run_training, config)
    return losses(config)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in safetensors.torch.load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISH)
def test_trained_as_published(name: str, tmp_path: Path) -> None:
    """The losses equal the dequantized model's, and PEFT opens the adapter on it."""
    published, dequantized = make_folders(name, tmp_path)
    path = tiny_models.make_config(tmp_path, published, model__keep_format=True, train__steps=2, optim__warmup_steps=0)
    experts = [f"lora.experts={str(name in ARCHITECTURES).lower()}"]
    config = load_config(path, ["run.name=one", *experts])
    (logits,) = run_ranks(1, train_and_get_logits, config)
    one = losses(config)
    plain = transformers.AutoModelForCausalLM.from_pretrained(dequantized, dtype=torch.float32).eval()
    assert one[0] == pytest.approx(first_loss(config, plain), rel=1e-5)
    modes = {
        "2": (),
        "4": (),
        "3": ("parallel.engine=zero3",),
        "1": ("parallel.base=paged", "parallel.resident_bytes=0"),
    }
    for ranks, overrides in modes.items() if name in IN_ALL_MODES else ():
        trained = train_on(int(ranks), path, f"keep-{ranks}", *overrides, *experts)
        assert trained == pytest.approx(one, rel=1e-5)
    adapted = peft.PeftModel.from_pretrained(plain, run_path(config.run) / "adapter").eval()
    with torch.no_grad():
        expected = adapted(input_ids=PROMPT, use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISH if name not in INTEGER_FORMATS])
def test_converted_to_4_bit(name: str, tmp_path: Path) -> None:
    """`quantize` writes what it writes for the dequantized values, and quantizing on loading gives the same losses.

    `test_quantize_integer_folders.py` has the integer formats.
    """
    published, dequantized = make_folders(name, tmp_path)
    converted = quantize_folder(published, tmp_path / "nf4", QuantizeOptions()).out
    expected = all_tensors(quantize_folder(dequantized, tmp_path / "expected", QuantizeOptions()).out)
    actual = all_tensors(converted)
    assert actual.keys() == expected.keys()
    assert [key for key in actual if not torch.equal(actual[key], expected[key])] == []
    if name in IN_ALL_MODES:
        path = tiny_models.make_config(tmp_path, published, train__steps=2, optim__warmup_steps=0)
        folder = train_on(1, path, "folder", f"model.base={converted}")
        on_loading = train_on(2, path, "on-loading")
        assert on_loading == pytest.approx(folder, rel=1e-5)
