"""If this fails, training on weights that keep their integer format has another loss than transformers has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from qlora_dist.config.config_file import load_config
from qlora_dist.runs.run_dir import run_path
from tests.helpers.architectures import make_architecture
from tests.helpers.published_integer_folders import INTEGER_FORMATS, KIMI_K2, publish_folder, set_values
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import make_config, make_model
from tests.helpers.train_helpers import PROMPT, first_loss, losses, train_and_get_logits


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INTEGER_FORMATS, "kimi-k2"])
def test_trains_as_transformers_does_on_the_dequantized_weights(name: str, tmp_path: Path) -> None:
    if name == "kimi-k2":
        source = make_architecture(tmp_path / "source", "DeepseekV3", torch.bfloat16)
        values = publish_folder(source, tmp_path / "published", "int4", "mlp.experts", **KIMI_K2)
    else:
        source = make_model(tmp_path / "source")
        values = publish_folder(source, tmp_path / "published", name)
    path = make_config(tmp_path, tmp_path / "published", train__steps=2, optim__warmup_steps=0)
    runs = {"one": (1, []), "two": (2, []), "four": (4, []), "zero3": (2, ["parallel.engine=zero3"])}
    configs = {
        key: load_config(
            path, ["model.keep_format=true", f"run.name={key}", f"train.micro_batch={12 // ranks}", *overrides]
        )
        for key, (ranks, overrides) in runs.items()
    }
    logits = {key: run_ranks(ranks, train_and_get_logits, configs[key])[0] for key, (ranks, _) in runs.items()}
    for key in ("two", "four", "zero3"):
        assert losses(configs[key]) == pytest.approx(losses(configs["one"]), rel=1e-5)
        np.testing.assert_allclose(logits["one"], logits[key], rtol=1e-3, atol=1e-4)

    plain = transformers.AutoModelForCausalLM.from_pretrained(set_values(source, values), dtype=torch.float32).eval()
    assert losses(configs["one"])[0] == pytest.approx(first_loss(configs["one"], plain), rel=1e-5)
    adapted = peft.PeftModel.from_pretrained(plain, run_path(configs["one"].run) / "adapter").eval()
    with torch.no_grad():
        expected = adapted(input_ids=PROMPT, use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(logits["one"]), expected, rtol=1e-3, atol=1e-4)
