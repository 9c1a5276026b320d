"""If this fails, `merge --data` prints wrong losses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError
from qlora_dist.inference.merge_and_evaluate import LossByModel, merge_and_evaluate
from qlora_dist.merge.merge_plan import MergeOptions
from qlora_dist.runs.run_dir import run_path
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.published_folders import publish_float_folder
from tests.helpers.ranks import run_ranks

QUIET = Console(quiet=True)


def merge_and_read_losses(
    base: Path, adapter: Path, out: Path, into: str, data: str, *, keep_format: bool = False
) -> LossByModel:
    options = MergeOptions(into=into, dtype="fp32", block_size=32, keep_format=keep_format)  # type: ignore[arg-type]
    return merge_and_evaluate(base, adapter, out, options, data, QUIET)[1]


@pytest.mark.slow
def test_losses_before_and_after_the_merge(tiny_llama: Path, tmp_path: Path) -> None:
    """The merge into fp32 loses nothing. The losses of the 4-bit base equal those that `train` printed."""
    config = load_config(tiny_models.make_config(tmp_path, tiny_llama, train__steps=3, model__block_size=32))
    run_ranks(1, run_training, config)
    adapter, data = run_path(config.run) / "adapter", str(config.data.eval)
    rows = [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]
    first, last = (row["eval_loss"] for row in rows if "eval_loss" in row)
    for into, reference in (("dequantized", "4-bit base"), ("original", "16-bit base")):
        (losses,) = run_ranks(1, merge_and_read_losses, tiny_llama, adapter, tmp_path / into, into, data)
        assert losses[f"merged into {into}"].loss == pytest.approx(losses[f"{reference} + adapter"].loss, rel=1e-5)
    assert losses["4-bit base"].loss == pytest.approx(first, rel=1e-4) != losses["16-bit base"].loss
    assert losses["4-bit base + adapter"].loss == pytest.approx(last, rel=1e-4)
    with pytest.raises(UserError, match="is there already"):
        merge_and_read_losses(tiny_llama, adapter, tmp_path / "original", "original", data)


@pytest.mark.slow
def test_losses_of_a_merge_whose_run_kept_a_published_format(tmp_path: Path) -> None:
    """Matrices without an update stay in FP8, and the merged model is measured with them."""
    source = tiny_models.make_model(tmp_path / "source", hidden_size=64, intermediate_size=192)
    publish_float_folder(source, tmp_path / "fp8", "fp8")
    settings = {"model__keep_format": True, "lora__targets": ["q_proj", "v_proj"], "train__steps": 3}
    config = load_config(tiny_models.make_config(tmp_path, tmp_path / "fp8", **settings))
    run_ranks(1, run_training, config)
    adapter, data = run_path(config.run) / "adapter", str(config.data.eval)
    rows = [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]
    first, last = (row["eval_loss"] for row in rows if "eval_loss" in row)
    merge = partial(merge_and_read_losses, data=data, keep_format=True)
    for into in ("dequantized", "original"):
        (losses,) = run_ranks(1, merge, tmp_path / "fp8", adapter, tmp_path / into, into)
        assert losses["base as published"].loss == pytest.approx(first, rel=1e-5)
        assert losses["base as published + adapter"].loss == pytest.approx(last, rel=1e-5)
        assert losses[f"merged into {into}"].loss == pytest.approx(last, rel=1e-5)
