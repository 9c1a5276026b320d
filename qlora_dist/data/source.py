"""Data sources of a configuration: their files and their rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qlora_dist.config.sections import DataFormat, SourceConfig
from qlora_dist.data.arrow_files import is_saved_dataset, read_saved_dataset, saved_dataset_files
from qlora_dist.data.data_files import data_file_type, read_data_file
from qlora_dist.data.hub import is_hub_dataset_name, read_hub_dataset
from qlora_dist.data.row_fields import UnreadFields
from qlora_dist.data.row_formats import parse_rows
from qlora_dist.data.source_row import BadRow, SourceRow
from qlora_dist.data.split_files import find_split_files, glob_data_files, has_pattern
from qlora_dist.data.validate import RawRow
from qlora_dist.errors import UserError


def read_source_rows(
    source: SourceConfig,
    default_format: DataFormat = "auto",
    unread_fields: UnreadFields | None = None,
    revision: str | None = None,
) -> Iterator[SourceRow | BadRow]:
    """Yield the rows of a source in order, one in memory at a time. Only errors that no single row causes are raised.

    A source is a file, a folder of files, a folder saved by `datasets`, or the name of a data set on the hub.
    `revision` is the commit of the latter; None means the newest.
    """
    format_reason = f"the source's format is {source.format}" if source.format else f"data.format is {default_format}"
    rows = parse_rows(_read_raw_rows(source, revision), source.format or default_format, format_reason, unread_fields)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"{source.path}: no rows; write one JSON object with `messages` or `text` per line")


def source_files(source: SourceConfig) -> list[Path]:
    """Return the files of a source in order; none for a data set on the hub."""
    path = _local_path(source)
    if path is None:
        return []
    if path.is_dir():
        saved = is_saved_dataset(path)
        return saved_dataset_files(path, source.split) if saved else find_split_files(path, source.subset, source.split)
    return [path] if path.exists() else glob_data_files(str(path))


def _read_raw_rows(source: SourceConfig, revision: str | None) -> Iterator[RawRow | BadRow]:
    path = _local_path(source)
    if path is None:
        yield from read_hub_dataset(source.path, source.subset, source.split, revision)
    elif is_saved_dataset(path):
        yield from read_saved_dataset(path, source.split)
    else:
        for file in source_files(source):
            yield from read_data_file(file)


def _local_path(source: SourceConfig) -> Path | None:
    """Return the file, the folder or a pattern of files; None for a name on the hub."""
    if "://" in source.path:
        hub = "data set's name (owner/name)" if source.path.startswith("hf://") else "path of a local copy"
        raise UserError(f"{source.path}: URLs are not read; give the {hub}")
    # os.path, because Path raises if the user does not exist or the name is too long.
    path = Path(os.path.expanduser(source.path))  # noqa: PTH111
    if not source.path.strip():
        raise UserError("data: the path of a source is empty; give a file, a folder or a data set's name")
    pattern = not os.path.exists(path) and has_pattern(source.path)  # noqa: PTH110
    if not pattern and not os.path.exists(path):  # noqa: PTH110
        if source.path.startswith((".", "/", "~")) or data_file_type(path) or not is_hub_dataset_name(source.path):
            raise UserError(f"{source.path}: no such data file; give the path of a file or folder that is there")
        return None
    if path.is_dir() and not is_saved_dataset(path):
        return path  # The names of its files show its subsets and splits.
    if not pattern and not path.is_dir() and not path.is_file():
        raise UserError(f"{path}: neither a file nor a folder; give the path of one")
    if source.subset is not None:
        raise UserError(f"{path}: only data sets on the hub have subsets; take subset: {source.subset} out")
    if source.split != "train" and not is_saved_dataset(path):
        raise UserError(f"{path}: has no splits; take split: {source.split} out")
    return path
