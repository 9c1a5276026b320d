"""If this fails, the planner's sizes of weights that keep their format differ from the trained model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.plan.kept_format import read_kept_format
from qlora_dist.plan.model_spec import make_model_spec
from qlora_dist.train.run_setup import set_up_model
from tests.helpers.architectures import make_architecture
from tests.helpers.planned_parameters import compare_parameters
from tests.helpers.published_folders import publish_float_folder
from tests.helpers.published_integer_folders import KIMI_K2, publish_folder

KIMI_IGNORES = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]


def publish(name: str, source: Path, out: Path) -> None:
    if name == "kimi-k2":
        publish_folder(source, out, "int4", "mlp.experts", **KIMI_K2)
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["ignore"] = KIMI_IGNORES
        (out / "config.json").write_text(json.dumps(config))
    elif name in ("int4", "int8-channel"):
        publish_folder(source, out, name)
    else:
        publish_float_folder(source, out, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("fp8", "Qwen3"),
        ("fp8-partial", "DeepseekV3"),
        ("fbgemm", "Llama"),
        ("int4", "Qwen3Moe"),
        ("int8-channel", "Llama"),
        ("kimi-k2", "DeepseekV3"),
    ],
)
def test_shapes_equal_the_trained_models(name: str, arch: str, tmp_path: Path) -> None:
    make_architecture(tmp_path / "source", arch, torch.bfloat16)
    publish(name, tmp_path / "source", tmp_path / "published")
    config = Config.model_validate(
        {
            "model": {"base": str(tmp_path / "published"), "keep_format": True},
            "lora": {"r": 4},
            "data": {"train": ["none"]},
        }
    )
    _, model, _ = set_up_model(config)
    model_config = json.loads((tmp_path / "published" / "config.json").read_text())
    planned = make_model_spec(model_config | {"model_type": model.config.model_type}, config.lora, keep_format=True)
    compare_parameters(planned, model)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match="the planner does not know the sizes of weights in the format gptq"):
        read_kept_format({"quantization_config": {"quant_method": "gptq", "bits": 4}})
