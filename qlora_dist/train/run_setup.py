"""The checks of a run that need no process group and read no weights. Every rank does all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qlora_dist.adapters.attach import (
    adapted_paths,
    attach_adapter,
    check_attached_targets,
    is_lora_parameter,
    make_peft_config,
)
from qlora_dist.adapters.export import config_to_save, shapes_to_save
from qlora_dist.adapters.peft_roundtrip import check_peft_roundtrip, needs_peft_conversion
from qlora_dist.adapters.targets import AdapterTargets, find_targets, weight_read_names
from qlora_dist.adapters.trainable_tokens import set_vocabulary
from qlora_dist.compat.peft import peft
from qlora_dist.config.max_positions import check_seq_len
from qlora_dist.config.schema import Config
from qlora_dist.config.sections import DEFAULT_STEPS, LoraConfig
from qlora_dist.data.collate import Batch, PackedDataset
from qlora_dist.data.dataloader import BatchLayout, TrainDataLoader, eval_batches
from qlora_dist.data.inference_tokenizer import InferenceTokenizer, make_inference_tokenizer
from qlora_dist.data.new_tokens import NewTokens, find_new_tokens
from qlora_dist.data.prepare_datasets import PreparedDatasets, PreparedSource, data_warnings, prepare_datasets
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import TensorEntry
from qlora_dist.layers.experts import QuantizedExperts
from qlora_dist.model.attention import check_packing_support
from qlora_dist.model.meta_model import LossModel, build_meta_model
from qlora_dist.model.model_class import whole_model_on_meta
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.parallel.activation_checkpointing import check_compiler
from qlora_dist.parallel.engine import check_engine
from qlora_dist.parallel.mesh import MeshSizes, mesh_sizes
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.runtime.process_group import idle_gpus_warning, resolve_device
from qlora_dist.train.initial_adapter import find_initial_tensors
from qlora_dist.train.trackers import check_trackers

_COMPILE_TIMEOUT_FACTOR = 6.0
"""Factor on `train.timeout` for steps and evaluations that may compile first."""


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """Checked settings, model and data of a run that is ready to start."""

    config: Config
    ranks: RankInfo
    device: torch.device
    sizes: MeshSizes
    folder: ModelFolder
    model: LossModel
    """Model with adapters: on the meta device and not sharded, until it is loaded."""
    adapter: peft.LoraConfig
    initial_tensors: Mapping[str, TensorEntry]
    """Tensors of the adapter that the run begins from, by the parameter's name; empty without `lora.from`."""
    loader: TrainDataLoader
    steps: int
    """Number of optimizer steps, whether the configuration gives steps or epochs."""
    eval_rows: PackedDataset | None
    """Rows of `data.eval`; None without it."""
    eval_batches: list[Batch]
    """This rank's batches of `data.eval`; empty without it."""
    served: InferenceTokenizer
    """Tokenizer that is saved beside the adapter."""
    data_sha256: dict[str, str]
    """sha256 of the sequences and weights (`train`), and of the held-out sequences (`eval`, if there are any)."""

    @property
    def compile_timeout_factor(self) -> float | None:
        """Factor on `train.timeout` for a step or an evaluation that may compile; None without `train.compile`."""
        return _COMPILE_TIMEOUT_FACTOR if self.config.train.compile else None


def set_up_run(config: Config, ranks: RankInfo, console: Console | None = None) -> RunSetup:
    """Check the configuration against the machine, the model's folder and the data.

    The console shows remarks and the progress of tokenizing.

    Raises:
        UserError: something is wrong. No process group exists yet, and no GPU waits.
    """
    console = console or Console(quiet=True)
    device = _check_machine(config, ranks, console)
    sizes = mesh_sizes(config.parallel, ranks)
    folder, model, adapter = set_up_model(config, console=console)
    if config.lora.targets == "all-linear" and (read := sorted(weight_read_names(model))):
        console.print(
            f"lora.targets: without {', '.join(read)}, whose weight the model's code reads itself", markup=False
        )
    check_seq_len(config.data.seq_len, model.config.to_dict(), str(folder.path))
    initial_tensors = {}
    if config.lora.from_adapter is not None:
        initial_tensors = find_initial_tensors(Path(config.lora.from_adapter), model, adapted_paths(model), folder.path)
    tokenizer = load_tokenizer(folder.path, config.model.add_tokens)
    train, held_out = _prepare_data(config, tokenizer, folder, model, console)
    served = make_inference_tokenizer(tokenizer, config.data.chat_template, folder.path)
    loader = _make_loader(config, ranks, train)
    steps = loader.steps or config.train.steps or DEFAULT_STEPS
    if config.optim.warmup_steps > steps:
        console.print(f"optim.warmup_steps: {config.optim.warmup_steps} is cut to the {steps} steps of this run")
    return RunSetup(
        config=config,
        ranks=ranks,
        device=device,
        sizes=sizes,
        folder=folder,
        model=model,
        adapter=adapter,
        initial_tensors=initial_tensors,
        loader=loader,
        steps=steps,
        eval_rows=None if held_out is None else held_out.dataset,
        eval_batches=[] if held_out is None else _make_eval_batches(config, ranks, held_out),
        served=served,
        data_sha256=_data_sha256(train, held_out),
    )


