"""What every system's script writes down, in any environment: times, memory as the kernel counts it, bytes sent.

A mark is a line of JSON in $PEERS_FOLDER/RANK.jsonl. Nothing here but Python and torch.
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
    """With the time, which all processes of a machine share, VmRSS, VmHWM, and what the loopback has sent so far."""
    status = Path("/proc/self/status").read_text()
    memory = {name: 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmRSS", "VmHWM")}  # type: ignore[index]
    (loopback,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    sent = int(loopback.partition(":")[2].split()[8])
    line = {"what": event, "time": time.monotonic(), "sent": sent} | memory | values
    with (FOLDER / f"{RANK}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def mark_and_restart_peak(what: str, **values: Any) -> None:
    """VmHWM of the next mark is the most since this one."""
    gc.collect()
    write_mark(what, **values)
    Path("/proc/self/clear_refs").write_text("5")


def wait_for_turn() -> None:
    """Called on every rank before a step: waits until it is this system's turn (peer_process.py)."""
    write_mark("ready")
    with (FOLDER / f"{RANK}.turn").open("rb") as pipe:
        pipe.read(1)
    write_mark("begin")


def static_bytes() -> int:
    """Of all tensors that are alive, each storage once, whoever holds it; between two steps that is what stays."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            try:
                storage = thing.untyped_storage()
                if storage.data_ptr():
                    storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # wrappers around other tensors have none
                continue
    return sum(storages.values())


@functools.cache
def steps() -> list[dict[str, Any]]:
    """What workload.py has written."""
    return json.loads((MATERIAL / "steps.json").read_text())


def padded_batch(step: dict[str, Any], rank: int = RANK, world_size: int = WORLD_SIZE) -> dict[str, torch.Tensor]:
    """A rank's rows, one sequence to a row, padded to the longest: input_ids, attention_mask, labels (not shifted)."""
    rows = step["rows"][rank::world_size]
    shape = len(rows), max(len(row["ids"]) for row in rows)
    ids, mask, labels = (torch.full(shape, value) for value in (0, 0, IGNORED))
    for index, row in enumerate(rows):
        length = len(row["ids"])
        ids[index, :length], mask[index, :length] = torch.tensor(row["ids"]), 1
        labels[index, :length] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
