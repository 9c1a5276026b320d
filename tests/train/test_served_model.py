"""If this fails, a trained model gets another prompt format where it is served, or never stops."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from rich.console import Console

from qlora_dist.config.config_file import load_config
from qlora_dist.merge.merge_folder import merge_folder
from qlora_dist.merge.merge_plan import MergeOptions
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models

QUESTION = [{"role": "user", "content": "hello"}]
MESSAGES = [*QUESTION, {"role": "assistant", "content": "world"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a base model whose texts end with `<pad>`, and of a run that trained it on ChatML."""
    folder = tmp_path_factory.mktemp("served")
    tiny_models.make_model(folder / "base", num_hidden_layers=1, eos_token_id=0, pad_token_id=0)
    tokenizer = tiny_models.make_tokenizer(None)
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(folder / "base")
    assert json.loads((folder / "base" / "generation_config.json").read_text())["eos_token_id"] == 0
    path = tiny_models.make_config(
        folder,
        folder / "base",
        data__chat_template="chatml",
        data__eval=None,
        data__seq_len=64,
        lora__r=16,
        lora__alpha=64,
        train__steps=40,
        train__global_batch=1,
    )
    (folder / "train.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    run_training(load_config(path))
    return folder


@pytest.mark.slow
def test_a_run_with_its_own_template_can_be_served(run: Path) -> None:
    adapter = run / "runs" / "run" / "adapter"
    merge_folder(None, adapter, run / "merged", MergeOptions(), Console(quiet=True))
    for folder in (adapter, run / "merged"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        trained = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"
        assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == trained
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<pad>")
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 0]

    base = transformers.AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, adapter)
    merged = transformers.AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for model in (adapted, merged):
        model.eval()
    answer = merged.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "world<|im_end|>"
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**prompt).logits, merged(**prompt).logits, rtol=0.1, atol=0.5
        )  # the merged weights are bf16
