"""A model for inference: the base in 4 or 16 bit, whole or sharded over the ranks, and adapters chosen by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qlora_dist.adapters.attach import is_adapter_parameter, is_lora_parameter
from qlora_dist.adapters.load_adapter import (
    attach_saved_adapter,
    read_local_shard,
    read_token_rows_shard,
    saved_entries_by_parameter,
)
from qlora_dist.adapters.saved_adapter import SavedAdapter, find_invalid_values
from qlora_dist.adapters.trainable_tokens import attach_saved_vocabulary
from qlora_dist.compat.peft import LoraLayer, enable_frozen_adapters
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.inference.adapter_tokenizer import load_adapter_tokenizer
from qlora_dist.inference.named_adapter import NamedAdapter
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.layers.token_rows import is_token_rows_parameter, token_rows
from qlora_dist.model.attention import check_packing_support
from qlora_dist.model.meta_model import LossModel, build_meta_model
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.parallel.loaded_model import load_model, shard_model
from qlora_dist.parallel.mesh import CommCounter, mesh_sizes
from qlora_dist.runtime.environment import RankInfo, read_rank_info
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.runtime.object_collectives import all_gather_json
from qlora_dist.runtime.process_group import process_group, resolve_device
from qlora_dist.runtime.watchdog import watchdog
from qlora_dist.shard_view import local_tensor
from qlora_dist.train.rank_consistency import check_ranks_agree


@dataclass(kw_only=True)
class InferenceModel:
    """Loaded model and adapters, on each rank of the process group."""

    config: Config
    ranks: RankInfo
    device: torch.device
    folder: ModelFolder
    model: LossModel
    """The model in eval mode, sharded, with its weights."""
    traffic: CommCounter
    adapter_names: Sequence[str]
    """Names that `set_adapter` takes."""
    static_bytes: int
    """Bytes of weights that this rank holds."""
    store: dist.Store
    saved_adapters: Sequence[SavedAdapter]
    """The adapters' folders, in the order of `adapter_names`."""
    _saved_module_shards: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """This rank's shards of the parameters that were trained whole, by name, for each adapter."""
    _base_shards: dict[str, torch.Tensor] = field(default_factory=dict)
    """Values of the base for all of these shards."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the base's tokenizer with the tokens that the adapters were trained with."""
        return load_adapter_tokenizer(self.config, self.saved_adapters)

    @torch.no_grad()
    def set_adapter(self, name: str | None) -> None:
        """Activate an adapter, or with None the base alone. An unknown name is a `UserError`."""
        if name is not None and name not in self.adapter_names:
            known = ", ".join(self.adapter_names) or "none is loaded"
            raise UserError(f"{name}: no adapter of that name; choose from {known}")
        index = None if name is None else self.adapter_names.index(name)
        _activate_adapter(self.model, index)
        self.model.reshard()  # FSDP2 keeps the root gathered after a forward pass, and the shards change below
        parameters = dict(self.model.named_parameters())
        saved = self._saved_module_shards[index] if index is not None else {}
        for parameter_name, value in (self._base_shards | saved).items():
            local_tensor(parameters[parameter_name]).copy_(value)


@dataclass(frozen=True)
class _PreparedModel:
    """Skeleton of a model, which a rank builds without the others."""

    folder: ModelFolder
    model: LossModel
    adapter_entries: list[dict[str, TensorEntry]]
    """Entries of each adapter's file, by the name of the model's parameter."""


@contextmanager
def open_inference_model(
    config: Config, adapters: Sequence[NamedAdapter] = (), *, quantize: bool = True
) -> Iterator[InferenceModel]:
    """Load base and adapters, and activate the first adapter. Call it on every rank, or in a single process.

    A sharded model is never whole on a rank, because weights are loaded as `train` does. With `quantize`, a base in 16
    bit is quantized while it is loaded. Nearly all errors are raised before any rank waits for another.
    """
    ranks = read_rank_info()
    device = resolve_device(config.train.device, ranks)
    config = _adjust_for_single_rank(config, ranks)
    mesh_sizes(config.parallel, ranks)  # a layout that does not fit fails before the ranks join
    prepared = _prepare_model(config, adapters, quantize=quantize)
    timeout_s = config.train.timeout
    with process_group(ranks, device, timeout_s) as store, watchdog(store, ranks, timeout_s):
        check_ranks_agree(config, ranks, device)
        yield _load_inference_model(config, ranks, device, prepared, adapters, store)


def _adjust_for_single_rank(config: Config, ranks: RankInfo) -> Config:
    """Use no FSDP2 on a single rank, where it would copy each layer once more for every token."""
    if ranks.world_size > 1 or config.parallel.offload != "none":
        return config
    parallel = config.parallel.model_copy(update={"engine": "zero2", "base": "replicate"})
    return config.model_copy(update={"parallel": parallel})


