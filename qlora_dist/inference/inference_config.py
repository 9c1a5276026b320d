"""The configuration of inference, derived from the run that trained the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_dist.config.config_file import config_from_tree, load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError


def inference_config(
    base: str, adapter: Path | None = None, data: str | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Return the configuration that loads a model and reads data for inference.

    The sections `model` and `data` come from the run that trained the adapter (`runs/NAME/config.yaml`), so that a loss
    equals the one that `train` printed. Other adapters get the defaults. The engine is FSDP2. Each node holds a copy of
    base and adapters, unless the run sharded them over all nodes. `adapter` is the folder of the first adapter, and
    `data` the held-out file.
    """
    run = training_config(adapter)
    tree: dict[str, dict[str, Any]] = {
        "model": {"base": base},
        "data": {"train": [data or "-"], "eval": data},
        "parallel": {"adapter": "node"},
    }
    if run is not None:
        tree["model"] = run.model.model_dump() | tree["model"]
        tree["data"] = run.data.model_dump() | tree["data"]
        tree["train"] = {"micro_batch": run.train.micro_batch, "global_batch": run.train.global_batch}
        if run.parallel.base == "world":
            tree["parallel"] = {"base": "world", "adapter": "world"}
    config = config_from_tree(tree, overrides)
    if config.parallel.engine != "fsdp2" or config.parallel.base == "paged":
        raise UserError("--set parallel: generate and eval need engine fsdp2 and a base that is not paged")
    return config


def training_config(adapter: Path | None) -> Config | None:
    """Return the configuration of the run whose folder holds an adapter, or None if there is no such run."""
    if adapter is None or adapter.resolve().name != "adapter":
        return None
    path = adapter.resolve().parent / "config.yaml"
    return load_config(path) if path.exists() else None
