"""FSDP2 (`fully_shard`) on the model of transformers, PEFT and bitsandbytes, without accelerate."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from marks import (
    IGNORED,
    WORLD_SIZE,
    mark_and_restart_peak,
    padded_batch,
    static_bytes,
    steps,
    wait_for_turn,
    write_mark,
)
from peft_model import peft_model, warm_up_imports
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    warm_up_imports(args.base)
    mark_and_restart_peak("imported")
    model = peft_model(args.base)
    write_mark("model")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD_SIZE,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    mark_and_restart_peak("loaded")
    for step in steps():
        wait_for_turn()
        batch = padded_batch(step)
        number = sum(token != IGNORED for row in step["rows"] for token in row["labels"][1:])
        loss = train(model, batch, number)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        write_mark("step")
        write_mark("loss", loss=loss)
        del batch
    write_mark("end", static_bytes=static_bytes())
    write_mark("engine", engine=type(model).__name__)
    dist.destroy_process_group()


def train(model: Any, batch: dict[str, torch.Tensor], number: int) -> float:
    """Compute gradients, and return the mean loss over all ranks' trained tokens.

    FSDP2 averages gradients over ranks, so the loss is scaled by their number.
    """
    loss = model(**batch, num_items_in_batch=number).loss
    (loss * WORLD_SIZE).backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()


if __name__ == "__main__":
    main()