def _prepare_model(config: Config, adapters: Sequence[NamedAdapter], *, quantize: bool) -> _PreparedModel:
    transformers_logging.set_verbosity_error()
    folder = ModelFolder(config.model.base)
    model = build_meta_model(folder, config.model, quantize=quantize)
    if config.data.packing != "none" and config.data.eval is not None:
        check_packing_support(model)
    adapter_entries = []
    attach_saved_vocabulary(model, [adapter.saved for adapter in adapters], folder.path)
    for index, adapter in enumerate(adapters):
        attach_saved_adapter(model, adapter.saved, _peft_adapter_name(index), folder.path)
    if config.data.eval is not None and isinstance(model.get_output_embeddings(), LoraLayer):
        raise UserError(
            f"{adapters[0].path}: has LoRA on the output head, with which eval cannot compute a loss; merge it "
            "(qlora-dist merge), and evaluate the merged folder with --base"
        )
    for index, adapter in enumerate(adapters):
        adapter_entries.append(saved_entries_by_parameter(model, adapter.saved, _peft_adapter_name(index), folder.path))
    parameters = dict(model.named_parameters())
    for name in {name for entries in adapter_entries for name in entries if not is_adapter_parameter(name)}:
        parameters[name].data = parameters[name].data.float()  # the type it was trained in
    return _PreparedModel(folder, model, adapter_entries)


def _load_inference_model(
    config: Config,
    ranks: RankInfo,
    device: torch.device,
    prepared: _PreparedModel,
    adapters: Sequence[NamedAdapter],
    store: dist.Store,
) -> InferenceModel:
    model = prepared.model
    saved_shards: list[dict[str, torch.Tensor]] = []
    base: dict[str, torch.Tensor] = {}

    def fill_adapters(model: LossModel) -> None:
        model.eval()
        shards, values = _read_adapters(model, prepared.adapter_entries, adapters)
        saved_shards.extend(shards)
        base.update(values)

    loaded = load_model(shard_model(model, config, ranks, device), prepared.folder, fill_adapter=fill_adapters)
    names = [adapter.name for adapter in adapters]
    result = InferenceModel(
        config=config,
        ranks=ranks,
        device=device,
        folder=prepared.folder,
        model=model,
        traffic=loaded.traffic,
        adapter_names=names,
        static_bytes=loaded.static_bytes,
        store=store,
        saved_adapters=[adapter.saved for adapter in adapters],
        _saved_module_shards=saved_shards,
        _base_shards=base,
    )
    result.set_adapter(names[0] if names else None)
    return result


@torch.no_grad()
def _read_adapters(
    model: PreTrainedModel, adapter_entries: Sequence[Mapping[str, TensorEntry]], adapters: Sequence[NamedAdapter]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Fill this rank's shards of the LoRA matrices, and return the `_saved_module_shards` and `_base_shards`.

    If an adapter's values are not finite, or all zeros, all ranks raise `UserError`.
    """
    parameters = dict(model.named_parameters())
    saved_module_shards: list[dict[str, torch.Tensor]] = [{} for _ in adapter_entries]
    problems: list[str | None] = []
    with SafetensorsReader() as reader:
        for adapter, entries, saved_shards in zip(adapters, adapter_entries, saved_module_shards, strict=True):
            for name, entry in entries.items():
                record_heartbeat(phase="loading")
                if is_token_rows_parameter(name):
                    module = name.rpartition(".")[0]
                    rows = token_rows(model.get_submodule(module))
                    assert rows is not None
                    saved_shards[name] = read_token_rows_shard(
                        parameters[name], rows, adapter.saved.token_rows[module], reader
                    )
                    continue
                values = read_local_shard(parameters[name], entry, reader, is_low_rank=is_lora_parameter(name))
                if is_lora_parameter(name):
                    local_tensor(parameters[name]).copy_(values)
                else:
                    saved_shards[name] = values
            shards = [
                (name, saved_shards[name] if name in saved_shards else local_tensor(parameters[name]))
                for name in entries
            ]
            problems.append(find_invalid_values(shards))
    base_shards = {
        name: local_tensor(parameters[name]).clone() for saved_shards in saved_module_shards for name in saved_shards
    }
    _check_values(all_gather_json(problems), saved_module_shards, adapters)
    return saved_module_shards, base_shards


def _check_values(
    problems_by_rank: Sequence[Sequence[str | None]],
    saved_module_shards: Sequence[Mapping[str, torch.Tensor]],
    adapters: Sequence[NamedAdapter],
) -> None:
    """Raise if a rank found a value that is not finite, or all ranks found only zeros in an adapter's B."""
    for index, adapter in enumerate(adapters):
        problems = [rank_problems[index] for rank_problems in problems_by_rank]
        non_finite = [problem for problem in problems if problem is not None and "finite" in problem]
        if non_finite or (all(problems) and not saved_module_shards[index]):
            raise UserError(
                f"{adapter.path}: {(non_finite or problems)[0]}; use an earlier checkpoint, or train longer"
            )


def _activate_adapter(model: PreTrainedModel, index: int | None) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "set_adapter"):
            module.enable_adapters(False)
            if index is not None:
                enable_frozen_adapters(module)
                module.set_adapter(_peft_adapter_name(index), inference_mode=True)


def _peft_adapter_name(index: int) -> str:
    """Return the name that PEFT gets for an adapter, because a module cannot have every name that a user gives."""
    return f"a{index}"
