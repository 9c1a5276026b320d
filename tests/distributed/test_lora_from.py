"""If this fails, a run that starts from an adapter starts from another one, or from none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from qlora_dist.config.config_file import dump_config, load_config
from qlora_dist.config.lora_from_adapter import fill_lora_from_adapter
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.architectures import dequantized_model, make_architecture
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import first_loss, losses


def make_config(path: Path, adapter: Path, *overrides: str) -> Config:
    """Write a configuration without the keys of `lora` that the file sets."""
    tree = json.loads(path.read_text())
    tree["lora"] = {"from": str(adapter)}
    path.write_text(json.dumps(tree))
    return fill_lora_from_adapter(load_config(path, overrides))


def eval_losses(config: Config) -> list[float]:
    rows = [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


@pytest.mark.slow
def test_an_adapter_of_pefts_own_with_experts(tmp_path: Path) -> None:
    """Two ranks load experts and dense layers, and a checkpoint keeps their values."""
    source = make_architecture(tmp_path / "source", "DeepseekV3")
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(min_share=0.95)).out
    plain = dequantized_model(source, quantized)
    settings: dict[str, Any] = {
        "target_modules": ["q_a_proj", "q_b_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "up_proj.weight"],
    }
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    path = tiny_models.make_config(tmp_path, quantized, train__steps=1, optim__warmup_steps=0, data__eval=None)
    config = make_config(path, tmp_path / "adapter")
    assert (config.lora.r, config.lora.alpha, config.lora.rslora, config.lora.experts) == (3, 5.0, True, True)
    assert config.lora.targets == ["o_proj", "q_a_proj", "q_b_proj", "up_proj"]
    expected = first_loss(config, adapted.eval())
    with adapted.disable_adapter():
        assert abs(first_loss(config, adapted) - expected) > 0.01
    run_ranks(2, run_training, config)
    assert losses(config)[0] == pytest.approx(expected, rel=1e-6)

    with torch.no_grad():
        adapted.get_submodule("base_model.model.model.layers.0.self_attn.o_proj").lora_A["default"].weight.zero_()
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RuntimeError, match=r"was made with another lora\.from than this run's"):
        run_ranks(1, run_training, fill_lora_from_adapter(load_config(path, ["train.steps=2"])))


@pytest.mark.slow
def test_a_run_starts_where_another_has_ended(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    path = tiny_models.make_config(tmp_path, tiny_llama_nf4, train__steps=2)
    first = load_config(path, ["lora.dora=true", "lora.modules_to_save=[norm, lm_head]", "run.name=first"])
    run_ranks(1, run_training, first)
    second = make_config(path, run_path(first.run) / "adapter", "run.name=second")
    run_ranks(2, run_training, second)
    assert eval_losses(second)[0] == pytest.approx(eval_losses(first)[-1], rel=1e-6)
    assert abs(eval_losses(first)[-1] - eval_losses(first)[0]) > 1e-3
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(second))
    assert fill_lora_from_adapter(load_config(again)) == second


def test_adapters_that_do_not_fit_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = tiny_models.transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, **targets)).save_pretrained(tmp_path / "a")
    path = tiny_models.make_config(tmp_path, tiny_llama)
    for overrides, message in {
        ("lora.r=4",): r"lora\.r: is 4, and .* has 2; leave the key out",
        ("lora.alpha=16",): r"lora\.alpha: is 16\.0, and .* has 6\.0",
        ("lora.dora=true",): r"lora\.dora: is True, and .* has False",
        ("lora.experts=true", "lora.dropout=0"): r"lora\.experts: is True, and .* has False",
        ("lora.modules_to_save=[norm]",): r"lora\.modules_to_save: is \['norm'\], and .* has \['lm_head'\]",
        ("lora.targets=all-linear",): r"lora\.from: .* does not adapt model\.layers\.0\.mlp\.down_proj, which",
        ("lora.targets=[q_proj]",): r"lora\.targets: leaves out model\.layers\.0\.self_attn\.v_proj, which .* adapts",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            set_up_run(make_config(path, tmp_path / "a", *overrides), read_rank_info({}))
        assert "\n" not in str(error.value)
    setup = set_up_run(make_config(path, tmp_path / "a"), read_rank_info({}))
    assert len(setup.initial_tensors) == 2 * 6 + 1
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    (tmp_path / "a" / "adapter_config.json").write_text(
        re.sub(r'"rank_pattern": {}', '"rank_pattern": {"v_proj": 4}', text)
    )
    with pytest.raises(UserError, match=r"several values of rank \(2, 4\), and a run has one"):
        make_config(path, tmp_path / "a")
    for changes, reason in (
        ({"target_parameters": 3}, ".*"),
        ({"modules_to_save": ["norm."]}, r"\('norm\.' is not the path of a module\)"),
    ):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(json.loads(text) | changes))
        with pytest.raises(UserError, match=rf"adapter_config\.json: is not as PEFT writes it {reason}; export the"):
            make_config(path, tmp_path / "a")
