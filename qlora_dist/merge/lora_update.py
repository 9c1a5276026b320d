"""Updates of a saved LoRA adapter, with checks of its values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_dist.adapters.saved_adapter import LowRankUpdate, SavedAdapter, find_invalid_values, read_saved_adapter
from qlora_dist.errors import UserError
from qlora_dist.io.adapter_files import ADAPTER_WEIGHTS_NAME
from qlora_dist.io.safetensors_file import SafetensorsReader, read_safetensors_header


def read_checked_adapter(path: Path) -> SavedAdapter:
    """Read a folder's configuration and its file's header, and check every value."""
    adapter = read_saved_adapter(path)
    with SafetensorsReader() as reader:
        problem = find_invalid_values(
            (key, reader.read(entry)) for key, entry in read_safetensors_header(path / ADAPTER_WEIGHTS_NAME).items()
        )
    if problem is not None:
        raise UserError(f"{path}: {problem}; use an earlier checkpoint, or train longer")
    return adapter


def add_update_to_rows(weight: torch.Tensor, update: LoraUpdate, first_row: int) -> torch.Tensor:
    """Return rows of the merged matrix, given fp32[n, in_features] of the base's from `first_row` on.

    They are W + s B A, or with DoRA m (W + s B A) / |W + s B A| with row norms (arXiv:2402.09353, equation 5).
    """
    rows = slice(first_row, first_row + weight.shape[0])
    merged = torch.addmm(weight, update.b[rows], update.a, alpha=update.scaling)
    if update.magnitude is not None:
        merged *= (update.magnitude[rows] / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
    return merged


@dataclass(frozen=True)
class LoraUpdate:
    """Tensors of a `LowRankUpdate`, in fp32."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None


def read_lora_update(update: LowRankUpdate, reader: SafetensorsReader) -> LoraUpdate:
    """Read the tensors of an update, of all experts together."""
    magnitude = None if update.magnitude is None else reader.read(update.magnitude).float().flatten()
    return LoraUpdate(reader.read(update.a).float(), reader.read(update.b).float(), update.scaling, magnitude)


def expert_lora_update(values: LoraUpdate, update: LowRankUpdate, expert: int, rows: slice) -> LoraUpdate:
    """Return the update of some rows of one expert's matrix, from the update of all experts."""
    a = values.a.view(update.experts, -1, values.a.shape[1])[expert]
    b = values.b.view(len(values.b), -1, update.experts)[:, :, expert]
    if update.swap_in_out:
        a, b = b.t(), a.t()
    return LoraUpdate(a.contiguous(), b[rows].contiguous(), values.scaling, None)
