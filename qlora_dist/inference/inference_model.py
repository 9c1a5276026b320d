"""A model for inference: the base in 4 bit or 16, whole or sharded over the ranks, and adapters chosen by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from qlora_dist.adapters.attach import is_lora_parameter
from qlora_dist.adapters.load_adapter import attach_saved_adapter, read_local_shard, saved_entries_by_parameter
from qlora_dist.adapters.validate_adapter import find_invalid_values
from qlora_dist.compat.peft import LoraLayer, enable_frozen_adapters
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.inference.named_adapter import NamedAdapter
from qlora_dist.io.read_ahead import ReadProgress
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.model.load_weights import load_weights
from qlora_dist.model.meta_model import LossModel, build_meta_model
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.packable import check_packing_support
from qlora_dist.parallel.comm_counter import CommCounter
from qlora_dist.parallel.engine import parallelize
from qlora_dist.parallel.mesh import MeshSizes, build_meshes, mesh_sizes
from qlora_dist.parallel.static_bytes import check_static_bytes
from qlora_dist.runtime.environment import RankInfo, read_rank_info
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.runtime.object_collectives import all_gather_json
from qlora_dist.runtime.process_group import process_group, resolve_device
from qlora_dist.runtime.watchdog import watchdog
from qlora_dist.shard_view import local_tensor
from qlora_dist.train.rank_consistency import check_ranks_agree


@dataclass
class InferenceModel:
    """A model that is ready to answer, on each rank of the process group."""

    config: Config
    ranks: RankInfo
    device: torch.device
    folder: ModelFolder
    model: LossModel
    """In eval mode, sharded and filled."""
    traffic: CommCounter
    adapters: Sequence[str]
    """The names that `use` takes."""
    static_bytes: int
    """That this rank holds."""
    store: dist.Store
    """Where the ranks have met."""
    _saved_module_shards: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Per adapter, this rank's parts of the parameters that it was trained with whole, by name."""
    _base: dict[str, torch.Tensor] = field(default_factory=dict)
    """The base's own values of all of these."""

    @torch.no_grad()
    def use(self, name: str | None) -> None:
        """Answer with that adapter from now on; None: with the base alone.

        Raises:
            UserError: there is no such adapter.
        """
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "none is loaded"
            raise UserError(f"{name}: no adapter of that name; choose from {known}")
        index = None if name is None else self.adapters.index(name)
        _activate_adapter(self.model, index)
        self.model.reshard()  # the root's parameters stay gathered after a forward pass, and these are to be changed
        parameters = dict(self.model.named_parameters())
        for parameter_name, value in (
            self._base | (self._saved_module_shards[index] if index is not None else {})
        ).items():
            local_tensor(parameters[parameter_name]).copy_(value)


@dataclass(frozen=True)
class _PreparedModel:
    """What is known before the ranks meet."""

    folder: ModelFolder
    model: LossModel
    tensors: list[dict[str, TensorEntry]]
    """Per adapter, the entries of its file by the model's parameter."""


@contextmanager
def open_inference_model(
    config: Config, adapters: Sequence[NamedAdapter] = (), quantize: bool = True
) -> Iterator[InferenceModel]:
    """Load base and adapters; the first adapter is the one in use. Called on every rank, or in a single process.

    A sharded model is never whole on a rank: the way is that of `train`.

    Args:
        config: `model`, `parallel` and `train.timeout`, `train.device` of it.
        adapters: of the base `config.model.base`.
        quantize: False: a base in 16 bit stays so; else it is quantized while it is loaded, as `train` does.

    Yields:
        The model, within the process group.

    Raises:
        UserError: no such model, or an adapter that does not fit it, nearly always before any rank waits for another.
    """
    ranks = read_rank_info()
    device = resolve_device(config.train.device, ranks)
    config = _adjust_for_single_rank(config, ranks)
    sizes = mesh_sizes(config.parallel, ranks)
    skeleton = _prepare_model(config, adapters, quantize)
    timeout_s = config.train.timeout
    with process_group(ranks, device, timeout_s) as store, watchdog(store, ranks, timeout_s):
        check_ranks_agree(config, ranks, device)
        yield _load_inference_model(config, ranks, device, sizes, skeleton, adapters, store)