def _check_machine(config: Config, ranks: RankInfo, console: Console) -> torch.device:
    """Return this rank's device, and check that everything the run needs is installed."""
    device = resolve_device(config.train.device, ranks)
    if (warning := idle_gpus_warning(ranks, device, torch.cuda.device_count())) is not None:
        console.print(warning, markup=False, highlight=False)
    check_engine(config, device)
    check_trackers(config)
    if config.train.compile:
        check_compiler(device)
    return device


def _prepare_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, folder: ModelFolder, model: LossModel, console: Console
) -> PreparedDatasets:
    """Return the tokenized sources, and print what was left out and what looks wrong."""
    datasets = prepare_datasets(config.data, tokenizer, console)
    sources = [*datasets.train, *([] if datasets.eval is None else [datasets.eval])]
    for source in sources:
        for note in (source.stats.describe_skipped_rows(), source.stats.describe_per_answer_rows()):
            if note:
                console.print(f"{source.path}: {note}", markup=False)
    check_token_ids(folder, model, sources)
    for warning in data_warnings(*datasets):
        console.print(warning, markup=False)
    return datasets


def _make_loader(config: Config, ranks: RankInfo, train: Sequence[PreparedSource]) -> TrainDataLoader:
    return TrainDataLoader(
        [(source.dataset, source.weight) for source in train],
        BatchLayout(config.train.global_batch, config.train.micro_batch, ranks.rank, ranks.world_size),
        seed=config.train.seed,
        epochs=config.train.epochs,
        group_by_length=config.data.group_by_length,
    )


def _make_eval_batches(config: Config, ranks: RankInfo, held_out: PreparedSource) -> list[Batch]:
    return eval_batches(
        held_out.dataset, micro_batch=config.train.micro_batch, rank=ranks.rank, world_size=ranks.world_size
    )


def _data_sha256(train: Sequence[PreparedSource], held_out: PreparedSource | None) -> dict[str, str]:
    contents = json.dumps([[source.stats.sha256, source.weight] for source in train]).encode()
    hashes = {"train": hashlib.sha256(contents).hexdigest()}
    return hashes if held_out is None else hashes | {"eval": held_out.stats.sha256}


def set_up_model(
    config: Config,
    folder: ModelFolder | None = None,
    *,
    new_tokens: NewTokens | None = None,
    console: Console | None = None,
) -> tuple[ModelFolder, LossModel, peft.LoraConfig]:
    """Build the model with its adapters on the meta device, from `folder` or `model.base`.

    Without `new_tokens`, the folder's tokenizer says which rows the run adds to the embedding or trains. `console`
    shows remarks about them.

    Raises:
        UserError: there is no such model, or the adapters do not fit it.
    """
    transformers_logging.set_verbosity_error()
    folder = folder or ModelFolder(config.model.base)
    model = build_meta_model(folder, config.model)
    if config.data.packing != "none":
        check_packing_support(model)
    base = config.model.base
    targets = find_targets(model, config.lora, base)
    rows = model.get_input_embeddings().weight.shape[0]
    new_tokens = new_tokens or find_new_tokens(config, folder.path, rows)
    if console is not None:
        for remark in new_tokens.remarks:
            console.print(remark, markup=False, highlight=False)
    if new_tokens.vocabulary > rows:
        set_vocabulary(model, new_tokens.vocabulary)
    adapter = make_peft_config(model, config.lora, base, model.towers.names, new_tokens.ids)
    attach_adapter(model, adapter, vocabulary=new_tokens.vocabulary)
    check_attached_targets(model, targets, base)
    check_adapter_numel(model, targets, config.lora)
    if model.towers.paths or needs_peft_conversion(adapter, model.config.model_type):
        plain = whole_model_on_meta(folder, torch.float32)
        if new_tokens.vocabulary > rows:
            plain.resize_token_embeddings(new_tokens.vocabulary, mean_resizing=False)
        check_peft_roundtrip(plain, config_to_save(adapter), shapes_to_save(model), base)
    return folder, model, adapter


def check_adapter_numel(model: LossModel, targets: AdapterTargets, lora: LoraConfig) -> None:
    """Compare the number of the adapters' elements with the number that follows from the targets' shapes.

    Memory of adapters and optimizer states follows from this number. PEFT's classes make the adapters, so another
    number means that a layer was wrapped in an unexpected way.
    """
    expected = 0
    for path in targets.paths:
        layer = model.get_submodule(path).base_layer
        experts = layer.experts if isinstance(layer, QuantizedExperts) else 1
        expected += experts * lora.r * (layer.in_features + layer.out_features)
        expected += layer.out_features if lora.dora else 0
    actual = sum(p.numel() for name, p in model.named_parameters() if is_lora_parameter(name))
    if actual != expected:
        raise UserError(
            f"lora: the adapters have {actual:,} elements, and their {len(targets.paths)} matrices need {expected:,}; "
            "report this with the model's config.json, and name some layers in lora.targets until then"
        )


def check_token_ids(folder: ModelFolder, model: LossModel, sources: Sequence[PreparedSource]) -> None:
    """Raise UserError if the embedding lacks a row for a token of the data."""
    size = model.config.get_text_config().vocab_size
    largest = max(source.stats.largest_token for source in sources)
    if largest >= size:
        raise UserError(
            f"{folder.path}: the data's tokens go up to number {largest:,} and the embedding has {size:,} rows; name "
            "the tokenizer's tokens beyond them in model.add_tokens, which adds rows"
        )
