"""If this fails, an adapter with rows of single tokens is read wrongly, or gets a base that lacks its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from qlora_dist.adapters.saved_adapter import read_saved_adapter
from qlora_dist.errors import UserError
from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.named_adapter import parse_named_adapters
from qlora_dist.merge.compose_adapters import compose_adapters
from qlora_dist.merge.compose_options import ComposeOptions, WeightedAdapter
from qlora_dist.merge.merge_folder import merge_folder
from qlora_dist.merge.merge_plan import MergeOptions
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import PROMPT

KEY = "base_model.model.{}.token_adapter.trainable_tokens_delta"
QUIET = Console(quiet=True)


def make_base(folder: Path, **settings: Any) -> Path:
    return tiny_models.make_model(folder, dtype=torch.float32, vocab_size=300, num_hidden_layers=1, **settings)


def make_adapter(base: Path, out: Path, indices: Any, *, rows: int = 300, seed: int = 0, **settings: Any) -> Any:
    """Write an adapter with PEFT itself, on the resized model, with random values, and return PEFT's model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=indices, task_type="CAUSAL_LM", **settings
    )
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(out, save_embedding_layers=False)
    return adapted.eval()


def logits_by_adapter(base: Path, given: list[str]) -> list[torch.Tensor]:
    """Return the logits of each adapter, and of the base alone, without quantization."""
    config = inference_config(str(base), None, None, ["train.device=cpu", "model.compute_dtype=fp32"])
    found = []
    with open_inference_model(config, parse_named_adapters(given), quantize=False) as loaded, torch.no_grad():
        for name in (*loaded.adapter_names, None):
            loaded.set_adapter(name)
            found.append(loaded.model(input_ids=PROMPT, use_cache=False).logits.numpy().copy())
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_pefts_own(tied: bool, tmp_path: Path) -> None:
    """Two adapters train different rows, in any order, one of them of the embedding alone. Both are merged too."""
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    both = [40, 3, 299] if tied else {"embed_tokens": [40, 3, 299], "lm_head": [3, 7]}
    models = [
        make_adapter(base, tmp_path / "one", both),
        make_adapter(base, tmp_path / "two", [5, 3], seed=1),
        transformers.AutoModelForCausalLM.from_pretrained(base).eval(),
    ]
    given = [str(tmp_path / "one"), str(tmp_path / "two")]
    for ranks in (1, 2):
        found = run_ranks(ranks, logits_by_adapter, base, given)[0]
        for logits, model in zip(found, models, strict=True):
            with torch.no_grad():
                expected = model(input_ids=PROMPT, use_cache=False).logits
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
    for adapter, model in zip(given, models[:2], strict=True):
        out = merge_folder(base, Path(adapter), Path(f"{adapter}-merged"), MergeOptions(into="original"), QUIET).out
        merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        assert merged.config.vocab_size == 300
        with torch.no_grad():
            expected = model(input_ids=PROMPT, use_cache=False).logits
            torch.testing.assert_close(merged(input_ids=PROMPT).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_a_tied_head_that_the_folder_stores_is_merged_too(whole: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True} if whole else {}
    make_adapter(base, tmp_path / "adapter", None if whole else [7, 300, 301], rows=302, **settings)
    out = merge_folder(base, tmp_path / "adapter", tmp_path / "out", MergeOptions(into="original"), QUIET).out
    merged, trained = (
        load_file(out / "model-00001-of-00001.safetensors"),
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
    )
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    if whole:
        assert torch.equal(merged["lm_head.weight"], trained["base_model.model.model.embed_tokens.weight"])
    else:
        assert torch.equal(merged["lm_head.weight"][[7, 300, 301]], trained[KEY.format("model.embed_tokens")])
    assert len(merged["lm_head.weight"]) == 302


def refused(function: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        function()
    return str(caught.value)


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    half, gap, whole, rows = (tmp_path / name for name in ("half", "gap", "whole", "rows"))
    make_adapter(base, half, [300, 301], rows=302)  # rows of the head are nowhere
    make_adapter(base, gap, {"embed_tokens": [301], "lm_head": [301]}, rows=302)
    make_adapter(base, whole, None, modules_to_save=["embed_tokens"])
    make_adapter(base, rows, [7])

    def load(*adapters: Path) -> object:
        return logits_by_adapter(base, [str(adapter) for adapter in adapters])

    def merge(adapter: Path) -> object:
        return merge_folder(base, adapter, tmp_path / "out", MergeOptions(into="original"), QUIET)

    for adapter, module in ((half, "lm_head"), (gap, "model.embed_tokens")):
        for function in (load, merge):
            message = refused(lambda function=function, adapter=adapter: function(adapter))
            assert message == (
                f"{adapter}: was trained on a model with 302 tokens, and neither it nor {base} has all of these rows "
                f"of {module}; give the resized model with --base"
            )
    assert not (tmp_path / "out").exists()
    assert refused(lambda: load(whole, rows)) == (
        f"{whole}: trains model.embed_tokens whole, and another adapter trains rows of it; give one of them"
    )
    weighted = [WeightedAdapter("rows", rows), WeightedAdapter("half", half)]
    assert refused(lambda: compose_adapters(weighted, tmp_path / "composed", ComposeOptions())) == (
        f"{rows}: has trained rows of model.embed_tokens, and such rows have no sum; merge the adapters one after the "
        "other"
    )
    tied = make_base(tmp_path / "tied", tie_word_embeddings=True)
    make_adapter(base, tmp_path / "head", {"embed_tokens": [3], "lm_head": [4]})
    assert refused(lambda: logits_by_adapter(tied, [str(tmp_path / "head")])) == (
        f"{tmp_path / 'head'}: trains rows of lm_head, which is no embedding or untied head of {tied}; give the model "
        "that it was trained on"
    )


@pytest.mark.parametrize("indices", [[1, 2, 3], [1, 1], None, {"lm_head": [1, 2]}, ["a", "b"], [-1, 2]])
def test_indices_that_do_not_match_the_rows(indices: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", [7, 8])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": indices}))
    assert refused(lambda: read_saved_adapter(tmp_path / "adapter")) == (
        f"{tmp_path / 'adapter'}: has rows of model.embed_tokens of the shape (2, 64), which trainable_token_indices "
        "in adapter_config.json does not match; export the adapter again"
    )
