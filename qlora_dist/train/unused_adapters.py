"""Adapters that take no part in the loss, such as those in an indexer that only chooses what attention sees."""

from __future__ import annotations

import re

from qlora_dist.optim.adapter_shards import AdapterShards
from qlora_dist.train.console import RunConsole

_MAX_NAMES = 8
"""Number of layers named in the line."""


def log_unused_adapters(shards: AdapterShards, console: RunConsole) -> None:
    """Print one line that names the layers whose adapters have no gradient. Called on all ranks after the first step.

    As in PEFT, these adapters stay unchanged and are exported with B = 0.
    """
    names = shards.find_unused_parameters()
    if not names:
        return
    layers = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", re.split(r"\.lora_|\.weight$", name)[0]) for name in names})
    listed = ", ".join(layers[:_MAX_NAMES]) + (" and others" if len(layers) > _MAX_NAMES else "")
    console.say(f"adapters without influence on the loss, which are exported unchanged: {listed}")
