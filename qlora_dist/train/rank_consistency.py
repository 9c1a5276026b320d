"""Check that all ranks are about to do the same, before any weight is read.

Later, a difference would cause a hang or train an unintended model.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from qlora_dist import __version__
from qlora_dist.config.config_file import flatten_keys
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import RankInfo
from qlora_dist.runtime.object_collectives import all_gather_json
from qlora_dist.runtime.shared_folder import probe_shared_folder

PER_NODE_KEYS = ("data.cache", "data.workers", "paging.dir")
"""Keys whose values may differ between nodes."""
_COMPARED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
_MAX_VALUE_CHARS = 80
"""Characters of the longest value that is sent whole. A longer one is sent as its hash."""
_REMEDIES = {
    "config": "give all ranks the same file and overrides",
    "packages": "install the same versions on all nodes",
    "device": "start the run on machines that are alike, or set train.device",
    "data": "copy the same files to all nodes",
    "node": "start equally many ranks on each node",
}

RankFacts = dict[str, dict[str, str]]
"""Values by kind and name, such as `packages` and `torch`."""


def check_ranks_agree(
    config: Config, ranks: RankInfo, device: torch.device, data: Mapping[str, str] | None = None
) -> None:
    """Compare configuration, versions, type of device, data (its sha256) and nodes. Called on all ranks.

    Raises:
        UserError: on all ranks, with the first difference of the first rank that has one.
    """
    host = socket.gethostname()
    answers = all_gather_json([host, rank_facts(config, ranks, device, data)])
    if (difference := first_difference(answers)) is not None:
        raise UserError(difference)
    places = all_gather_json([host, ranks.local_rank, _gpu_uuid(device)])
    if (mistake := find_misplaced_rank(places, ranks.local_world_size)) is not None:
        raise UserError(mistake)


def check_shared_run_dir(config: Config, ranks: RankInfo) -> None:
    """Check that all ranks see the same run folder. Called on all ranks, which all raise the UserError.

    Without this check, the first checkpoint would fail.
    """
    if ranks.world_size == 1:
        return
    path = run_path(config.run)
    sharing = probe_shared_folder(path)
    if sharing.failure is not None:
        raise UserError(f"{path}: cannot be written ({sharing.failure}); give run.dir a folder that can")
    if sharing.blind_ranks:
        rank = sharing.blind_ranks[0]
        more = f" (and {len(sharing.blind_ranks) - 1} more)" if len(sharing.blind_ranks) > 1 else ""
        raise UserError(
            f"{path}: rank {rank}{more} on {sharing.hosts[rank]} does not see what rank 0 on {sharing.hosts[0]} writes "
            "there; give run.dir a folder that all nodes share, by its whole path"
        )


def rank_facts(config: Config, ranks: RankInfo, device: torch.device, data: Mapping[str, str] | None) -> RankFacts:
    """Return the facts that must be the same on all ranks."""
    packages = {name: metadata.version(name) for name in _COMPARED_PACKAGES}
    python = ".".join(platform.python_version_tuple()[:2])
    leaves = flatten_keys(config.model_dump(mode="json"))
    return {
        "packages": {"qlora-dist": __version__, "Python": python, **packages},
        "config": {key: _shorten(value) for key, value in leaves.items() if key not in PER_NODE_KEYS},
        "device": {"the device": device.type},
        "node": {"the number of ranks on the node": str(ranks.local_world_size)},
        "data": {f"the content of data.{name}": f"sha256:{sha256[:16]}" for name, sha256 in (data or {}).items()},
    }


def first_difference(answers: Sequence[tuple[str, RankFacts] | list[Any]]) -> str | None:
    """Return a sentence about the first rank whose facts differ from those on rank 0; None if no rank does."""
    first_host, first = answers[0]
    for rank, (host, own) in enumerate(answers):
        if own == first:
            continue
        for kind, remedy in _REMEDIES.items():
            for name in sorted(first[kind].keys() | own[kind].keys()):
                value, expected = own[kind].get(name, "none"), first[kind].get(name, "none")
                if value != expected:
                    return (
                        f"rank {rank} on {host} differs from rank 0 on {first_host}: {name} is {value} there and "
                        f"{expected} here; {remedy}"
                    )
    return None


def find_misplaced_rank(places: Sequence[tuple[str, int, str] | list[Any]], local_world_size: int) -> str | None:
    """Return a sentence about the first rank that the launcher has misplaced; None if there is none.

    A place is the host, the number on the node, and the GPU ("" without one).
    """
    users: dict[tuple[str, str], int] = {}
    for rank, (host, local_rank, gpu) in enumerate(places):
        if local_rank != (expected := rank % local_world_size):
            return (
                f"rank {rank} is number {local_rank} on {host}, not number {expected}: neighbouring ranks belong on "
                "one node; start with srun --distribution=block, or mpirun --map-by slot"
            )
        other = users.setdefault((host, gpu), rank)
        if gpu and other != rank:
            return (
                f"ranks {other} and {rank} on {host} have the same GPU ({gpu}); start one rank per GPU, or give each "
                "its own (srun --gpus-per-task=1)"
            )
    return None


def _gpu_uuid(device: torch.device) -> str:
    """Return the GPU's UUID, because device indices differ between processes; "" on a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
