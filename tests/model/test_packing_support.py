"""If this fails, the sequences of a packed row see each other."""

from __future__ import annotations

import pytest
import torch
import transformers

from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError
from qlora_dist.model.attention import PACKABLE_MODEL_TYPES, add_sequence_starts, set_packed_attention
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import architectures, tiny_models

FAST = ("llama", "gemma2", "phi3", "gpt2", "qwen3_moe")


def random_model(model_type: str) -> transformers.PreTrainedModel:
    settings = dict(architectures.SETTINGS_OF_ALL)
    if model_type == "deepseek_v3":
        settings |= architectures.ARCHITECTURES["DeepseekV3"] | {"head_dim": 8}
    if model_type not in ("olmoe", "phimoe"):  # they have a window that only flash attention respects
        settings["sliding_window"] = 12
    settings |= {"attention_dropout": 0.0, "attn_pdrop": 0.0}  # flex refuses dropout, which some types have by default
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15 if parameter.dim() > 1 else 0.5)
    return model


@pytest.mark.parametrize("attention", ["masks", "sdpa", "flex"])
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in sorted(PACKABLE_MODEL_TYPES)],
)
def test_a_packed_row_gives_the_logits_of_its_sequences(model_type: str, attention: str) -> None:
    model = random_model(model_type)
    rows = [torch.randint(3, 300, (1, length)) for length in (20, 17, 1)]
    inputs = {"position_ids": torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0)}
    with torch.no_grad():
        apart = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
        if attention == "flex" and model_type in ("llama4_text", "stablelm"):
            with pytest.raises(UserError, match=r"model\.attention: flex"):
                set_packed_attention(model, attention)
        elif attention != "masks":
            set_packed_attention(model, attention)
            inputs = add_sequence_starts(model, inputs)
        packed = model(input_ids=torch.cat(rows, dim=1), use_cache=False, **inputs).logits
        mixed = model(input_ids=torch.cat(rows, dim=1), use_cache=False).logits
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4 * apart.abs().max().item())
    assert (mixed - apart).abs().max() > 0.1 * apart.abs().max()  # without positions they see each other


def test_a_model_that_mixes_its_sequences_is_not_packed(tmp_path):
    base = architectures.make_architecture(tmp_path / "model", "Falcon")
    path = tiny_models.make_config(tmp_path, base)
    with pytest.raises(UserError, match=r"data\.packing: a model of type falcon .*; set data\.packing: none"):
        set_up_run(load_config(path), read_rank_info({}))
    set_up_run(load_config(path, ["data.packing=none"]), read_rank_info({}))