def _adjust_for_single_rank(config: Config, ranks: RankInfo) -> Config:
    """A single rank has everything anyway: FSDP2 would copy each layer once more for every token."""
    if ranks.world_size > 1 or config.parallel.offload != "none":
        return config
    parallel = config.parallel.model_copy(update={"engine": "zero2", "base": "replicate"})
    return config.model_copy(update={"parallel": parallel})


def _prepare_model(config: Config, adapters: Sequence[NamedAdapter], quantize: bool) -> _PreparedModel:
    transformers_logging.set_verbosity_error()
    folder = ModelFolder(config.model.base)
    model = build_meta_model(folder, config.model, quantize)
    if config.data.packing != "none" and config.data.eval is not None:
        check_packing_support(model)
    tensors = []
    for index, adapter in enumerate(adapters):
        attach_saved_adapter(model, adapter.saved, _peft_adapter_name(index), folder.path)
    if config.data.eval is not None and isinstance(model.get_output_embeddings(), LoraLayer):
        raise UserError(
            f"{adapters[0].path}: has LoRA on the output head, and no loss is computed with it here; merge it "
            "(qlora-dist merge), and evaluate the merged folder with --base"
        )
    for index, adapter in enumerate(adapters):
        tensors.append(saved_entries_by_parameter(model, adapter.saved, _peft_adapter_name(index), folder.path))
    parameters = dict(model.named_parameters())
    for name in {name for entries in tensors for name in entries if not is_lora_parameter(name)}:
        parameters[name].data = parameters[name].data.float()  # as it was trained
    return _PreparedModel(folder, model, tensors)


def _load_inference_model(
    config: Config,
    ranks: RankInfo,
    device: torch.device,
    sizes: MeshSizes,
    skeleton: _PreparedModel,
    adapters: Sequence[NamedAdapter],
    store: dist.Store,
) -> InferenceModel:
    model, folder = skeleton.model, skeleton.folder
    offload = config.parallel.offload == "base"
    meshes = build_meshes(sizes, device.type, separate_groups=offload)
    traffic = parallelize(model, meshes, config)

    def beat_while_loading(reading: ReadProgress) -> None:
        record_heartbeat(phase="loading")

    load_weights(model, folder, device, None, meshes.base_replicas, offload, beat_while_loading)
    model.eval()
    whole, base = _read_adapters(model, skeleton.tensors, adapters)
    static_bytes = check_static_bytes(model, sizes)
    names = [adapter.name for adapter in adapters]
    result = InferenceModel(config, ranks, device, folder, model, traffic, names, static_bytes, store, whole, base)
    result.use(names[0] if names else None)
    return result


@torch.no_grad()
def _read_adapters(
    model: PreTrainedModel, tensors: Sequence[Mapping[str, TensorEntry]], adapters: Sequence[NamedAdapter]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Fill this rank's parts of the LoRA matrices.

    Returns:
        `Loaded._whole` and `Loaded._base`.

    Raises:
        UserError: on all ranks, if an adapter's values are of no use.
    """
    parameters = dict(model.named_parameters())
    whole: list[dict[str, torch.Tensor]] = [{} for _ in tensors]
    wrong: list[str | None] = []
    with SafetensorsReader() as reader:
        for entries, saved_shards in zip(tensors, whole, strict=True):
            for name, entry in entries.items():
                record_heartbeat(phase="loading")
                values = read_local_shard(parameters[name], entry, reader, is_low_rank=is_lora_parameter(name))
                if is_lora_parameter(name):
                    local_tensor(parameters[name]).copy_(values)
                else:
                    saved_shards[name] = values
            shards = [
                (name, saved_shards[name] if name in saved_shards else local_tensor(parameters[name]))
                for name in entries
            ]
            wrong.append(find_invalid_values(shards))
    base = {name: local_tensor(parameters[name]).clone() for saved_shards in whole for name in saved_shards}
    _check_values(all_gather_json(wrong), whole, adapters)
    return whole, base


def _check_values(
    answers: Sequence[Sequence[str | None]],
    whole: Sequence[Mapping[str, torch.Tensor]],
    adapters: Sequence[NamedAdapter],
) -> None:
    """Raise if a rank has found a value that is not finite, or all ranks nothing but zeros in an adapter's B."""
    for index, adapter in enumerate(adapters):
        problems = [answer[index] for answer in answers]
        non_finite = [problem for problem in problems if problem is not None and "finite" in problem]
        if non_finite or (all(problems) and not whole[index]):
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
    """What PEFT calls an adapter. A user's name may be one that a module cannot have."""
    return f"a{index}"
