"""The check that a rank's file of a checkpoint holds the tensors that the manifest names."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from qlora_dist.checkpoint.manifest import DamagedCheckpointError, Manifest, rank_file_name
from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import read_safetensors_header
from qlora_dist.optim.optimizer_state import state_tensor_names
from qlora_dist.optim.state_pages import STATE_BLOCK_SIZE

RNG_STATE_CPU, RNG_STATE_CUDA = "random.cpu", "random.cuda"
"""Names of a rank's random states in its file."""
_TensorSpec = tuple[torch.dtype, int]
"""Dtype and number of elements of a tensor."""


def check_rank_file(folder: Path, rank: int, manifest: Manifest) -> None:
    """Compare the names, dtypes and sizes in the header of a rank's file with the manifest.

    The sha256 shows that the bytes are unchanged. This shows that the file and the manifest belong together.

    Raises:
        DamagedCheckpointError: the two differ.
    """
    name = rank_file_name(rank)
    try:
        header = read_safetensors_header(folder / name)
    except UserError as error:
        raise DamagedCheckpointError(str(error).removeprefix(f"{folder}/").partition(";")[0]) from None
    present: dict[str, _TensorSpec] = {key: (entry.dtype, math.prod(entry.shape)) for key, entry in header.items()}
    for key in (RNG_STATE_CPU, RNG_STATE_CUDA):
        dtype, _ = present.pop(key, (torch.uint8 if key == RNG_STATE_CUDA else None, 0))
        if dtype != torch.uint8:
            raise DamagedCheckpointError(f"{name} has no random state {key}")
    expected = _expected_tensors(rank, manifest)
    for key in sorted(present.keys() | expected.keys()):
        if present.get(key) != expected.get(key):
            raise DamagedCheckpointError(
                f"{name} and the manifest differ: {key} is {_describe_tensor(present, key)}, "
                f"not {_describe_tensor(expected, key)}"
            )
    for key, cut in manifest.cuts.items():
        shape = header[f"parameter/{key}"].shape if f"parameter/{key}" in header else cut.shard_shape(rank)
        if rank < cut.shards and shape != cut.shard_shape(rank):
            raise DamagedCheckpointError(f"{name} and the manifest differ: parameter/{key} has the shape {shape}")


def _expected_tensors(rank: int, manifest: Manifest) -> dict[str, _TensorSpec]:
    """Return the tensors of a rank's file except random states. Rank r holds shard r, and further ranks hold none."""
    tensors: dict[str, _TensorSpec] = {}
    for name, cut in manifest.cuts.items():
        if rank >= cut.shards or not (elements := cut.shard_numel(rank)):
            continue
        tensors[f"parameter/{name}"] = torch.float32, elements
        for kind in state_tensor_names(manifest.optimizer_bits):
            if kind.endswith(".absmax"):
                tensors[f"{kind}/{name}"] = torch.float32, -(-elements // STATE_BLOCK_SIZE)
            else:
                dtype = torch.float32 if manifest.optimizer_bits == 32 else torch.uint8
                tensors[f"{kind}/{name}"] = dtype, elements
    return tensors


def _describe_tensor(tensors: dict[str, _TensorSpec], key: str) -> str:
    if key not in tensors:
        return "absent"
    dtype, elements = tensors[key]
    return f"{elements:,} x {str(dtype).removeprefix('torch.')}"
