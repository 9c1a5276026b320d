"""If this fails, an adapter from PEFT computes something else here, or a part of it is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from qlora_dist.errors import UserError
from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.named_adapter import common_base, parse_named_adapters
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from tests.helpers import tiny_models
from tests.helpers.architectures import dequantized_model, make_architecture
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import PROMPT

CONVERTED = {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}  # PEFT adapts experts too
NAMED = {
    "target_modules": ["o_proj"],
    "target_parameters": ["mlp.gate_proj.weight", "experts.gate_up_proj", "experts.down_proj"],
}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def logits(adapter: Path) -> np.ndarray:
    adapters = parse_named_adapters([str(adapter)])
    overrides = ("train.device=cpu", "model.compute_dtype=fp32", "parallel.base=world", "parallel.adapter=world")
    config = inference_config(common_base(adapters), adapter, overrides=overrides)
    with open_inference_model(config, adapters) as loaded, torch.no_grad():
        return loaded.model(input_ids=PROMPT, use_cache=False).logits.float().numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [("DeepseekV3", CONVERTED), ("DeepseekV3", NAMED), ("Llama4", EXPERTS)],
    ids=["converted", "named", "swapped"],
)
def test_experts_and_dense_layers_equal_pefts(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source = make_architecture(tmp_path / "source", name)
    base = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(min_share=0.5)).out
    model = peft.get_peft_model(dequantized_model(source, base), peft.LoraConfig(r=3, lora_alpha=5, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.2)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path / "adapter")
        expected = model.eval()(input_ids=PROMPT, use_cache=False).logits.numpy()
        with model.disable_adapter():
            assert np.abs(model(input_ids=PROMPT, use_cache=False).logits.numpy() - expected).max() > 0.1
    np.testing.assert_allclose(run_ranks(2, logits, tmp_path / "adapter")[0], expected, rtol=1e-4, atol=1e-4)


def test_a_head_trained_apart_from_a_tied_embedding_is_refused(make_adapter: Any, tmp_path: Path) -> None:
    source = tiny_models.make_model(tmp_path / "source", intermediate_size=192, tie_word_embeddings=True)
    base = quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).out
    apart = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    for is_tied in (False, True):
        adapter = make_adapter(tmp_path / f"adapter-{is_tied}", base, seed=1, ensure_weight_tying=is_tied, **apart)
        if is_tied:
            (result,) = run_ranks(1, logits, adapter)
            assert np.isfinite(result).all()
            continue
        with pytest.raises(UserError, match=r"was trained with a head of its own .*; merge them .*qlora-dist merge"):
            logits(adapter)
