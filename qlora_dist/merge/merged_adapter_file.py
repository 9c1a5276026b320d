"""Record in a merged folder of the adapter that was merged, for adapters that are trained on the merged model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qlora_dist.errors import UserError
from qlora_dist.model.model_folder import read_model_json

MERGED_ADAPTER_FILE = "merged_adapter.json"
"""Name of the file. `qlora-dist quantize` copies it like all JSON files."""


def write_merged_adapter_file(folder: Path, adapter: Path) -> None:
    """Record in a merged folder which adapter it holds."""
    record = {"adapter": str(adapter), "adapter_sha256": _sha256(adapter)}
    (folder / MERGED_ADAPTER_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_trained_on_merged(adapter: Path, base: Path, earlier_adapter: Path) -> None:
    """Check that an adapter was trained on a model into which an earlier adapter was merged.

    Args:
        adapter: the later adapter, for messages.
        base: folder that it was trained on.
        earlier_adapter: the earlier adapter.

    Raises:
        UserError: it was not, or the folder does not exist.
    """
    if not (base / MERGED_ADAPTER_FILE).exists():
        raise UserError(
            f"{adapter}: was trained on {base}, which is no folder that qlora-dist merge has written; merge "
            f"{earlier_adapter} and train on that, or compose adapters of one base with --how cat"
        )
    if read_model_json(base / MERGED_ADAPTER_FILE).get("adapter_sha256") != _sha256(earlier_adapter):
        raise UserError(
            f"{adapter}: was trained on {base}, which holds another adapter than {earlier_adapter}; name the adapters "
            "in the order of their training"
        )


def _sha256(adapter: Path) -> str:
    digest = hashlib.sha256()
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
