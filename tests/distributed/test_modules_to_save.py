"""If this fails, modules that are trained whole differ from plain autograd, or are missing from the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.adapters.attach import init_lora_weight
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import tiny_models
from tests.helpers.architectures import dequantized_model
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import PROMPT, losses, plain_losses, train_and_get_logits

STEPS = 4


def reference_losses(config: Config, source: Path, quantized: Path, names: list[str]) -> list[float]:
    """Repeat the run in one process by plain autograd, training the named modules in place."""
    setup = set_up_run(config, read_rank_info({}))
    model = dequantized_model(source, quantized)
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=setup.adapter.target_modules)
    model = peft.get_peft_model(model, lora).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(init_lora_weight(name.removeprefix("base_model.model."), parameter.shape, 0))
            elif any(part in names for part in name.split(".")):
                parameter.requires_grad_(True)
    return plain_losses(model, config, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "names", "layout"),
    [
        (False, ["embed_tokens", "lm_head", "norm"], (2, 1, "world")),
        (True, ["embed_tokens"], (2, 1, "world")),
        (True, ["embed_tokens"], (4, 2, "node")),
    ],
)
def test_modules_trained_whole(tied: bool, names: list[str], layout: tuple[int, int, str], tmp_path: Path) -> None:
    source = tiny_models.make_model(tmp_path / "source", dtype=torch.float32, tie_word_embeddings=tied)
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).out
    path = tiny_models.make_config(tmp_path, quantized, train__steps=STEPS, optim__warmup_steps=0)
    world_size, nodes, base = layout
    overrides = ["optim.schedule=constant", f"lora.modules_to_save={json.dumps(names)}"]
    one, many = (
        load_config(path, [*overrides, f"run.name=ranks-{n}", f"parallel.base={base}", f"train.micro_batch={12 // n}"])
        for n in (1, world_size)
    )
    run_ranks(1, train_and_get_logits, one)
    logits = torch.from_numpy(run_ranks(world_size, train_and_get_logits, many, nodes=nodes)[0])
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    assert losses(one) == pytest.approx(reference_losses(one, source, quantized, names), rel=1e-5)

    tensors = load_file(run_path(many.run) / "adapter" / "adapter_model.safetensors")
    trained = tensors["base_model.model.model.embed_tokens.weight"]
    before = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert (trained - before).abs().max() > 1e-3

    plain = dequantized_model(source, quantized)
    adapted = peft.PeftModel.from_pretrained(plain, run_path(many.run) / "adapter").eval()
    with torch.no_grad():
        expected = adapted(input_ids=PROMPT, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_an_unknown_module_is_refused(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    path = tiny_models.make_config(tmp_path, tiny_llama_nf4)
    with pytest.raises(UserError, match=r"lora\.modules_to_save: q_proj is no module .* choose from embed_tokens, "):
        set_up_run(load_config(path, ["lora.modules_to_save=[q_proj]"]), read_rank_info({}))


def test_a_model_without_experts_has_none_to_adapt(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    path = tiny_models.make_config(tmp_path, tiny_llama_nf4)
    with pytest.raises(UserError, match=r"lora\.experts: .* has no experts in 4 bit"):
        set_up_run(load_config(path, ["lora.experts=true"]), read_rank_info({}))


def test_tokens_that_the_embedding_has_no_rows_for(tmp_path: Path) -> None:
    base = tiny_models.make_model(tmp_path / "model", vocab_size=250)  # the tokenizer has 310 tokens
    path = tiny_models.make_config(tmp_path, base)
    with pytest.raises(UserError, match=r"the data's tokens go up to number \d+ and the embedding has 250 rows; name"):
        set_up_run(load_config(path), read_rank_info({}))
