"""Export of an adapter as a folder in PEFT's format."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qlora_dist.adapters.attach import ADAPTER_NAME, has_tied_head, named_trainable_parameters
from qlora_dist.adapters.saved_adapter import find_invalid_values
from qlora_dist.compat.peft import peft
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import PEFT_PREFIX
from qlora_dist.layers.embedding import vocab_weight_names
from qlora_dist.layers.token_rows import TOKEN_ROWS_NAME
from qlora_dist.shard_view import full_tensor


def peft_key(name: str, adapter: str = ADAPTER_NAME) -> str:
    """Return the key of a parameter in PEFT's file.

    It has neither the adapter's name nor `.weight` after a magnitude vector. PEFT wraps an experts module once per
    adapted parameter, input projections first, so their keys contain `base_layer`.
    """
    name = name.replace(f"lora_magnitude_vector.{adapter}.weight", "lora_magnitude_vector")
    name = name.replace(f".{adapter}.", ".").replace(f".{TOKEN_ROWS_NAME}", f".token_adapter.{TOKEN_ROWS_NAME}")
    name = re.sub(r"\.experts\.(gate_)?up_proj\.lora_", ".experts.base_layer.lora_", name)
    name = re.sub(r"\.experts\.down_proj\.lora_", ".experts.lora_", name)
    return PEFT_PREFIX + name


def export_adapter(
    model: PreTrainedModel, config: peft.LoraConfig, out: Path, add_files: Callable[[Path], None] | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (fp32), as `PeftModel.from_pretrained` reads them.

    A collective of the default process group: all ranks gather each parameter, and rank 0 keeps it. Rank 0 calls
    `add_files` with the folder, to write further files.

    Raises:
        UserError: on rank 0, if the adapter cannot be written, has values that are not finite, or changes nothing.
    """
    tensors: dict[str, torch.Tensor] = {}
    tied = _tied_names(model)
    for name, parameter in named_trainable_parameters(model):
        full = full_tensor(parameter).detach()
        if dist.get_rank() == 0:
            for key in (name, *tied.get(name, ())):
                tensors[peft_key(key)] = full.float().cpu().contiguous().clone()
    if dist.get_rank() == 0:
        if (problem := find_invalid_values(tensors.items())) is not None:
            raise UserError(
                f"{out}: no adapter is written, because {problem}; train longer, or lower optim.lr", local_only=True
            )
        try:
            write_adapter(tensors, config_to_save(config), out, add_files)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            raise UserError(
                f"{out}: the adapter cannot be written ({error}); make room, then the same command resumes from the "
                "last checkpoint",
                local_only=True,
            ) from None
    dist.barrier()


def config_to_save(config: peft.LoraConfig) -> peft.LoraConfig:
    """Return the configuration to save. Dropout is 0 if there are target parameters, as PEFT requires."""
    saved = copy.copy(config)
    if saved.target_parameters:
        saved.lora_dropout = 0.0
    return saved


def shapes_to_save(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `export_adapter` writes, by PEFT's names, for an unsharded model."""
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
    """Write the folder. A folder of that name is replaced only when the new one is complete."""
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
    """Map the name of a tied embedding's weight to the name of the output head, under which PEFT looks for it too."""
    if not has_tied_head(model):
        return {}
    embedding, head = vocab_weight_names(model)
    return {embedding: [head]}
