"""If this fails, tokens that are new to a model are trained otherwise than by PEFT, or lost on the way to a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_dist.adapters.attach import init_lora_weight, seed_from_name
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.inference.eval_loss import compute_eval_loss
from qlora_dist.inference.inference_commands import ModelOptions, PromptOptions, run_generate
from qlora_dist.inference.generate import SamplingOptions
from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.named_adapter import parse_named_adapters
from qlora_dist.merge.merge_folder import merge_folder
from qlora_dist.merge.merge_plan import MergeFormat, MergeOptions
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.new_token_rows import folder_rows
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.run_training import run_training
from rich.console import Console
from tests.helpers import tiny_models
from tests.helpers.architectures import dequantized_model
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import adapter_difference, losses, plain_losses

STEPS = 4
NEW = ["<tool>", "</tool>"]
PREFIX = "base_model.model."
PROMPT = torch.cat([torch.arange(3, 40), torch.tensor([305, 306, 5])]).view(1, -1)


def write_config(folder: Path, base: Path, **settings: Any) -> Path:
    """Write a configuration whose data contain the new tokens."""
    path = tiny_models.make_config(folder, base, train__steps=STEPS, optim__warmup_steps=0, **settings)
    for name in ("train.jsonl", "eval.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("hello", "<tool>alpha").replace("world", "</tool>"))
    return path


def resolve(path: Path, name: str, *overrides: str, ranks: int = 1) -> Config:
    batch = f"train.micro_batch={12 // ranks}"
    return load_config(
        path, [f"run.name={name}", batch, f"model.add_tokens={json.dumps(NEW)}", "optim.schedule=constant", *overrides]
    )


def make_bases(folder: Path, **settings: Any) -> tuple[Path, Path]:
    """Save a model in fp32, whose tokenizer has 305 tokens, and the same in 4 bit."""
    source = tiny_models.make_model(folder / "source", dtype=torch.float32, **settings)
    return source, quantize_folder(source, folder / "nf4", QuantizeOptions()).out


def adapter_tensors(config: Config) -> dict[str, torch.Tensor]:
    return load_file(run_path(config.run) / "adapter" / "adapter_model.safetensors")


def eval_losses(config: Config) -> list[float]:
    rows = [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


def peft_reference(config: Config, source: Path, quantized: Path) -> list[float]:
    """Repeat the run by PEFT itself on the resized model, with the run's values before training."""
    setup = set_up_run(config, read_rank_info({}))
    model = dequantized_model(source, quantized)
    model.resize_token_embeddings(setup.model.config.vocab_size, mean_resizing=False)
    folder = ModelFolder(quantized)
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight, old = model.get_parameter(name), folder.shape("model.embed_tokens.weight")[0]
            if name in dict(model.named_parameters()):  # a tied head follows
                generator = torch.Generator().manual_seed(seed_from_name(config.train.seed, name))
                ids = range(old, len(weight))
                weight[old:] = folder_rows(folder, name, ids, generator, torch.device("cpu"))
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=setup.adapter.target_modules,
        trainable_token_indices=setup.adapter.trainable_token_indices,
    )
    adapted = peft.get_peft_model(model, lora).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(init_lora_weight(name.removeprefix(PREFIX), parameter.shape, 0))
    return plain_losses(adapted, config, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "vocabulary"), [(False, 305), (True, 305), (False, 320)])
