"""If this fails, DeepSpeed's optimizer and `PagedAdamW` differ, or a release of DeepSpeed has changed what
`parallel/deepspeed_optimizer.py` uses. In the second case change that file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.config.sections import PagingConfig
from qlora_dist.errors import UserError
from qlora_dist.parallel.deepspeed_optimizer import _make_swap_folder
from qlora_dist.parallel.loaded_model import load_trainable_model, shard_model
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.train_step import make_optimizer
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

PAGED_ADAMW = "paged-adamw-32bit"


class NoCollective(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != "c10d", "this collective would not be counted"
        return func(*args, **(kwargs or {}))


def update(config: Config, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """Return shards and states after two updates with each optimizer, and two more from the first one's state."""
    ranks = read_rank_info()
    results = {}
    with process_group(ranks, torch.device("cpu")):
        saved: Any = None
        for name in names:
            optim = {"name": PAGED_ADAMW} if name == PAGED_ADAMW else {"name": "zero-adamw", "offload": name}
            setup = set_up_run(config.model_copy(update={"optim": config.optim.model_copy(update=optim)}), ranks)
            loaded = load_trainable_model(shard_model(setup.model, setup.config, ranks, setup.device), setup.folder)
            optimizer_state, shards = loaded.optimizer_state, loaded.adapter_shards
            optimizer = make_optimizer(shards, optimizer_state, setup)
            random = torch.Generator().manual_seed(ranks.rank)
            for step in range(4):
                if step == 2:
                    now = [shard.detach().clone() for shard in shards.local], optimizer_state.read()
                    saved = saved or now
                    torch.testing.assert_close(now, saved, rtol=1e-5, atol=1e-8)
                    for shard, values in zip(shards.local, saved[0], strict=True):
                        shard.detach().copy_(values)
                    optimizer_state.write(iter(saved[1]))
                for shard in shards.local:
                    shard.grad = torch.randn(shard.shape, generator=random) if shard.numel() else None
                optimizer.lr = 0.01 * (step + 1)
                with NoCollective():
                    optimizer.step()
            held = optimizer_state.resident_bytes, optimizer_state.paged_bytes
            assert name == PAGED_ADAMW or (
                held[name == "none"] == 0 and sum(held) >= 8 * sum(s.numel() for s in shards.local)
            )
            if name == "nvme":
                assert len(list(Path(config.paging.dir or "").rglob("*exp_avg_sq*.swp"))) >= 3
            flat = [tensor for state in optimizer_state.read() for tensor in state.values()]
            results[name] = [t.numpy().copy() for t in (*(s.detach() for s in shards.local), *flat)]
            optimizer_state.close()
    return results


@pytest.mark.slow
def test_values_and_states_do_not_depend_on_the_place_of_the_states(tmp_path: Path, tiny_llama_nf4: Path) -> None:
    """There are several sub-groups and two learning rates. Three ranks do not divide the matrices."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    places, overrides = ["none", "cpu"], ["paging.page_bytes=16KiB"]
    if AsyncIOBuilder().is_compatible(verbose=False):  # compiles the libaio extension the first time, for minutes
        places, overrides = [*places, "nvme"], ["lora.r=768", "paging.page_bytes=2MiB", f"paging.dir={tmp_path}"]
    overrides += ["parallel.engine=zero3", "optim.weight_decay=0.1", "optim.lora_plus_ratio=4", "train.micro_batch=2"]
    config = load_config(tiny_models.make_config(tmp_path, tiny_llama_nf4, model__compute_dtype="bf16"), overrides)
    for results in run_ranks(3, update, config, [PAGED_ADAMW, *places]):
        for name in places:
            for actual, expected in zip(results[name], results[PAGED_ADAMW], strict=True):
                torch.testing.assert_close(torch.from_numpy(actual), torch.from_numpy(expected), rtol=1e-5, atol=1e-8)
    assert not list(tmp_path.glob("qlora-dist-*"))


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot make a folder for optimizer states there"):
        _make_swap_folder(PagingConfig(dir=str(tmp_path / "nowhere")))


def test_a_missing_compiler_is_reported(tmp_path: Path, tiny_llama_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_models.make_config(tmp_path, tiny_llama_nf4)
    nvme = ["parallel.engine=zero3", "optim.name=zero-adamw", "optim.offload=nvme"]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"nvme needs async_io of DeepSpeed.*paging.to: disk"):
        set_up_run(load_config(config, nvme), read_rank_info({}))
