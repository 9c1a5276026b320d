"""If this fails, a setting that the engine does not support fails in the middle of a run, or is ignored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qlora_dist.cli.main import main
from qlora_dist.config.config_file import load_config
from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import set_up_model, set_up_run
from tests.helpers import tiny_models


@pytest.fixture
def config(tmp_path: Path, tiny_llama_nf4: Path) -> Path:
    return tiny_models.make_config(tmp_path, tiny_llama_nf4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.offload=cpu", "corrupts moved states of paged-adamw-32bit.*paging.to"),
        ("optim.name=paged-adamw-8bit optim.offload=nvme", "corrupts moved states of paged-adamw-8bit"),
        ("optim.name=zero-adamw optim.offload=nvme paging.page_bytes=1MiB", "keeps tensors below 1 MiB in memory"),
        ("parallel.engine=fsdp2 optim.name=zero-adamw", "zero-adamw needs engine zero3"),
        ("parallel.base=paged", "engine zero3 has no pages"),
        ("train.compile=true", "cannot be compiled"),
        ("parallel.engine=zero2", "keeps the whole base on each rank's device"),
    ],
)
def test_unsupported_settings_are_refused(override: str, message: str, config: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_config(config, ["parallel.engine=zero3", *override.split()])


def test_a_missing_deepspeed_is_reported(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"not installed; pip install 'qlora-dist\[zero\]'"):
        set_up_run(load_config(config, ["parallel.engine=zero3"]), read_rank_info({}))
    set_up_run(load_config(config, []), read_rank_info({}))  # FSDP2 needs no DeepSpeed


def export(config: Path, *overrides: str) -> None:
    sys.argv = ["qlora-dist", "export-ds-config", str(config), *overrides]
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (None, 0)


def test_export_ds_config(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    overrides = ["parallel.engine=zero3", "parallel.prefetch=2"]
    overrides += ["optim.name=zero-adamw", "optim.offload=nvme", "paging.dir=/local", "paging.page_bytes=16MiB"]
    export(config, *overrides)
    tree = json.loads(capsys.readouterr().out)
    _, model, _ = set_up_model(load_config(config, overrides))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    zero = tree["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == 2 * layer
    assert zero["stage3_max_live_parameters"] == 3 * layer
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    # DeepSpeed accepts these names, and its defaults differ
    parsed, defaults = DeepSpeedZeroConfig(**zero), DeepSpeedZeroConfig(stage=3)
    assert (parsed.offload_optimizer.device, str(parsed.offload_optimizer.nvme_path)) == ("nvme", "/local")
    assert parsed.sub_group_size == 2**21 != defaults.sub_group_size
    for name in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size"):
        assert getattr(parsed, name) == zero[f"stage3_{name}"] != getattr(defaults, name)
