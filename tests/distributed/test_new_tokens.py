"""If this fails, tokens that are new to a model are trained otherwise than by PEFT, or lost on the way to a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from qlora_dist.adapters.attach import init_lora_weight, seed_from_name
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.inference.eval_loss import compute_eval_loss
from qlora_dist.inference.generate import SamplingOptions
from qlora_dist.inference.inference_commands import ModelOptions, PromptOptions, run_generate
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
from tests.helpers import tiny_models
from tests.helpers.architectures import dequantized_model
from tests.helpers.multimodal_models import MULTIMODAL, dequantized_multimodal, make_multimodal, open_multimodal
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import PROMPT as TRAIN_PROMPT
from tests.helpers.train_helpers import adapter_difference, losses, plain_losses, train_and_get_logits

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
    """Compare this package's logits with PEFT's on the resized model."""
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


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    _, quantized = make_bases(tmp_path, vocab_size=300)  # the tokenizer has five tokens more
    path = write_config(tmp_path, quantized)
    whole = resolve(path, "whole")
    run_ranks(1, run_training, whole)
    run_ranks(2, run_training, resolve(path, "parts", "train.steps=2", ranks=2))
    for engine, ranks in (("zero3", 3), ("fsdp2", 1)):
        steps = STEPS - 1 if ranks == 3 else STEPS
        parts = resolve(path, "parts", f"train.steps={steps}", f"parallel.engine={engine}", ranks=ranks)
        run_ranks(ranks, run_training, parts)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert adapter_difference(adapter_tensors(whole), adapter_tensors(parts)) < 1e-4
    assert adapter_tensors(parts)[f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"].shape == (7, 64)
    with pytest.raises(RuntimeError, match=r"was made with lora\.trainable_tokens: \[\], not"):
        run_ranks(1, run_training, resolve(path, "parts", "train.steps=5", "lora.trainable_tokens=[alpha]"))


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "names"), [(False, ["embed_tokens", "lm_head"]), (True, ["embed_tokens"])])
def test_modules_trained_whole(tied: bool, names: list[str], tmp_path: Path) -> None:
    """The whole embedding and head are trained, and have the added rows."""
    source, quantized = make_bases(tmp_path, vocab_size=305, tie_word_embeddings=tied)
    path = write_config(tmp_path, quantized)
    whole = f"lora.modules_to_save={json.dumps(names)}"
    one, two = resolve(path, "one", whole), resolve(path, "two", whole, ranks=2)
    rows_only = resolve(path, "rows")
    for config, ranks in ((one, 1), (two, 2), (rows_only, 1)):
        run_ranks(ranks, run_training, config)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(one)[0] == pytest.approx(losses(rows_only)[0], rel=1e-5), "the rows begin with the same values"
    out = run_path(two.run) / "adapter"
    tensors = adapter_tensors(two)
    assert tensors[f"{PREFIX}model.embed_tokens.weight"].shape == (307, 64)
    check_peft(out, source, quantized, 307)
    check_inference(two, eval_losses(two)[-1], quantized)
    merge_folder(None, out, tmp_path / "merged", MergeOptions(dtype="fp32"), Console(quiet=True))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 307
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged.state_dict()[name], tensors[f"{PREFIX}{name}"])


@pytest.mark.slow
def test_an_embedding_in_4_bit(tmp_path: Path) -> None:
    source = tiny_models.make_model(tmp_path / "source", dtype=torch.float32, vocab_size=305)
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions(embeddings="4bit")).out
    config = resolve(write_config(tmp_path, quantized), "run", ranks=2)
    run_ranks(2, run_training, config)
    out = run_path(config.run) / "adapter"
    check_inference(config, eval_losses(config)[-1], quantized)
    with pytest.raises(
        UserError, match=r"trains rows of lm_head, which is quantized, and single rows of it cannot change; merge"
    ):
        merge_folder(None, out, tmp_path / "merged", MergeOptions(into="nf4"), Console(quiet=True))
    assert not (tmp_path / "merged").exists()
    merge_folder(None, out, tmp_path / "merged", MergeOptions(dtype="fp32"), Console(quiet=True))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    trained = adapter_tensors(config)[f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"]
    assert torch.equal(merged.get_output_embeddings().weight[305:], trained)
    held_out = inference_config(str(tmp_path / "merged"), None, str(config.data.eval), ["train.device=cpu"])
    held_out = held_out.model_copy(
        update={
            "data": held_out.data.model_copy(update={"seq_len": 96}),
            "model": held_out.model.model_copy(update={"compute_dtype": "fp32"}),
        }
    )
    with open_inference_model(held_out, quantize=False) as loaded:
        assert compute_eval_loss(loaded, str(config.data.eval)).loss == pytest.approx(eval_losses(config)[-1], rel=1e-4)


@pytest.mark.slow
def test_a_scaled_embedding_and_a_run_that_starts_from_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma's embedding is tied and scaled, and its logits have a cap. Existing tokens are trained too."""
    source, quantized = make_bases(
        tmp_path, arch="Gemma2", tie_word_embeddings=True, vocab_size=310, final_logit_softcapping=3.0
    )
    path = write_config(tmp_path, quantized, data__packing="none")
    reserved = "lora.trainable_tokens=[alpha, <|im_start|>]"
    config = resolve(path, "run", reserved, "train.steps=2", ranks=2)
    run_ranks(2, run_training, config)
    expected = peft_reference(resolve(path, "reference", reserved), source, quantized)
    assert losses(config) == pytest.approx(expected[:2], rel=1e-5)
    out = run_path(config.run) / "adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = sorted(tokenizer.convert_tokens_to_ids(["alpha", "<|im_start|>", *NEW]))
    assert json.loads((out / "adapter_config.json").read_text())["trainable_token_indices"] == {
        "model.embed_tokens": ids
    }
    again = resolve(path, "again", reserved, "train.steps=1", f"lora.from={out}", ranks=2)
    run_ranks(2, run_training, again)
    assert eval_losses(again)[0] == pytest.approx(eval_losses(config)[-1], rel=1e-6)
    with pytest.raises(UserError, match=r"^lora\.from: .* trains other rows of model\.embed_tokens than this run"):
        set_up_run(resolve(path, "other", f"lora.from={out}"), read_rank_info({}))

    options = ModelOptions([f"tools={out}"], overrides=["train.device=cpu"])
    run_generate(options, PromptOptions(prompt="<tool>alpha"), SamplingOptions(max_new_tokens=3, temperature=0.0))
    assert capsys.readouterr().out


