"""If this fails, targets that PEFT does not accept end in its traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from qlora_dist.config_file import load_config
from qlora_dist.errors import UserError
from qlora_dist.train.setup import set_up_model


def test_a_part_of_what_peft_takes_for_experts(tmp_path: Path) -> None:
    sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = tiny.make_model(tmp_path / "model", arch="Qwen3Moe", mlp_only_layers=[0], **sparse)
    config = load_config(tiny.make_config(tmp_path, model), ["lora.targets=[q_proj,gate_proj]"])
    with pytest.raises(
        UserError, match=r"^lora\.targets: .*gate_proj without also targeting up_proj .*; name all of them"
    ):
        set_up_model(config)
