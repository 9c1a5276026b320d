"""The choice of the engine.

Later code does not depend on it: `shard_view.py` describes this rank's part of each parameter, and every engine gives
the model FSDP2's methods.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qlora_dist.compat.deepspeed import check_async_io, check_deepspeed
from qlora_dist.config.schema import Config
from qlora_dist.parallel import fsdp2, zero2, zero3
from qlora_dist.parallel.mesh import CommCounter, Meshes


def check_engine(config: Config, device: torch.device) -> None:
    """Check that the engine, and the extensions that it compiles, are available, before a model is loaded."""
    if config.parallel.engine == "zero3":
        check_deepspeed()
        if config.optim.offload == "nvme":
            check_async_io(device)


def parallelize(model: PreTrainedModel, meshes: Meshes, config: Config) -> CommCounter:
    """Shard a model in place with the engine that the configuration names; see `parallelize_fsdp2`."""
    engines = {"fsdp2": fsdp2.parallelize_fsdp2, "zero3": zero3.parallelize_zero3, "zero2": zero2.parallelize_zero2}
    return engines[config.parallel.engine](model, meshes, config)
