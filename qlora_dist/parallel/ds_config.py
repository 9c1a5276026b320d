"""The DeepSpeed configuration that engine zero3 runs with. No torch."""

from __future__ import annotations

import tempfile
from typing import Any

from qlora_dist.config.schema import Config
from qlora_dist.config.sections import OptimConfig, PagingConfig
from qlora_dist.errors import UserError

_ADAM_STATE_BYTES = 8
"""Both moments of an element, fp32."""


def ds_config(config: Config, layer_elements: int) -> dict[str, Any]:
    """DeepSpeed's JSON, every setting that matters being explicit: its defaults are for models in 16 bit.

    Args:
        config: of the run.
        layer_elements: of the largest decoder layer, bytes of 4-bit weights counted as elements, as DeepSpeed counts.

    Raises:
        UserError: the run's engine is not DeepSpeed's.
    """
    if config.parallel.engine != "zero3":
        raise UserError(f"parallel.engine: {config.parallel.engine} runs without DeepSpeed; give parallel.engine=zero3")
    ahead = config.parallel.prefetch * layer_elements
    optimizer: dict[str, Any] = {}
    if config.optim.name == "zero-adamw":
        optimizer = zero_optimizer_settings(config.optim, config.paging, config.train.device != "cpu")
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "zero_optimization": {
            "stage": 3,
            # parameters of fewer elements would be kept whole on every rank: by default 100,000, and a byte is one
            "stage3_param_persistence_threshold": 0,
            # by default a billion each: then from the second step on every layer stays gathered
            "stage3_max_live_parameters": layer_elements + ahead,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": ahead,
            # the sum of bytes that are no numbers is no copy of them
            "stage3_use_all_reduce_for_fetch_params": False,
            "overlap_comm": True,
            **optimizer,
        },
        # torch's AdamW does what DeepSpeed's would have to be compiled for
        **({"zero_force_ds_cpu_optimizer": False} if optimizer else {}),
    }


def zero_optimizer_settings(config: OptimConfig, paging: PagingConfig, pinned: bool) -> dict[str, Any]:
    """What of `zero_optimization` is the optimizer's.

    Args:
        config: with the name zero-adamw.
        paging: of the run.
        pinned: whether host memory is read and written by a device.
    """
    settings: dict[str, Any] = {"sub_group_size": paging.page_bytes // _ADAM_STATE_BYTES}
    if config.offload != "none":
        settings["offload_optimizer"] = {"device": config.offload, "pin_memory": pinned}
    if config.offload == "nvme":
        settings["offload_optimizer"]["nvme_path"] = paging.dir or tempfile.gettempdir()
    return settings
