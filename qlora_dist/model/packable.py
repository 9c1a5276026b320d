"""Check that a model keeps the sequences of a packed row apart."""

from __future__ import annotations

from transformers import PreTrainedModel

from qlora_dist.compat.transformers import attention_name
from qlora_dist.errors import UserError
from qlora_dist.model.attention import takes_sequence_starts

PACKABLE_MODEL_TYPES = frozenset(
    """
    apertus arcee cohere cohere2 cohere2_moe cwm deepseek_v3 ernie4_5 ernie4_5_moe exaone4 gemma gemma2 gemma3_text
    glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe jais2 llama llama4_text minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron olmo
    olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm
    starcoder2 vaultgemma
    """.split()  # noqa: SIM905
)
"""Values of `model_type` for which transformers' masks follow position_ids. The masks of GPT-OSS, OPT, Falcon and AFMoE
(transformers 5.23) silently let a sequence see the previous ones in its row."""


def check_packing_support(model: PreTrainedModel) -> None:
    """Check that a model is known to keep the sequences of packed rows apart.

    Raises:
        UserError: it is not known to do so.
    """
    if not takes_sequence_starts(model) and model.config.model_type not in PACKABLE_MODEL_TYPES:
        raise UserError(
            f"data.packing: a model of type {model.config.model_type} with {attention_name(model)} "
            "attention may let the sequences of a packed row see each other; set data.packing: none"
        )
