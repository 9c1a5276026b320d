"""If this fails, a model that is given by name is planned with another model's shapes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qlora_dist.config.sections import LoraConfig
from qlora_dist.errors import UserError
from qlora_dist.plan.layer_spec import decoder_layer_specs
from qlora_dist.plan.model_config import bundled_model_names, read_model_config

# from the models' cards and safetensors indices; a tied matrix counts once
PARAMETERS = {
    "deepseek-v3": 671_026_419_200,  # without the layer for multi-token prediction
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "llama-13b": 13_015_864_320,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "yi-34b": 34_388_917_248,
}


def test_bundled_shapes_have_as_many_parameters_as_the_models() -> None:
    assert set(PARAMETERS) == set(bundled_model_names())
    for name, published in PARAMETERS.items():
        config = read_model_config(name)
        count = config["hidden_size"] * (1 + config["vocab_size"] * (1 if config["tie_word_embeddings"] else 2))
        for layer in decoder_layer_specs(config, LoraConfig()):
            count += sum(matrix.numel + matrix.has_bias * matrix.rows for matrix in layer.matrices)
            count += sum(math.prod(shape) for shape in layer.plain) + layer.buffer_bytes // 4
        assert count == published, name


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "did you mean llama-3.1-8b"),
        ("{", "cannot be read"),
        ("{}", "has no model_type"),
        ('{"model_type": "llama"}', "has no hidden_size"),
    ],
)
def test_a_file_that_describes_no_model_is_an_error(content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_model_config(str(tmp_path) if content is not None else "llama-3.1-8")


def test_the_message_for_an_unfamiliar_name_does_not_list_all_models() -> None:
    with pytest.raises(UserError, match=r"known by name; give its config\.json, or its folder$"):
        read_model_config("openai/gpt-oss-20b")
