"""If this fails, an adapter without effect or with invalid values is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_dist.adapters.export import export_adapter
from qlora_dist.adapters.saved_adapter import find_invalid_values
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.parallel.loaded_model import load_model, shard_model
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks


def export_untrained(config: Config, out: Path) -> str:
    ranks = read_rank_info()
    setup = set_up_run(config, ranks)
    with process_group(ranks, setup.device):
        load_model(shard_model(setup.model, config, ranks, setup.device), setup.folder)
        try:
            export_adapter(setup.model, setup.adapter, out)
        except UserError as error:
            return str(error)
    return "exported"


def test_an_untrained_adapter_is_not_exported(tiny_llama_nf4: Path, tmp_path: Path) -> None:
    config = load_config(tiny_models.make_config(tmp_path, tiny_llama_nf4))
    (sentence,) = run_ranks(1, export_untrained, config, tmp_path / "adapter")
    assert sentence == (
        f"{tmp_path / 'adapter'}: no adapter is written, because every B is zero, so it changes nothing; train longer, "
        "or lower optim.lr"
    )
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    tensors = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2)}
    assert find_invalid_values(tensors.items()) is None
    tensors["x.lora_A.weight"][1, 1] = value
    assert find_invalid_values(tensors.items()) == "x.lora_A.weight holds values that are not finite"
