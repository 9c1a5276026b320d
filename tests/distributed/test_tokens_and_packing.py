"""If this fails, the loss depends on how rows are distributed to ranks, or a packed sequence sees its neighbour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.runs.run_dir import run_path
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks


def metrics(config: Config, world_size: int) -> list[dict[str, float]]:
    run_ranks(world_size, run_training, config)
    return [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()][1:]


def test_one_rank_with_four_sequences_is_four_ranks_with_one(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    """The sequences differ so much in length that a mean of the ranks' means would be wrong."""
    path = tiny_models.make_config(
        tmp_path, tiny_llama_nf4, data__packing="none", data__seq_len=256, train__steps=6, train__global_batch=4
    )
    tiny_models.make_data(tmp_path / "train.jsonl", 40, words=(1, 60))
    one = metrics(load_config(path, ["train.micro_batch=4", "run.name=one"]), 1)
    four = metrics(load_config(path, ["train.micro_batch=1", "run.name=four"]), 4)
    two = metrics(load_config(path, ["train.micro_batch=1", "run.name=two"]), 2)
    assert len({row["trained_tokens"] for row in one}) > 1
    for key in ("loss", "grad_norm", "tokens", "trained_tokens"):
        assert [row[key] for row in four] == pytest.approx([row[key] for row in one], rel=1e-5)
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["Llama", "Mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "flex", "eager"])
def test_packed_and_unpacked_sequences_have_one_loss(arch: str, attention: str, tmp_path: Path) -> None:
    """One step holds all data, so that both runs train on the same sequences. Gradients are compared too."""
    base = tiny_models.make_model(tmp_path / "model", arch, **({"sliding_window": 32} if arch == "Mistral" else {}))
    path = tiny_models.make_config(tmp_path, base, train__steps=2, data__seq_len=256, model__attention=attention)
    from qlora_dist.runtime.environment import read_rank_info
    from qlora_dist.train.run_setup import set_up_run

    rows = {}
    for packing in ("best-fit", "none"):
        config = load_config(path, [f"data.packing={packing}", "train.global_batch=1"])
        rows[packing] = int(set_up_run(config, read_rank_info({})).loader.rows_per_epoch)
    assert rows["best-fit"] * 3 < rows["none"]
    packed, unpacked = (
        metrics(
            load_config(
                path,
                [f"data.packing={p}", f"train.global_batch={rows[p]}", f"train.micro_batch={rows[p]}", f"run.name={p}"],
            ),
            1,
        )
        for p in ("best-fit", "none")
    )
    for key in ("loss", "grad_norm", "tokens", "trained_tokens"):
        assert [row[key] for row in packed] == pytest.approx([row[key] for row in unpacked], rel=1e-5)
