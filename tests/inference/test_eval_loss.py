"""If this fails, the held-out loss of an adapter is not the one that its training printed, or depends on the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_dist.config.config_file import load_config
from qlora_dist.inference.eval_loss import EvalLoss, compute_eval_loss
from qlora_dist.inference.inference_config import inference_config
from qlora_dist.inference.inference_model import open_inference_model
from qlora_dist.inference.named_adapter import common_base, parse_named_adapters
from qlora_dist.model.meta_model import build_meta_model
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.runs.run_dir import run_path
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.architectures import make_architecture
from tests.helpers.ranks import run_ranks


def eval_losses_by_adapter(given: list[str], data: str, overrides: tuple[str, ...] = ()) -> dict[str, EvalLoss]:
    """Compute the loss of each adapter, and of the base."""
    adapters = parse_named_adapters(given)
    config = inference_config(common_base(adapters), adapters[0].path, data, ("train.device=cpu", *overrides))
    losses: dict[str, EvalLoss] = {}
    with open_inference_model(config, adapters) as loaded:
        for name in (*loaded.adapter_names, None, loaded.adapter_names[0]):
            loaded.set_adapter(name)
            result = compute_eval_loss(loaded, data)
            key = name or "base"
            assert losses.setdefault(key, result) == result  # a return to an adapter changes nothing
    return losses


def eval_losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


def test_the_loss_is_the_one_that_train_printed(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    """Two adapters differ in rank, targets and whole modules, and are loaded together, on one rank and on two."""
    path = tiny_models.make_config(tmp_path, tiny_llama_nf4, train__steps=3, train__micro_batch=2)
    one = load_config(path, ["run.name=one", "lora.modules_to_save=[lm_head, norm, embed_tokens]"])
    two = load_config(path, ["run.name=two", "lora.r=3", "lora.targets=[q_proj, down_proj]", "lora.dora=true"])
    data = str(one.data.eval)
    for config in (one, two):
        run_ranks(1, run_training, config)
    given = [str(run_path(one.run) / "adapter"), f"second={run_path(two.run) / 'adapter'}"]
    (alone,) = run_ranks(1, eval_losses_by_adapter, given, data)
    first, last = eval_losses(run_path(one.run))
    assert alone["one"].loss == pytest.approx(last, rel=1e-6)
    assert alone["second"].loss == pytest.approx(eval_losses(run_path(two.run))[-1], rel=1e-6)
    assert alone["base"].loss == pytest.approx(first, rel=1e-6)
    assert abs(last - first) > 1e-3
    for rank in run_ranks(2, eval_losses_by_adapter, given, data):
        for name, expected in alone.items():
            assert rank[name].loss == pytest.approx(expected.loss, rel=1e-6)
            assert rank[name].tokens == expected.tokens > 0


def test_a_16_bit_base_is_kept_without_quantize(tiny_llama: Path) -> None:
    config = inference_config(str(tiny_llama))
    folder = ModelFolder(config.model.base)
    assert build_meta_model(folder, config.model).matrices
    assert not build_meta_model(folder, config.model, quantize=False).matrices


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_bases_in_16_bit_are_quantized_as_in_training(kind: str, tmp_path: Path) -> None:
    """The first adapter trains a tied embedding whole, or experts. The second one does neither."""
    settings = ["lora.modules_to_save=[embed_tokens]"] if kind == "tied" else ["lora.experts=true"]
    if kind == "tied":
        base = tiny_models.make_model(tmp_path / "source", tie_word_embeddings=True)
    else:
        base = make_architecture(tmp_path / "source", "Mixtral")
    path = tiny_models.make_config(tmp_path, base, train__steps=2, train__micro_batch=2)
    one, two = load_config(path, settings), load_config(path, ["run.name=plain", "lora.r=2"])
    for config in (one, two):
        run_ranks(1, run_training, config)
    given = [str(run_path(config.run) / "adapter") for config in (one, two)]
    for rank in run_ranks(2, eval_losses_by_adapter, given, str(one.data.eval)):
        for config in (one, two):
            expected = eval_losses(run_path(config.run))
            assert rank[config.run.name].loss == pytest.approx(expected[-1], rel=1e-6)
            assert rank["base"].loss == pytest.approx(expected[0], rel=1e-6)
