"""If this fails, an adapter without effect is trained, or an effective one is omitted."""

from __future__ import annotations

import pytest
import torch
import transformers

from qlora_dist.model.weight_reads import find_weight_reads

_SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "vocab_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "pad_token_id": 0,
}
_MAMBA = {"num_heads": 4, "n_groups": 1, "expand": 2, "head_dim": 32, "state_size": 16}


def reads(kind: str, **settings: object) -> dict[str, str]:
    config = transformers.AutoConfig.for_model(kind, **(_SMALL | settings))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: use for name, use in find_weight_reads(model).items() if name in linear}


@pytest.mark.parametrize(
    "kind", ["llama", "mixtral", "hunyuan_v1_moe"]
)  # the last one reads only the type of its router's weight
def test_most_models_call_their_layers(kind: str) -> None:
    assert reads(kind) == {}


def test_a_weight_that_is_passed_to_a_kernel_or_multiplied() -> None:
    assert reads("mamba2", **_MAMBA) == {"backbone.layers.0.mixer.out_proj": "value"}
    mixer = "backbone.layers.0.mixer"
    assert reads("mamba", state_size=16) == dict.fromkeys(
        (f"{mixer}.x_proj", f"{mixer}.dt_proj", f"{mixer}.out_proj"), "value"
    )


def test_a_branch_that_the_settings_exclude_is_ignored() -> None:
    block = "transformer.h.0"
    assert reads("bloom", pretraining_tp=2, slow_but_exact=False) == {}
    assert reads("bloom", pretraining_tp=2, slow_but_exact=True) == dict.fromkeys(
        (f"{block}.self_attention.dense", f"{block}.mlp.dense_4h_to_h"), "value"
    )


def test_a_weight_that_is_changed_in_place() -> None:
    block = "rwkv.blocks.0"
    assert reads("rwkv") == dict.fromkeys((f"{block}.attention.output", f"{block}.feed_forward.value"), "change")
    altup = "model.layers.0.altup"
    small = {"vocab_size_per_layer_input": 8, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
    assert reads("gemma3n_text", intermediate_size=64, layer_types=["full_attention"], **small) == {
        f"{altup}.prediction_coefs": "clamp",
        f"{altup}.correction_coefs": "value",
    }
