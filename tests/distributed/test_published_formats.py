"""If this fails, a folder in a published format is trained on other weights than its dequantized values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from qlora_dist.config.config_file import load_config
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.architectures import make_architecture
from tests.helpers.published_folders import FLOAT_FORMATS, publish_float_folder, publish_mxfp4_folder
from tests.helpers.published_integer_folders import INTEGER_FORMATS, publish_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import first_loss, losses

Publish = Callable[[Path, Path], Mapping[str, torch.Tensor]]
PUBLISH: dict[str, Publish] = {
    **{name: partial(publish_float_folder, name=name) for name in FLOAT_FORMATS},
    **{name: partial(publish_folder, name=name) for name in INTEGER_FORMATS},
    "mxfp4": publish_mxfp4_folder,
}
IN_ALL_MODES = ("fp8", "mxfp4", "int4")
"""Formats that are trained on every number of ranks and engine; the others share all code but their arithmetic."""


def make_folders(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """Write a tiny model in a format, and one in 16 bit with its dequantized values."""
    source, published, dequantized = (tmp_path / part for part in ("source", "published", "dequantized"))
    if name == "mxfp4":
        make_architecture(source, "GptOss", torch.bfloat16)
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
def test_losses_equal_the_dequantized_model(name: str, tmp_path: Path) -> None:
    published, dequantized = make_folders(name, tmp_path)
    path = tiny_models.make_config(tmp_path, published, model__keep_format=True, train__steps=2)
    plain = transformers.AutoModelForCausalLM.from_pretrained(dequantized, dtype=torch.float32)
    one = train_on(1, path, "one")
    assert one[0] == pytest.approx(first_loss(load_config(path), plain), rel=1e-5)
    if name in IN_ALL_MODES:
        modes = {2: (), 4: (), 3: ("parallel.engine=zero3",), 1: ("parallel.base=paged", "parallel.resident_bytes=0")}
        for ranks, overrides in modes.items():
            assert train_on(ranks, path, f"keep-{ranks}", *overrides) == pytest.approx(one, rel=1e-5)

    # converted to 4 bit: by `quantize`, or while it is loaded
    converted = quantize_folder(published, tmp_path / "nf4", QuantizeOptions()).out
    expected = all_tensors(quantize_folder(dequantized, tmp_path / "expected", QuantizeOptions()).out)
    actual = all_tensors(converted)
    assert actual.keys() == expected.keys()
    assert [key for key in actual if not torch.equal(actual[key], expected[key])] == []
    on_loading = train_on(2, path, "on-loading", "model.keep_format=false")
    assert on_loading != pytest.approx(one, rel=1e-5)  # else the test proves nothing
    if name in IN_ALL_MODES:
        folder = train_on(1, path, "folder", "model.keep_format=false", f"model.base={converted}")
        assert on_loading == pytest.approx(folder, rel=1e-5)
