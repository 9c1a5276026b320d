"""The configuration of inference: the run's that made the adapter, as far as it says what is computed."""

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
    """What to load and how, and how data are read.

    `model` and `data` are those of the run that made the adapter (`runs/NAME/config.yaml`), so that a loss is the one
    that `train` printed; an adapter from elsewhere has the defaults. The engine is FSDP2. A node holds a copy of base
    and adapters, unless the run's nodes shared one.

    Args:
        base: folder of the model.
        adapter: the folder of the first adapter.
        data: the held-out file.
        overrides: `section.key=value` each.

    Raises:
        UserError: an override, or the run's configuration, is not valid.
    """
    run = _training_config(adapter)
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
        raise UserError("--set parallel: only engine fsdp2 and a base that is not paged generate and evaluate")
    return config


def _training_config(adapter: Path | None) -> Config | None:
    """The run that left this folder; None: it is not in a run's."""
    if adapter is None or adapter.resolve().name != "adapter":
        return None
    path = adapter.resolve().parent / "config.yaml"
    return load_config(path) if path.exists() else None
