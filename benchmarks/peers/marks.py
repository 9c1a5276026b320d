"""The marks that every system's script writes in any environment: times, the kernel's memory counters, bytes sent.

A mark is a line of JSON in $PEERS_FOLDER/RANK.jsonl. This file needs only Python and torch.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import torch

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
FOLDER = Path(os.environ.get("PEERS_FOLDER", "."))
MATERIAL = Path(os.environ.get("PEERS_MATERIAL", "."))
IGNORED = -100


def write_mark(event: str, **values: Any) -> None:
    """Write a mark with the machine's monotonic time, VmRSS, VmHWM, and the bytes that the loopback has sent."""
    status = Path("/proc/self/status").read_text()
    memory = {name: 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmRSS", "VmHWM")}  # type: ignore[index]
    (loopback,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    sent = int(loopback.partition(":")[2].split()[8])
    line = {"what": event, "time": time.monotonic(), "sent": sent} | memory | values
    with (FOLDER / f"{RANK}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def mark_and_restart_peak(what: str, **values: Any) -> None:
    """Write a mark and restart VmHWM, so that the next mark has the peak since this one."""
    gc.collect()
    write_mark(what, **values)
    Path("/proc/self/clear_refs").write_text("5")


def wait_for_turn() -> None:
    """Wait until it is this system's turn (peer_process.py). Called on every rank before a step."""
    write_mark("ready")
    with (FOLDER / f"{RANK}.turn").open("rb") as pipe:
        pipe.read(1)
    write_mark("begin")


def static_bytes() -> int:
    """Return the bytes of all live tensors, each storage once. Between two steps these are the bytes that stay."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            try:
                storage = item.untyped_storage()
                if storage.data_ptr():
                    storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # wrappers around other tensors have none
                continue
    return sum(storages.values())


@functools.cache
def steps() -> list[dict[str, Any]]:
    """Return the steps that workload.py has written."""
    return json.loads((MATERIAL / "steps.json").read_text())


def padded_batch(step: dict[str, Any], rank: int = RANK, world_size: int = WORLD_SIZE) -> dict[str, torch.Tensor]:
    """Return a rank's sequences, one per row, padded: input_ids, attention_mask, labels (not shifted)."""
    rows = step["rows"][rank::world_size]
    shape = len(rows), max(len(row["ids"]) for row in rows)
    ids, mask, labels = (torch.full(shape, value) for value in (0, 0, IGNORED))
    for index, row in enumerate(rows):
        length = len(row["ids"])
        ids[index, :length], mask[index, :length] = torch.tensor(row["ids"]), 1
        labels[index, :length] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
