"""If this fails, a model is trained at positions that it lacks, or refuses a length that it supports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.config_file import load_config
from qlora_dist.config.max_positions import check_seq_len, max_positions
from qlora_dist.errors import UserError
from qlora_dist.plan.plan_args import PlanArgs, plan_from_args
from qlora_dist.plan.plan_search import search_plans
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import tiny_models

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR = {"type": "linear", "factor": 2.0}
DEEPSEEK = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", "max_position_embeddings": 4096}, 4096),
        ({"model_type": "gpt2", "n_positions": 128, "n_ctx": 128}, 128),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 131072}}, 131072),
        # rope scaling: before it (linear, yarn) or included (llama3, DeepSeek's yarn, Gemma 3)
        ({"max_position_embeddings": 4096, "rope_scaling": LINEAR}, 8192),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": YARN | {"rope_theta": 1e6}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        ({"max_position_embeddings": 163840, "rope_scaling": DEEPSEEK}, 163840),
        ({"model_type": "gemma3_text", "max_position_embeddings": 131072, "rope_scaling": LINEAR}, 131072),
        # no limit: ALiBi, no positions, state spaces, no key
        ({"model_type": "bloom", "seq_length": 2048}, None),
        ({"model_type": "falcon", "alibi": True, "max_position_embeddings": 2048}, None),
        ({"model_type": "mpt", "max_seq_len": 2048, "attn_config": {"alibi": True}}, None),
        ({"model_type": "granitemoehybrid", "position_embedding_type": "nope", "max_position_embeddings": 4096}, None),
        ({"model_type": "jamba", "max_position_embeddings": 262144}, None),
        ({"model_type": "mamba"}, None),
        ({"max_position_embeddings": None}, None),
    ],
)  # fmt: skip
def test_positions(config: dict[str, Any], expected: int | None) -> None:
    assert max_positions(config) == expected
    check_seq_len(expected or 10**9, config, "model")
    if expected is not None:
        with pytest.raises(UserError, match=f"{expected + 1:,} is more than the {expected:,} positions of model; set "):
            check_seq_len(expected + 1, config, "model")


def test_training_and_plans_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = load_config(tiny_models.make_config(tmp_path, tiny_llama, data__seq_len=513))
    with pytest.raises(UserError, match=r"data.seq_len: 513 is more than the 512 positions of .*; set data.seq_len"):
        set_up_run(config, read_rank_info({}))
    asked = PlanArgs(
        model="llama-2-7b",
        overrides=["data.seq_len=32768"],
        gpus=1,
        gpu="h100-80gb",
        nodes=1,
        network="infiniband-400g",
    )
    for plan in (plan_from_args, search_plans):
        with pytest.raises(UserError, match=r"32,768 is more than the 4,096 positions of llama-2-7b; set data.seq_len"):
            plan(asked)
