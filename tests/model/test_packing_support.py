"""If this fails, the sequences of a packed row see each other."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError
from qlora_dist.model.attention import (
    PACKABLE_MODEL_TYPES,
    add_sequence_starts,
    check_packing_support,
    set_packed_attention,
)
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import architectures, tiny_models

FAST = ("llama", "gemma2", "phi3", "gpt2", "qwen3_moe")

_MAMBA = {
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": {
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "expand": 2, "state_size": 16, "chunk_size": 64},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "olmo_hybrid": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 64},
}
"""Settings of models some of whose layers are no attention."""


def random_model(model_type: str) -> transformers.PreTrainedModel:
    settings = dict(architectures.SETTINGS_OF_ALL)
    if model_type == "deepseek_v3":
        settings |= architectures.ARCHITECTURES["DeepseekV3"] | {"head_dim": 8}
    settings |= HYBRIDS.get(model_type, {})
    if model_type not in ("olmoe", "phimoe"):  # they have a window that only flash attention respects
        settings["sliding_window"] = 12
    settings |= {"attention_dropout": 0.0, "attn_pdrop": 0.0}  # flex refuses dropout, which some types have by default
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):  # a state must neither vanish nor explode
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


@pytest.mark.parametrize("model_type", list(HYBRIDS))
def test_a_hybrid_that_mixes_its_sequences_is_not_packed(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(model_type)
    set_packed_attention(model)
    earlier, other, later = torch.randint(3, 300, (3, 1, 20)).unbind(0)
    inputs = {"position_ids": torch.arange(20).repeat(1, 2)}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        inputs = {}
    losses = []
    for before in (earlier, other):
        row = torch.cat([before, later], dim=1)
        with torch.no_grad():
            logits = model(input_ids=row, use_cache=False, **add_sequence_starts(model, dict(inputs))).logits
        losses.append(cross_entropy(logits[0, 20:-1], later[0, 1:]).item())
    assert abs(losses[0] - losses[1]) > 1e-4 * losses[0]
    # not even if its type were among the ones whose attention keeps sequences apart
    monkeypatch.setattr("qlora_dist.model.attention.PACKABLE_MODEL_TYPES", {model_type})
    with pytest.raises(
        UserError, match=r"may let the sequences of a packed row see each other; set data\.packing: none"
    ):
        check_packing_support(model)


def test_a_model_that_mixes_its_sequences_is_not_packed(tmp_path):
    base = architectures.make_architecture(tmp_path / "model", "Falcon")
    path = tiny_models.make_config(tmp_path, base)
    with pytest.raises(UserError, match=r"data\.packing: a model of type falcon .*; set data\.packing: none"):
        set_up_run(load_config(path), read_rank_info({}))
    set_up_run(load_config(path, ["data.packing=none"]), read_rank_info({}))
