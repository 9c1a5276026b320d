"""The DeepSpeed configuration that engine zero3 runs with. No torch."""

from __future__ import annotations

from typing import Any

from qlora_dist.config import Config
from qlora_dist.errors import UserError


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
        },
    }
