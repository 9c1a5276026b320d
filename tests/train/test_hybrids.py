"""If this fails, a model whose code does more than call its layers trains on a wrong loss, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.console import RunConsole
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.run_training import train_and_export
from tests.helpers import tiny_models
from tests.helpers.architectures import dequantized_model, make_architecture
from tests.helpers.train_helpers import first_loss, losses

_MAMBA = {"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_expand": 2}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    # has a norm with a gate, which must not be replaced
    "Qwen3Next": {
        **_LINEAR,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96,
    },
    # has a norm whose gate is optional, and a weight that is passed to a kernel
    "Bamba": {**_MAMBA, "attn_layer_indices": [1], "mamba_chunk_size": 64},
    # has buffers that a class sets in another module
    "FalconH1": {**_MAMBA, "mamba_d_ssm": 128, "mamba_chunk_size": 64, "head_dim": 16},
    # has an indexer that only chooses what attention sees
    "DeepseekV32": {
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 96,
    },
    # has a convolution that is stored as three tensors
    "OlmoHybrid": {**_LINEAR, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}


class RecordingConsole(RunConsole):
    """Console that keeps the lines of a run."""

    def __init__(self) -> None:
        super().__init__(1)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def train_and_collect_lines(config: Config) -> list[str]:
    """Train in this process, and return the printed lines."""
    setup = set_up_run(config, read_rank_info({}))
    try:
        with RecordingConsole() as console, process_group(setup.ranks, setup.device):
            train_and_export(setup, console)
    finally:
        if dist.is_initialized():  # after an error the group would exist until the process exits
            dist.destroy_process_group()
    return console.lines


def held_out_loss(config: Config, model: nn.Module) -> float:
    """Return the loss of the held-out rows, computed row by row without padding."""
    total, count = 0.0, 0
    for batch in set_up_run(config, read_rank_info({})).eval_batches:
        for row, labels, _ in zip(*batch, strict=True):
            if (labels == -100).all():
                continue  # the row only fills up the last batch
            length = int((labels != -100).nonzero().max()) + 1
            with torch.no_grad():
                logits = model(input_ids=row[None, :length], use_cache=False).logits[0]
            total += float(cross_entropy(logits, labels[:length], reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def make_run(name: str, folder: Path, *overrides: str) -> tuple[Path, Path, Config]:
    source = make_architecture(folder / "source", name, **HYBRIDS[name])
    quantized = quantize_folder(source, folder / "nf4", QuantizeOptions(min_share=0.5)).out
    path = tiny_models.make_config(folder, quantized, train__steps=2, optim__warmup_steps=0, train__global_batch=4)
    return source, quantized, load_config(path, ["data.packing=none", "train.micro_batch=4", *overrides])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), [*((name, "fsdp2") for name in HYBRIDS), ("DeepseekV32", "zero2")])
def test_loss_and_adapter_equal_transformers_and_peft(name: str, engine: str, tmp_path: Path) -> None:
    source, quantized, config = make_run(name, tmp_path, f"parallel.engine={engine}", "parallel.base=replicate")
    printed = train_and_collect_lines(config)
    plain = dequantized_model(source, quantized).eval()
    assert losses(config)[0] == pytest.approx(first_loss(config, plain), rel=1e-6)

    adapter = run_path(config.run) / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    unchanged = {key for key, value in tensors.items() if "lora_B" in key and not value.any()}
    assert all("indexer" in key for key in unchanged)
    assert len(unchanged) == (9 if name == "DeepseekV32" else 0)
    lines = [line for line in printed if "without influence" in line]
    assert len(lines) == bool(unchanged) and all("self_attn.indexer.wq_b" in line for line in lines)

    rows = [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert abs(held_out[-1] / held_out[0] - 1) > 1e-3  # the adapter matters
    peft_model = peft.PeftModel.from_pretrained(plain, adapter).eval()
    assert held_out[-1] == pytest.approx(held_out_loss(config, peft_model), rel=1e-6)


def test_adapters_without_influence_on_the_loss_are_refused(tmp_path: Path) -> None:
    _, _, config = make_run("DeepseekV32", tmp_path, "lora.targets=[wq_b, weights_proj]")
    with pytest.raises(UserError, match="no adapter has any influence on the loss"):
        train_and_collect_lines(config)


def test_a_layer_whose_weight_the_model_reads_gets_no_adapter(tmp_path: Path) -> None:
    _, _, config = make_run("Bamba", tmp_path)
    adapted = {
        name.split(".lora_")[0]
        for name, _ in set_up_run(config, read_rank_info({})).model.named_parameters()
        if "lora_" in name
    }
    assert any(name.endswith("mamba.in_proj") for name in adapted)
    assert not any(name.endswith("mamba.out_proj") for name in adapted)
    named = config.model_copy(update={"lora": config.lora.model_copy(update={"targets": ["in_proj", "out_proj"]})})
    with pytest.raises(UserError, match="reads the weight of out_proj itself"):
        set_up_run(named, read_rank_info({}))
