"""Writing the adapter as PEFT's folder."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import has_tied_head, named_trainable_parameters
from qlora_dist.adapters.peft_keys import peft_key
from qlora_dist.adapters.validate_adapter import find_invalid_values
from qlora_dist.compat.peft import peft
from qlora_dist.errors import UserError
from qlora_dist.shard_view import full_tensor


def export_adapter(
    model: PreTrainedModel, config: peft.LoraConfig, out: Path, add_files: Callable[[Path], None] | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (fp32), as `PeftModel.from_pretrained` reads them.

    Called on all ranks: each parameter is gathered by all, and kept by rank 0 alone. The folder appears complete or
    not at all; one of that name is replaced.

    Args:
        model: with the adapter.
        config: of the adapter.
        out: the folder.
        add_files: called on rank 0 with the folder, to write what belongs beside the adapter.

    Raises:
        UserError: on rank 0, if it cannot be written, or is not worth it: an empty one is not found out elsewhere.
    """
    tensors: dict[str, torch.Tensor] = {}
    tied = _tied_names(model)
    for name, parameter in named_trainable_parameters(model):
        whole = full_tensor(parameter).detach()
        if dist.get_rank() == 0:
            for key in (name, *tied.get(name, ())):
                tensors[peft_key(key)] = whole.float().cpu().contiguous().clone()
    if dist.get_rank() == 0:
        if (problem := find_invalid_values(tensors.items())) is not None:
            raise UserError(
                f"{out}: no adapter is written, because {problem}; train longer, or lower optim.lr", local_only=True
            )
        try:
            write_adapter(tensors, config_to_save(config), out, add_files)
        except (OSError, SafetensorError) as error:  # of a full disk safetensors says so in its own way
            raise UserError(
                f"{out}: the adapter cannot be written ({error}); make room, then the same command goes on from the "
                "last checkpoint",
                local_only=True,
            ) from None
    dist.barrier()


def config_to_save(config: peft.LoraConfig) -> peft.LoraConfig:
    """Return the configuration as it is saved: PEFT knows no dropout where an adapter's targets are parameters."""
    saved = copy.copy(config)
    if saved.target_parameters:
        saved.lora_dropout = 0.0
    return saved


def shapes_to_save(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `export_adapter` writes, by PEFT's names. The model is not sharded yet."""
    tied = _tied_names(model)
    return {
        peft_key(key): tuple(parameter.shape)
        for name, parameter in named_trainable_parameters(model)
        for key in (name, *tied.get(name, ()))
    }


def write_adapter(
    tensors: dict[str, torch.Tensor],
    config: peft.LoraConfig,
    out: Path,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder: complete or not at all, in the place of one of that name."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(partial))
        if add_files is not None:
            add_files(partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tied_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """By the name of a parameter, other names under which PEFT looks for it: those of a tied output head."""
    if not has_tied_head(model):
        return {}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    return {f"{paths[id(embedding)]}.weight": [f"{paths[id(head)]}.weight"]}
