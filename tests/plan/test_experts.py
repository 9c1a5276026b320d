"""If this fails, the planner's formulas for mixture-of-experts models are wrong, which no trace checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.config.schema import Config
from qlora_dist.model.model_folder import read_model_json
from qlora_dist.plan.memory_estimate import estimate_memory
from qlora_dist.plan.run_spec import make_run_spec
from tests.helpers.architectures import make_architecture
from tests.helpers.measured_step import measure_step
from tests.helpers.ranks import run_ranks

SIZES = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8, "num_key_value_heads": 4}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Mixtral", {"num_local_experts": 8}),
    ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 256, "mlp_only_layers": [], "head_dim": 32}),
    # queries and values have one size, because the CPU has no flash kernel for others
    ("DeepseekV3", {"n_routed_experts": 8, "num_key_value_heads": 8, "qk_rope_head_dim": 16, "v_head_dim": 32}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), CASES, ids=[name for name, _ in CASES])
def test_formulas_match_a_real_rank(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = make_architecture(tmp_path, name, torch.bfloat16, **{**SIZES, "num_hidden_layers": 3, **settings})
    tree: dict[str, dict[str, Any]] = {
        "model": {"base": str(folder)},
        "lora": {"r": 8, "dropout": 0.0},
        "data": {"train": ["data"], "seq_len": 1024, "packing": "none"},
        "optim": {"name": "adamw"},
        "train": {"global_batch": 1, "device": "cpu"},
    }
    config = Config.model_validate(tree)
    ((weights_bytes, peaks, _),) = run_ranks(1, measure_step, config)
    planned = estimate_memory(make_run_spec(config, read_model_json(folder / "config.json"), 1, device="cpu"))
    assert planned.weights_bytes == weights_bytes
    assert planned.peak_phase == "layer_backward"
    assert planned.peak_bytes == pytest.approx(max(peaks.values()), rel=0.06)
