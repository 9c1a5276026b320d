"""What a rank's file of a checkpoint holds by its manifest, and whether the file's own header agrees."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from qlora_dist.checkpoint.manifest import DamagedError, Manifest, file_of_rank
from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import read_header
from qlora_dist.optim.optimizer_state import moment_names
from qlora_dist.optim.state_pages import BLOCK

RANDOM_CPU, RANDOM_CUDA = "random.cpu", "random.cuda"
"""Names of a rank's random states in its file."""
_Kind = tuple[torch.dtype, int]
"""Type and number of elements of a tensor."""


def check_contents(folder: Path, rank: int, manifest: Manifest) -> None:
    """Compare the names, types and sizes in the header of a rank's file with the manifest.

    Sums say that a file is what was written with its manifest. They do not say that the two belong together.

    Raises:
        DamagedError: the two differ.
    """
    name = file_of_rank(rank)
    try:
        header = read_header(folder / name)
    except UserError as error:
        raise DamagedError(str(error).removeprefix(f"{folder}/").partition(";")[0]) from None
    found: dict[str, _Kind] = {key: (entry.dtype, math.prod(entry.shape)) for key, entry in header.items()}
    for key in (RANDOM_CPU, RANDOM_CUDA):
        dtype, _ = found.pop(key, (torch.uint8 if key == RANDOM_CUDA else None, 0))
        if dtype != torch.uint8:
            raise DamagedError(f"{name} has no random state {key}")
    expected = _tensors(rank, manifest)
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise DamagedError(
                f"{name} and the manifest differ: {key} is {_text(found, key)}, not {_text(expected, key)}"
            )
    for key, cut in manifest.cuts.items():
        shape = header[f"parameter/{key}"].shape if f"parameter/{key}" in header else cut.part_shape(rank)
        if rank < cut.shards and shape != cut.part_shape(rank):
            raise DamagedError(f"{name} and the manifest differ: parameter/{key} has the shape {shape}")


def _tensors(rank: int, manifest: Manifest) -> dict[str, _Kind]:
    """Return what a rank's file holds besides random states. Rank r holds shard r; ranks beyond hold none."""
    tensors: dict[str, _Kind] = {}
    for name, cut in manifest.cuts.items():
        if rank >= cut.shards or not (elements := cut.numel(rank)):
            continue
        tensors[f"parameter/{name}"] = torch.float32, elements
        for kind in moment_names(manifest.optimizer_bits):
            if kind.endswith(".absmax"):
                tensors[f"{kind}/{name}"] = torch.float32, -(-elements // BLOCK)
            else:
                dtype = torch.float32 if manifest.optimizer_bits == 32 else torch.uint8
                tensors[f"{kind}/{name}"] = dtype, elements
    return tensors


def _text(tensors: dict[str, _Kind], key: str) -> str:
    if key not in tensors:
        return "absent"
    dtype, elements = tensors[key]
    return f"{elements:,} x {str(dtype).removeprefix('torch.')}"
