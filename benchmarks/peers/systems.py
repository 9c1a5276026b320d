"""Who is compared: a script of this folder each, its environment and its numbers of ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


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
    note: str = ""
    """What else is to be known of its figures."""

    @property
    def recomputes(self) -> bool:
        """Its layers in backward."""
        return self.arguments[-2:] != KEPT

    def versions(self) -> list[str]:
        """Of what its environment has installed, but for torch, which is the same for all."""
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
    "fully_shard": System("fully_shard.py", "transformers", (2,), note="the scales are whole on each rank"),
    "DeepSpeed ZeRO-3": System(
        "trainer.py",
        "deepspeed",
        (2,),
        ("--zero3",),
        (("DS_ACCELERATOR", "cpu"),),
        note="through transformers' Trainer, without its shared memory, so that all bytes are counted",
    ),
    "torchtune": System(
        "torchtune_nf4.py",
        "torchtune",
        (2,),
        quantizes=True,
        note="`lora_finetune_distributed`, without what asks a GPU for its memory; it quantizes itself. Adapters, "
        "their gradients and moments are in bf16, where the others have fp32",
    ),
}
