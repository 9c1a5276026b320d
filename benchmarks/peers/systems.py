"""Who is compared: a script of this folder each, its environment and its numbers of ranks."""

from __future__ import annotations

from typing import NamedTuple


class System(NamedTuple):
    script: str
    requirements: str | None
    """File of this folder without .txt; None: the environment that runs this program."""
    ranks: tuple[int, ...]
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    default: bool = True
    quantizes: bool = False
    """It is given --base as it is, also in 16 bit."""


SYSTEMS = {
    "ours": System("ours.py", None, (1, 2)),
    "ours, compiled": System("ours.py", None, (1, 2), ("--compiled",)),
    "ours, base on each rank": System("ours.py", None, (2,), ("--parallel-base", "replicate")),
    "transformers": System("trainer.py", "transformers", (1,)),
    "accelerate FSDP1": System("trainer.py", "transformers", (2,), ("--fsdp", "1")),
    "accelerate FSDP2": System("trainer.py", "transformers", (2,), ("--fsdp", "2")),
    "fully_shard": System("fully_shard.py", "transformers", (2,)),
    "DeepSpeed ZeRO-3": System("trainer.py", "deepspeed", (2,), ("--zero3",), (("DS_ACCELERATOR", "cpu"),)),
    "torchtune": System("torchtune_nf4.py", "torchtune", (2,), quantizes=True),
}
