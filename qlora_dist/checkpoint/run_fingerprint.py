"""The settings that a run must share with the checkpoint that it resumes from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError

_SAMPLE_BYTES = 1 << 16

_COMPARED_KEYS = {
    "data": ("seq_len", "too_long", "packing", "group_by_length"),
    "train": ("global_batch", "seed", "checkpointing"),
}
"""Compared keys of these sections. All keys of model, lora and optim are compared."""
_IGNORED_KEYS = ("model.base", "model.attention", "lora.from")
"""Keys of the compared sections that may change silently. The paths of base and adapter may, not their content."""
_COMPARED_HASHES = (("base", "another base model"), ("data", "other training data"), ("adapter", "another lora.from"))
_REPORTED_KEYS = ("optim", "lora.dropout", "model.compute_dtype", "train.checkpointing")
"""Keys that may change, which the run reports."""


def run_fingerprint(config: Config, base: str, data: str, adapter: str | None = None) -> dict[str, Any]:
    """Return the run's fingerprint, given the fingerprints of base and data, and the sha256 of `lora.from`, if any."""
    tree = config.model_dump(mode="json")
    compared = {section: tree[section] for section in ("model", "lora", "optim")}
    compared |= {section: {key: tree[section][key] for key in keys} for section, keys in _COMPARED_KEYS.items()}
    kept = {f"{section}.{key}": value for section, part in compared.items() for key, value in part.items()}
    return {"base": base, "data": data, "adapter": adapter, "config": kept}


def compare_fingerprints(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> list[str]:
    """Return the allowed differences as lines to print.

    Raises:
        UserError: there is a difference that is not allowed; the message names the first.
    """
    start_over = "or start over with run.overwrite=true --resume none"
    for name, description in _COMPARED_HASHES:
        if saved.get(name) != now.get(name):
            raise UserError(f"{folder}: was made with {description} than this run's; give the same, {start_over}")
    if foreign := sorted(saved["config"].keys() - now["config"].keys()):
        raise UserError(
            f"{folder}: names the key {foreign[0]}, which this version does not know; take the version that wrote it, "
            f"{start_over}"
        )
    differences = []
    for key, value in now["config"].items():
        before = saved["config"].get(key, value)
        if before == value or key in _IGNORED_KEYS:
            continue
        if not key.startswith(_REPORTED_KEYS):
            raise UserError(f"{folder}: was made with {key}: {before}, not {value}; set it back, {start_over}")
        differences.append(f"{key}: {value} from here on, {before} before")
    return differences


def is_same_run(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> bool:
    """Return whether a run with the fingerprint `now` could resume from a checkpoint in `folder`."""
    try:
        compare_fingerprints(saved, now, folder)
    except UserError:
        return False
    return True


def base_fingerprint(folder: Path) -> str:
    """Return the sha256 of a model folder's index and of each file's size, header and some bytes from its middle.

    Headers alone cannot distinguish two models of one shape, and reading 200 GB takes minutes.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors*")):
        digest.update(path.name.encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
            continue
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(size // 2)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