def test_from_training_to_a_merged_model(tied: bool, vocabulary: int, tmp_path: Path) -> None:
    """With 320 rows, the new tokens take spare rows of the embedding."""
    source, quantized = make_bases(tmp_path, vocab_size=vocabulary, tie_word_embeddings=tied)
    path = write_config(tmp_path, quantized)
    one, two = resolve(path, "one"), resolve(path, "two", ranks=2)
    run_ranks(1, run_training, one)
    run_ranks(2, run_training, two)
    expected = peft_reference(one, source, quantized)
    assert losses(one) == pytest.approx(expected, rel=1e-5)
    assert losses(two) == pytest.approx(expected, rel=1e-5)
    for name, overrides in {
        "zero3": ["parallel.engine=zero3"],
        "zero2": ["parallel.engine=zero2", "parallel.base=replicate"],
        "paged": ["parallel.base=paged", "parallel.resident_bytes=0"],
    }.items():
        other = resolve(path, name, *overrides, ranks=2)
        run_ranks(2, run_training, other)
        assert losses(other) == pytest.approx(expected, rel=1e-5), name
        assert adapter_difference(adapter_tensors(one), adapter_tensors(other)) < 1e-4

    out = run_path(two.run) / "adapter"
    rows = {key: tensor for key, tensor in adapter_tensors(two).items() if "lora_" not in key}
    modules = ["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"]
    assert sorted(rows) == [f"{PREFIX}{module}.token_adapter.trainable_tokens_delta" for module in modules]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(NEW) == [305, 306]

    check_peft(out, source, quantized, max(vocabulary, len(tokenizer)))
    check_merged(out, tmp_path / "merged", source, "dequantized", rows)
    check_inference(two, eval_losses(two)[-1], quantized)


def check_peft(out: Path, source: Path, quantized: Path, vocabulary: int) -> None:
    """Compare the logits of this package with those of PEFT on the resized model."""
    plain = dequantized_model(source, quantized)
    plain.resize_token_embeddings(vocabulary, mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(plain, out).eval()
    adapters = parse_named_adapters([str(out)])
    with torch.no_grad():
        expected = adapted(input_ids=PROMPT, use_cache=False).logits
        config = inference_config(str(quantized), None, None, ["train.device=cpu", "model.compute_dtype=fp32"])
        with open_inference_model(config, adapters) as loaded:
            logits = loaded.model(input_ids=PROMPT, use_cache=False).logits
    assert logits.shape[-1] == vocabulary
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def check_merged(
    adapter: Path, merged: Path, base: Path, into: MergeFormat, rows: dict[str, torch.Tensor]
) -> transformers.PreTrainedModel:
    """Merge, open the result with transformers, and compare the rows of the new tokens with the trained ones."""
    given = None if into == "dequantized" else base
    merge_folder(given, adapter, merged, MergeOptions(into=into, dtype="fp32"), Console(quiet=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.convert_tokens_to_ids(NEW)
    assert tokenizer("x<tool>y")["input_ids"].count(ids[0]) == 1
    before = load_file(base / "model.safetensors")
    for key, trained in rows.items():
        name = key.removeprefix(PREFIX).replace(".token_adapter.trainable_tokens_delta", ".weight")
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight[ids], trained[-2:])
        assert torch.equal(weight[:305], before[name][:305])
        assert len(weight) == model.config.vocab_size == max(len(before[name]), 307)
        assert (trained[-1] - trained[-2]).abs().max() > 1e-3, "both rows were trained"
    return model


def check_inference(config: Config, loss: float, quantized: Path) -> None:
    """Compare the held-out loss with the one that training printed, with the run's folder and without."""
    out = run_path(config.run) / "adapter"
    adapters = parse_named_adapters([f"tools={out}"])
    settings = ["train.device=cpu", "model.compute_dtype=fp32", "data.seq_len=96", f"data.cache={config.data.cache}"]
    for folder in (out, None):
        held_out = inference_config(str(quantized), folder, str(config.data.eval), settings)
        for ranks in (1, 2):
            found = run_ranks(ranks, _held_out_losses, held_out, adapters)[0]
            assert found[0] == pytest.approx(loss, rel=1e-5)
            assert found[1] != pytest.approx(loss, rel=1e-3), "the base alone"


def _held_out_losses(config: Config, adapters: Any) -> list[float]:
    with open_inference_model(config, adapters) as loaded:
        found = []
        for name in ("tools", None, "tools"):
            loaded.set_adapter(name)
            found.append(compute_eval_loss(loaded, str(config.data.eval)).loss)
    assert found[0] == found[2]
    return found
