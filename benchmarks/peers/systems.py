"""The compared systems, each with a script of this folder, an environment and numbers of ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class System(NamedTuple):
    script: str
    requirements: str | None
    """Name of a file in this folder without .txt; None means this program's environment."""
    ranks: tuple[int, ...]
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    default: bool = True
    quantizes: bool = False
    """True if it gets --base unchanged, also in 16 bit."""
    note: str = ""
    """Note on its figures."""

    @property
    def recomputes(self) -> bool:
        """True if it recomputes layers in backward."""
        return self.arguments[-2:] != KEPT

    def versions(self) -> list[str]:
        """Return the versions in its environment, without torch's, which is equal for all."""
        text = (HERE / f"{self.requirements}.txt").read_text() if self.requirements else ""
        return [f"{name} {number}" for name, number in re.findall(r"^(\w+)==(\S+)", text, re.M) if name in NAMED]


NAMED = ("transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "torchtune", "torchao")
KEPT = ("--checkpointing", "none")
SYSTEMS = {
    "ours": System("qlora_dist_trainer.py", None, (1, 2)),
    "ours, compiled": System("qlora_dist_trainer.py", None, (1, 2), ("--compiled",), default=False),
    "ours, nothing recomputed": System("qlora_dist_trainer.py", None, (1, 2), KEPT),
    "ours, base on each rank": System("qlora_dist_trainer.py", None, (2,), ("--parallel-base", "replicate")),
    "ours, base on each rank, nothing recomputed": System(
        "qlora_dist_trainer.py", None, (2,), ("--parallel-base", "replicate", *KEPT)
    ),
    "transformers": System("trainer.py", "transformers", (1,)),
    "transformers, nothing recomputed": System("trainer.py", "transformers", (1,), KEPT),
    "accelerate FSDP1": System("trainer.py", "transformers", (2,), ("--fsdp", "1")),
    "accelerate FSDP2": System("trainer.py", "transformers", (2,), ("--fsdp", "2")),
    "fully_shard": System("fully_shard.py", "transformers", (2,), note="each rank holds all scales"),
    "DeepSpeed ZeRO-3": System(
        "trainer.py",
        "deepspeed",
        (2,),
        ("--zero3",),
        (("DS_ACCELERATOR", "cpu"),),
        note="with transformers' Trainer, without shared memory, so that all bytes are counted",
    ),
    "torchtune": System(
        "torchtune_nf4.py",
        "torchtune",
        (2,),
        quantizes=True,
        note="`lora_finetune_distributed` without queries of a GPU's memory; it quantizes the base itself. Adapters, "
        "their gradients and moments are in bf16; the others use fp32",
    ),
}
