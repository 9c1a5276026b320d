"""Folders that `datasets` has saved (`save_to_disk`), read without it: Arrow files, and JSON that lists them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_dist.data.arrow_files import read_arrow_rows
from qlora_dist.data.source_row import BadRow
from qlora_dist.data.validate import RawRow, join_names
from qlora_dist.errors import UserError


def is_saved_dataset(folder: Path) -> bool:
    """Whether it is such a folder, of a `Dataset` or a `DatasetDict`."""
    return _is_dataset_dict(folder) or all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def _is_dataset_dict(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file()


def saved_dataset_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a saved `Dataset`, or of that split of a saved `DatasetDict`.

    Raises:
        UserError: there is no such split, or the folder is incomplete.
    """
    if _is_dataset_dict(folder):
        splits = [str(name) for name in _read_json_list(folder / "dataset_dict.json", "splits")]
        if split not in splits:
            raise UserError(f"{folder}: has no split '{split}'; set `split` to one of {join_names(splits)}")
        folder = folder / split
    elif split != "train":  # the default
        raise UserError(f"{folder}: was saved without splits; take split: {split} out")
    entries = _read_json_list(folder / "state.json", "_data_files")
    files = [folder / str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is missing; save the data set anew")
    return files


def read_saved_dataset(folder: Path, split: str) -> Iterator[RawRow | BadRow]:
    """The rows of such a folder.

    Raises:
        UserError: as `saved_dataset_files`, or a file is damaged.
    """
    yield from read_arrow_rows(saved_dataset_files(folder, split))


def _read_json_list(path: Path, key: str) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        value = None
    if not isinstance(value, list):
        raise UserError(f"{path}: is not what `datasets` writes; save the data set anew")
    return value
