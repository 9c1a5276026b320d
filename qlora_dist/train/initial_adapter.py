"""The adapter that a run begins from (`lora.from`): the check that it fits the run, and its values."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import ADAPTER_NAME, is_adapter_parameter, named_trainable_parameters
from qlora_dist.adapters.load_adapter import read_local_shard, saved_entries_by_parameter
from qlora_dist.adapters.saved_adapter import find_invalid_values, missing_module_error, read_saved_adapter
from qlora_dist.adapters.trainable_tokens import vocab_modules
from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import SafetensorsReader, TensorEntry
from qlora_dist.layers.token_rows import token_rows
from qlora_dist.runtime.object_collectives import all_gather_json
from qlora_dist.shard_view import local_tensor


def find_initial_tensors(path: Path, model: PreTrainedModel, targets: Set[str], base: Path) -> dict[str, TensorEntry]:
    """Return the tensor in an adapter's file for each trained parameter.

    The model is on the meta device, with the run's own adapter for the matrices `targets`. `base` is the model's
    folder.

    Raises:
        UserError: the adapter does not change the same modules that the run trains.
    """
    adapter = read_saved_adapter(path)
    for module in sorted(adapter.low_rank.keys() - targets):
        if module not in {name for name, _ in model.named_modules()}:
            raise missing_module_error(adapter, module, base)
        raise UserError(f"lora.targets: leaves out {module}, which {path} adapts; remove the key")
    for module in sorted(targets - adapter.low_rank.keys()):
        raise UserError(
            f"lora.from: {path} does not adapt {module}, which lora.targets names; set lora.targets to layers that it "
            "adapts everywhere, or remove lora.from"
        )
    for module, saved in adapter.token_rows.items():
        trained_module = vocab_modules(model).get(module)
        rows = None if trained_module is None else token_rows(trained_module)
        if rows is None or rows.ids != saved.ids:
            raise UserError(
                f"lora.from: {path} trains other rows of {module} than this run; set model.add_tokens and "
                "lora.trainable_tokens as in that adapter's run"
            )
    entries = saved_entries_by_parameter(model, adapter, ADAPTER_NAME, base)
    trained = {name for name, _ in named_trainable_parameters(model)}
    for name in sorted(trained ^ entries.keys()):
        relation = "is trained whole by this run and not in" if name in trained else "is not trained by this run and in"
        raise UserError(f"lora.from: {name} {relation} {path}; set lora.modules_to_save as in that adapter's run")
    return entries


@torch.no_grad()
def load_initial_tensors(model: PreTrainedModel, entries: Mapping[str, TensorEntry]) -> None:
    """Fill this rank's shards of the trained parameters. Called on all ranks, after the model has its memory.

    If a value is not finite, UserError is raised on all ranks.
    """
    error = None
    with SafetensorsReader() as reader:
        for name, parameter in named_trainable_parameters(model):
            values = read_local_shard(parameter, entries[name], reader, is_low_rank=is_adapter_parameter(name))
            local_tensor(parameter).copy_(values)
            problem = find_invalid_values([(name, values)])
            error = error or (problem if problem is not None and "finite" in problem else None)
    errors = [answer for answer in all_gather_json(error) if answer is not None]
    if errors:
        raise UserError(f"lora.from: {errors[0]}; begin from an earlier adapter")
