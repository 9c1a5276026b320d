"""The adapter that a run begins from (`lora.from`): whether it is the run's, and its values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import ADAPTER_NAME, adapter_parameters, is_lora
from qlora_dist.adapters.load_adapter import read_part, saved_tensors
from qlora_dist.adapters.saved_adapter import lacks, read_saved_adapter
from qlora_dist.adapters.validate_adapter import wrong_values
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import TENSORS
from qlora_dist.io.safetensors_file import Entry, Reader
from qlora_dist.runtime.object_collectives import gather_json
from qlora_dist.shard_view import local_part

_CHUNK_BYTES = 1 << 24


def find_first_values(path: Path, model: PreTrainedModel, targets: Set[str], base: Path) -> dict[str, Entry]:
    """The entries in an adapter's file for each parameter that is trained.

    Args:
        path: the adapter's folder.
        model: on meta, with the run's own adapter in it.
        targets: the paths of the matrices that the run adapts.
        base: the model's folder.

    Raises:
        UserError: the adapter changes something else than the run is to train.
    """
    adapter = read_saved_adapter(path)
    for module in sorted(adapter.low_rank.keys() - targets):
        if module not in {name for name, _ in model.named_modules()}:
            raise lacks(adapter, module, base)
        raise UserError(f"lora.targets: leaves out {module}, which {path} adapts; leave the key out")
    for module in sorted(targets - adapter.low_rank.keys()):
        raise UserError(
            f"lora.from: {path} does not adapt {module}, which lora.targets names; set lora.targets to layers that it "
            "adapts everywhere, or begin without it"
        )
    entries = saved_tensors(model, adapter, ADAPTER_NAME, base)
    trained = {name for name, _ in adapter_parameters(model)}
    for name in sorted(trained ^ entries.keys()):
        where = "is trained whole by this run and not in" if name in trained else "is not trained by this run and in"
        raise UserError(f"lora.from: {name} {where} {path}; set lora.modules_to_save as it was there")
    return entries


@torch.no_grad()
def read_first_values(model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
    """Fill this rank's parts of the trained parameters. Called on all ranks, when the model has its memory.

    Raises:
        UserError: on all ranks, if a value is not finite.
    """
    wrong = None
    with Reader() as reader:
        for name, parameter in adapter_parameters(model):
            values = read_part(parameter, entries[name], reader, is_low_rank=is_lora(name))
            local_part(parameter).copy_(values)
            found = wrong_values([(name, values)])
            wrong = wrong or (found if found is not None and "finite" in found else None)
    told = [answer for answer in gather_json(wrong) if answer is not None]
    if told:
        raise UserError(f"lora.from: {told[0]}; begin from an earlier adapter")


def adapter_sha256(path: Path) -> str:
    """sha256 of an adapter's tensors."""
    digest = hashlib.sha256()
    with (path / TENSORS).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
