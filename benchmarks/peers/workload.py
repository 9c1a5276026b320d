"""The training material of all systems, written once: the rows of each step, and the adapter's initial values.

Full steps have rows of `seq_len` tokens without padding, with the data's tokens in sequence, all of them trained. They
are equal for all systems. Uneven steps have conversations. qlora-dist packs them into rows. Its peers get as many
shuffled conversations of the same data, one per row, padded to the longest of a rank's batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from qlora_dist.adapters.attach import init_lora_weight, named_trainable_parameters
from qlora_dist.config.schema import Config
from qlora_dist.data.collate import LABEL_IGNORE_INDEX, Batch
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.train.run_setup import RunSetup, set_up_run

LR, CLIP, LORA_R, LORA_ALPHA = 2e-4, 1.0, 16, 32


def configuration(base: str, data: str, rows: int, seq_len: int, micro_batch: int, **options: Any) -> Config:
    """Return qlora-dist's configuration; `options` are parallel_base, checkpointing and compiled."""
    return Config.model_validate(
        {
            "model": {"base": base},
            "lora": {"r": LORA_R, "alpha": LORA_ALPHA, "dropout": 0.0},
            "data": {"train": [data], "seq_len": seq_len},
            "parallel": {"base": options.get("parallel_base", "world")},
            "optim": {"name": "adamw", "lr": LR, "warmup_steps": 0, "max_grad_norm": CLIP},
            "train": {
                "global_batch": rows,
                "micro_batch": micro_batch,
                "checkpointing": options.get("checkpointing", "full"),
                "device": "cpu",
                "compile": options.get("compiled", False),
            },
        }
    )


def write_material(folder: Path, base: str, data: str, rows: int, seq_len: int, full: int, uneven: int) -> None:
    """Write a number of full steps followed by uneven ones, and the adapter."""
    setup = set_up_run(configuration(base, data, rows, seq_len, rows), read_rank_info({}))
    folder.mkdir(parents=True, exist_ok=True)
    steps = full_steps(setup, rows, seq_len, full) + uneven_steps(setup, uneven)
    (folder / "steps.json").write_text(json.dumps(steps))
    values = {}
    for name, parameter in named_trainable_parameters(setup.model):
        value = init_lora_weight(name, parameter.shape, setup.config.train.seed)
        assert value is not None
        values[name] = value
    save_file(values, folder / "adapter.safetensors")


def full_steps(setup: RunSetup, rows: int, seq_len: int, count: int) -> list[dict[str, Any]]:
    ((source, _),) = setup.loader.sources
    needed, tokens, index = count * rows * seq_len, [], 0
    while sum(map(len, tokens)) < needed:
        tokens.append(source.sequences.tokens(index % len(source.sequences)))
        index += 1
    ids = torch.from_numpy(np.concatenate(tokens)[:needed].astype(np.int64)).view(count, rows, seq_len)
    labels = torch.full_like(ids, LABEL_IGNORE_INDEX)
    labels[..., :-1] = ids[..., 1:]
    positions = torch.arange(seq_len).expand(rows, seq_len)
    return [
        {
            "kind": "full",
            "tokens": rows * seq_len,
            "our_tokens": rows * seq_len,
            "rows": [{"ids": row.tolist(), "labels": row.tolist()} for row in step],
            "ours": [part.tolist() for part in Batch(step, shifted, positions)],
        }
        for step, shifted in zip(ids, labels, strict=True)
    ]


def uneven_steps(setup: RunSetup, count: int) -> list[dict[str, Any]]:
    ((source, _),) = setup.loader.sources
    order = torch.randperm(len(source.segments), generator=torch.Generator().manual_seed(0)).tolist()
    steps = []
    for index in range(count):
        (ours,) = setup.loader.micro_batches(index)
        number = sum(int(np.diff(source.offsets[row : row + 2])[0]) for row in setup.loader.row_indices(index))
        chosen, order = order[:number], order[number:]
        rows = []
        for piece in chosen:
            columns = source.segments.sequence_index, source.segments.start, source.segments.length
            sequence, start, length = (int(column[piece]) for column in columns)
            span = slice(start, start + length)
            ids, trained = source.sequences.tokens(sequence)[span], source.sequences.trained(sequence)[span]
            rows.append({"ids": ids.tolist(), "labels": np.where(trained, ids, LABEL_IGNORE_INDEX).tolist()})
        steps.append(
            {
                "kind": "uneven",
                "tokens": sum(len(row["ids"]) for row in rows),
                "our_tokens": setup.loader.tokens(index),
                "rows": rows,
                "ours": [part.tolist() for part in ours],
            }
        )
    return steps