@pytest.mark.slow
def test_chat_tokens_on_a_base_model(tmp_path: Path) -> None:
    """The tokens that end a turn are added to a model that has none, and generation stops at them."""
    source = tiny_models.make_model(tmp_path / "source", dtype=torch.float32, vocab_size=320)
    tokenizer = tiny_models.make_tokenizer(None)
    tokenizer_file = json.loads(tokenizer.backend_tokenizer.to_str())
    text = json.dumps(tokenizer_file).replace("<|im_start|>", "<s0>").replace("<|im_end|>", "<s1>")
    (source / "tokenizer.json").write_text(text)
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), eos_token="<s1>")
    plain.save_pretrained(source)
    (source / "chat_template.jinja").unlink(missing_ok=True)
    path = tiny_models.make_config(tmp_path, source, train__steps=1)
    template = "data.chat_template=chatml"
    with pytest.raises(UserError, match=r"the tokenizer has no token <\|im_end\|>, which ends a turn; add it with"):
        set_up_run(load_config(path, [template]), read_rank_info({}))
    config = load_config(path, [template, 'model.add_tokens=["<|im_start|>", "<|im_end|>"]'])
    run_ranks(2, run_training, config)
    trained = transformers.AutoTokenizer.from_pretrained(run_path(config.run) / "adapter")
    assert trained.eos_token == "<|im_end|>" and trained.eos_token_id == 306


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_the_text_of_a_multimodal_model(name: str, tmp_path: Path) -> None:
    """Gemma 3's embedding is tied and scaled, and Mistral 3's is neither."""
    text = {**MULTIMODAL[name]["text_config"], "vocab_size": 305}
    source = make_multimodal(tmp_path / "source", name, text_config=text)
    quantized = quantize_folder(source, tmp_path / "nf4", QuantizeOptions()).out
    config = resolve(write_config(tmp_path, quantized), "run", "train.steps=2", ranks=2)
    logits = torch.from_numpy(run_ranks(2, train_and_get_logits, config)[0])
    out = run_path(config.run) / "adapter"
    plain = dequantized_multimodal(source, quantized, tmp_path / "plain")
    plain.resize_token_embeddings(307, mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(plain, out).eval()
    merge_folder(quantized, out, tmp_path / "merged", MergeOptions(dtype="fp32"), Console(quiet=True))
    merged = open_multimodal(tmp_path / "merged")
    with torch.no_grad():
        expected = adapted(input_ids=TRAIN_PROMPT, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            merged(input_ids=TRAIN_PROMPT, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
        )
