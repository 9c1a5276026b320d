"""Collectives for small values, sent as JSON so that nothing is unpickled."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def all_gather_json(value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks. Call it on all ranks."""
    content = json.dumps(value).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(content)]))
    largest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(content.ljust(largest)), dtype=torch.uint8)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [json.loads(bytes(part.numpy())) for part in gathered]


def broadcast_json(value: Any) -> Any:
    """Return rank 0's value. Call it on all ranks; the values of the other ranks are ignored."""
    content = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    size = torch.tensor([len(content)])
    dist.broadcast(size, src=0)
    buffer = torch.frombuffer(bytearray(content.ljust(int(size))), dtype=torch.uint8)
    dist.broadcast(buffer, src=0)
    return json.loads(bytes(buffer.numpy()))
