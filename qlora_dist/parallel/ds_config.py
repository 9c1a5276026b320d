"""The DeepSpeed configuration of engine zero3. This module does not import torch."""

from __future__ import annotations

import tempfile
from typing import Any

from qlora_dist.config.schema import Config
from qlora_dist.config.sections import OptimConfig, PagingConfig
from qlora_dist.errors import UserError

_ADAM_STATE_BYTES = 8
"""Bytes of an element's `exp_avg` and `exp_avg_sq` in fp32."""


def ds_config(config: Config, layer_elements: int) -> dict[str, Any]:
    """Return DeepSpeed's JSON with every setting that matters, because the defaults are for models in 16 bit.

    `layer_elements` are those that `largest_layer_numel` counts. DeepSpeed counts a byte of 4-bit weights as one.
    """
    if config.parallel.engine != "zero3":
        raise UserError(f"parallel.engine: {config.parallel.engine} runs without DeepSpeed; give parallel.engine=zero3")
    ahead = config.parallel.prefetch * layer_elements
    optimizer: dict[str, Any] = {}
    if config.optim.name == "zero-adamw":
        optimizer = zero_optimizer_settings(config.optim, config.paging, pinned=config.train.device != "cpu")
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "zero_optimization": {
            "stage": 3,
            # smaller parameters would be whole on every rank; the default is 100,000 elements, and a byte counts as one
            "stage3_param_persistence_threshold": 0,
            # the default of both is a billion, with which every layer stays gathered from the second step on
            "stage3_max_live_parameters": layer_elements + ahead,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": ahead,
            # summing the bytes of 4-bit weights would not copy them
            "stage3_use_all_reduce_for_fetch_params": False,
            "overlap_comm": True,
            **optimizer,
        },
        # torch's AdamW needs no compilation, and DeepSpeed's does
        **({"zero_force_ds_cpu_optimizer": False} if optimizer else {}),
    }


def zero_optimizer_settings(config: OptimConfig, paging: PagingConfig, *, pinned: bool) -> dict[str, Any]:
    """Return zero-adamw's settings within `zero_optimization`. Host memory is pinned if a device accesses it."""
    settings: dict[str, Any] = {"sub_group_size": paging.page_bytes // _ADAM_STATE_BYTES}
    if config.offload != "none":
        settings["offload_optimizer"] = {"device": config.offload, "pin_memory": pinned}
    if config.offload == "nvme":
        settings["offload_optimizer"]["nvme_path"] = paging.dir or tempfile.gettempdir()
    return settings
