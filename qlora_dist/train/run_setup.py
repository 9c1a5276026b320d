"""Everything that can be checked before the ranks join: the same on each of them, and no weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from qlora_dist.adapters.attach import (
    adapted_paths,
    attach_adapter,
    check_attached_targets,
    make_peft_config,
    weight_read_names,
)
from qlora_dist.adapters.export import config_to_save, shapes_to_save
from qlora_dist.adapters.peft_roundtrip import check_peft_roundtrip, needs_peft_conversion
from qlora_dist.adapters.targets import find_targets
from qlora_dist.compat.peft import peft
from qlora_dist.config.max_positions import check_seq_len
from qlora_dist.config.schema import Config
from qlora_dist.config.sections import DEFAULT_STEPS
from qlora_dist.data.collate import Batch, PackedDataset
from qlora_dist.data.dataloader import TrainDataLoader, eval_batches
from qlora_dist.data.inference_tokenizer import InferenceTokenizer, make_inference_tokenizer
from qlora_dist.data.prepare_datasets import PreparedSource, data_warnings, prepare_datasets
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.model.meta_model import LossModel, build_meta_model, causal_lm_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.packable import check_packing_support
from qlora_dist.parallel.compile import check_compiler
from qlora_dist.parallel.engine import check_engine
from qlora_dist.parallel.mesh import MeshSizes, mesh_sizes
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.runtime.process_group import idle_gpus_warning, resolve_device
from qlora_dist.train.initial_adapter import find_initial_tensors
from qlora_dist.train.trackers import check_trackers


@dataclass(frozen=True)
class RunSetup:
    """A run that is ready to start."""

    config: Config
    ranks: RankInfo
    device: torch.device
    sizes: MeshSizes
    folder: ModelFolder
    model: LossModel
    """On meta, adapters attached, not sharded."""
    adapter: peft.LoraConfig
    initial_tensors: Mapping[str, TensorEntry]
    """Tensors of the adapter that the run begins from, by the parameter's name; empty without `lora.from`."""
    loader: TrainDataLoader
    steps: int
    """Optimizer steps, whether the configuration counts steps or epochs."""
    eval_rows: PackedDataset | None
    """None: no `data.eval`."""
    eval_batches: list[Batch]
    """Of this rank; empty without `data.eval`."""
    served: InferenceTokenizer
    """What is saved beside the adapter."""
    data_sha256: dict[str, str]
    """Of the sequences and weights of `train`, and of the sequences of `eval` if there are any."""


def set_up_run(config: Config, ranks: RankInfo, console: Console | None = None) -> RunSetup:
    """Check the configuration against the machine, the model's folder and the data.

    Args:
        config: of the run.
        ranks: who this process is.
        console: for the progress of tokenizing; none: silent.

    Raises:
        UserError: whatever is wrong, before a process group exists and a GPU waits.
    """
    device = resolve_device(config.train.device, ranks)
    if (
        console is not None
        and (idle_message := idle_gpus_warning(ranks, device, torch.cuda.device_count())) is not None
    ):
        console.print(idle_message, markup=False, highlight=False)
    check_engine(config, device)
    check_trackers(config)
    if config.train.compile:
        check_compiler(device)
    sizes = mesh_sizes(config.parallel, ranks)
    folder, model, adapter = set_up_model(config)
    if console is not None and config.lora.targets == "all-linear" and (read := sorted(weight_read_names(model))):
        console.print(
            f"lora.targets: without {', '.join(read)}, whose weight the model's code reads itself", markup=False
        )
    check_seq_len(config.data.seq_len, model.config.to_dict(), str(folder.path))
    first_values = {}
    if config.lora.from_adapter is not None:
        targets = adapted_paths(model)
        first_values = find_initial_tensors(Path(config.lora.from_adapter), model, targets, folder.path)
    tokenizer = load_tokenizer(folder.path)
    train, eval_source = prepare_datasets(config.data, tokenizer, console)
    served = make_inference_tokenizer(tokenizer, config.data.chat_template, folder.path)
    sources = train if eval_source is None else [*train, eval_source]
    for source in sources:
        for note in (source.stats.left_out(), source.stats.per_answer()):
            if note and console is not None:
                console.print(f"{source.path}: {note}", markup=False)
    check_token_ids(folder, model, sources)
    if console is not None:
        for remark in data_warnings(train, eval_source):
            console.print(remark, markup=False)
    loader = TrainDataLoader(
        [(source.rows, source.weight) for source in train],
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.train.seed,
        epochs=config.train.epochs,
        group_by_length=config.data.group_by_length,
    )
    steps = loader.steps or config.train.steps or DEFAULT_STEPS
    if console is not None and config.optim.warmup_steps > steps:
        console.print(f"optim.warmup_steps: {config.optim.warmup_steps} is cut to the {steps} steps of this run")
    eval_rows = None if eval_source is None else eval_source.rows
    batches = (
        eval_batches(eval_rows, micro_batch=config.train.micro_batch, rank=ranks.rank, world_size=ranks.world_size)
        if eval_rows is not None
        else []
    )
    contents = json.dumps([[source.stats.sha256, source.weight] for source in train]).encode()
    data_sha256 = {"train": hashlib.sha256(contents).hexdigest()}
    if eval_source is not None:
        data_sha256["eval"] = eval_source.stats.sha256
    return RunSetup(
        config,
        ranks,
        device,
        sizes,
        folder,
        model,
        adapter,
        first_values,
        loader,
        steps,
        eval_rows,
        batches,
        served,
        data_sha256,
    )


def set_up_model(config: Config, folder: ModelFolder | None = None) -> tuple[ModelFolder, LossModel, peft.LoraConfig]:
    """The model's folder, the model on meta with its adapters, and what those are.

    Args:
        config: of the run.
        folder: None: that of `model.base`.

    Raises:
        UserError: no such model, or the adapters don't fit it.
    """
    transformers_logging.set_verbosity_error()
    folder = folder or ModelFolder(config.model.base)
    model = build_meta_model(folder, config.model)
    if config.data.packing != "none":
        check_packing_support(model)
    base = config.model.base
    targets = find_targets(model, config.lora, base)
    adapter = make_peft_config(model, config.lora, base)
    attach_adapter(model, adapter)
    check_attached_targets(model, targets, base)
    if needs_peft_conversion(adapter, model.config.model_type):
        plain = causal_lm_on_meta(folder, torch.float32)
        check_peft_roundtrip(plain, config_to_save(adapter), shapes_to_save(model), base)
    return folder, model, adapter


def check_token_ids(folder: ModelFolder, model: LossModel, sources: Sequence[PreparedSource]) -> None:
    """See whether the embedding has a row for each token of the data.

    Raises:
        UserError: it has not.
    """
    size = model.config.get_text_config().vocab_size
    largest = max(source.stats.largest_token for source in sources)
    if largest >= size:
        raise UserError(
            f"{folder.path}: the data's tokens go up to number {largest:,} and the embedding has {size:,} rows; resize "
            "it (resize_token_embeddings of transformers), save the model and quantize it again"
        )
