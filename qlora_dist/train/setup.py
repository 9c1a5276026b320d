"""Everything that can be checked before the ranks join: the same on each of them, and no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qlora_dist.adapters.attach import attach_adapter, peft_config
from qlora_dist.config import Config
from qlora_dist.data.loader import Loader, eval_batches
from qlora_dist.data.prepare import prepare
from qlora_dist.data.rows import Batch, Rows
from qlora_dist.data.sequences import Stats
from qlora_dist.errors import UserError
from qlora_dist.launch.environment import Ranks
from qlora_dist.model.folder import ModelFolder
from qlora_dist.model.packable import check_packable
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.parallel.compile import check_compiler
from qlora_dist.parallel.mesh import MeshSizes, mesh_sizes
from qlora_dist.parallel.process_group import resolve_device


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start."""

    config: Config
    ranks: Ranks
    device: torch.device
    sizes: MeshSizes
    folder: ModelFolder
    model: PreTrainedModel
    """On meta, adapters attached, not sharded."""
    adapter: peft.LoraConfig
    loader: Loader
    eval_batches: list[Batch]
    """Empty without `data.eval`."""
    stats: dict[str, Stats]
    steps: int
    """Optimizer steps of the whole run."""


def set_up(config: Config, ranks: Ranks) -> Setup:
    """Check the configuration against the machine, the model's folder and the data.

    Raises:
        UserError: whatever is wrong, before a process group exists and a GPU waits.
    """
    transformers_logging.set_verbosity_error()
    device = resolve_device(config.train.device, ranks)
    if config.train.compile:
        check_compiler(device)
    sizes = mesh_sizes(config.parallel, ranks)
    folder = ModelFolder(config.model.base)
    model = build_skeleton(folder, config.model)
    if config.data.packing != "none":
        check_packable(model)
    adapter = peft_config(model, config.lora, config.model.base)
    attach_adapter(model, adapter)
    train_rows, eval_rows, stats = prepare(config.data, load_tokenizer(folder.path))
    _check_ids(folder, model, [train_rows, *([eval_rows] if eval_rows is not None else [])])
    loader = Loader(
        train_rows,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.train.seed,
    )
    held_out = (
        eval_batches(eval_rows, micro_batch=config.train.micro_batch, rank=ranks.rank, world_size=ranks.world_size)
        if eval_rows is not None
        else []
    )
    return Setup(config, ranks, device, sizes, folder, model, adapter, loader, held_out, stats, config.train.steps)


def _check_ids(folder: ModelFolder, model: PreTrainedModel, data: list[Rows]) -> None:
    size = model.config.get_text_config().vocab_size
    largest = max(int(rows.sequences.tokens.max()) for rows in data)
    if largest >= size:
        raise UserError(
            f"{folder.path}: the data's tokens go up to number {largest:,} and the embedding has {size:,} rows; resize "
            "it (resize_token_embeddings of transformers), save the model and quantize it again"
        )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: holds no tokenizer ({reason}); copy it there from the original model") from None
