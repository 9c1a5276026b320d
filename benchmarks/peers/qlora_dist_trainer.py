"""qlora-dist with the code of `train`: setup, sharding, loading, step."""

from __future__ import annotations

import argparse
import os

import torch
from marks import RANK, WORLD_SIZE, mark_and_restart_peak, static_bytes, steps, wait_for_turn, write_mark
from workload import CLIP, configuration

from qlora_dist.data.collate import LABEL_IGNORE_INDEX, Batch
from qlora_dist.model.load_weights import load_weights
from qlora_dist.optim.adamw import PagedAdamW
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.optim.optimizer_state import PagedOptimizerState
from qlora_dist.parallel.fsdp2 import parallelize_fsdp2
from qlora_dist.parallel.mesh import build_meshes
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.run_setup import set_up_run
from qlora_dist.train.train_step import AdapterShards, adapter_shard_numels, train_step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--parallel-base", default="world")
    parser.add_argument("--checkpointing", default="full")
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks = read_rank_info()
    options = {name: getattr(args, name) for name in ("parallel_base", "checkpointing", "compiled")}
    config = configuration(args.base, args.data, args.rows, args.seq_len, args.rows // WORLD_SIZE, **options)
    with process_group(ranks, torch.device("cpu")):
        setup = set_up_run(config, ranks)
        mark_and_restart_peak("imported")  # includes tokenizer and data, which peers do not load
        traffic = parallelize_fsdp2(setup.model, build_meshes(setup.sizes, "cpu"), config)
        load_weights(setup.model, setup.folder, setup.device, config.train.seed)
        shards = AdapterShards(setup.model)
        moments = PagedOptimizerState(adapter_shard_numels(setup.model), config.optim, config.paging, setup.device)
        optimizer, scale = PagedAdamW(shards.local, moments, config.optim), LossScale("bf16")
        setup.model.train()
        mark_and_restart_peak("loaded")
        for step in steps():
            wait_for_turn()
            global_batch = [torch.tensor(part) for part in step["ours"]]
            trained = int((global_batch[1] != LABEL_IGNORE_INDEX).sum())
            batch = Batch(*(part[RANK::WORLD_SIZE] for part in global_batch))
            replicas = setup.sizes.adapter_replicas
            result = train_step(setup.model, [batch], trained, shards, replicas, optimizer, scale, CLIP, traffic)
            write_mark("step")
            write_mark("loss", loss=result.loss)
            del batch, global_batch
        write_mark("end", static_bytes=static_bytes())
        write_mark("engine", engine=f"base: {args.parallel_base}")


if __name__ == "__main__":
    main()
