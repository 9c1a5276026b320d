"""Data sources of a configuration: their files and their rows."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from qlora_dist.config.sections import DataFormat, SourceConfig
from qlora_dist.data.arrow_files import is_saved_dataset, read_saved_dataset, saved_dataset_files
from qlora_dist.data.data_files import DATA_FILE_TYPES, data_file_type, file_extension, read_data_file
from qlora_dist.data.hub import is_hub_dataset_name, read_hub_dataset
from qlora_dist.data.row_fields import UnreadFields
from qlora_dist.data.row_formats import parse_rows
from qlora_dist.data.source_row import BadRow, SourceRow
from qlora_dist.data.validate import RawRow, join_names
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
    pattern = not os.path.exists(path) and glob.has_magic(source.path)  # noqa: PTH110
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


_SHARD_NAME = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
"""Name of a shard that `datasets` wrote: train-00000-of-00002, with a hash in the old form."""
_SPLIT_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
"""Splits after which a file or a folder may be named."""
_METADATA_FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
"""JSON files without rows."""
_DATA = "data"
"""Folder of a data set that does not name a configuration."""
_MAX_FOLDER_DEPTH = 3


class _DataFile(NamedTuple):
    path: Path
    configuration: str | None
    split: str | None
    """Split after which the file is named, or None."""


def find_split_files(folder: Path, subset: str | None, split: str) -> list[Path]:
    """Return the files of a folder that belong to a split by name.

    If no file is named after a split other than `train`, all files belong to one split. Subfolders are searched if the
    folder itself has no files, as in data sets on the hub.
    """
    files = [_DataFile(path, None, _split_of(path)) for path in _files_in(folder)]
    if subset is not None or not files:
        nested = list(_nested_files(folder, None, None, 1))
        files = _select_subset(folder, nested, subset) if nested or subset is not None else files
    if not files:
        raise UserError(f"{folder}: the folder has no data file; put files ending in {DATA_FILE_TYPES} there")
    splits = sorted({file.split for file in files if file.split is not None})
    others = [file.path.name for file in files if file.split is None]
    if not splits or splits == ["train"]:
        if split != "train":
            raise UserError(f"{folder}: has no splits; take split: {split} out")
        return [file.path for file in files]
    if others:
        raise UserError(
            f"{folder}: has files of the splits {join_names(splits)} and others ({others[0]}); give a file, or a "
            "pattern such as FOLDER/*.jsonl, as the path"
        )
    split_name = _SPLIT_ALIASES.get(split, split)
    if len(splits) == 1 and split == "train":  # It is the default, and there is no choice.
        split_name = splits[0]
    chosen = [file.path for file in files if file.split == split_name]
    if not chosen:
        raise UserError(f"{folder}: has no split '{split}'; set `split` to one of {join_names(splits)}")
    return chosen


def glob_data_files(pattern: str) -> list[Path]:
    """Return the files that match a pattern such as `data/*.jsonl`, sorted by name."""
    # Path.glob takes no absolute patterns.
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    files = [path for path in paths if path.is_file()]
    if not files:
        raise UserError(f"{pattern}: no file matches; give the path of a file or folder that is there")
    return files


def _files_in(folder: Path) -> list[Path]:
    paths = _visible_paths(folder, Path.is_file)
    return [path for path in paths if data_file_type(path) and path.name not in _METADATA_FILES]


def _visible_paths(folder: Path, is_wanted: Callable[[Path], bool]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if is_wanted(path) and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error}); give a folder that can") from None


def _nested_files(folder: Path, configuration: str | None, split: str | None, depth: int) -> Iterator[_DataFile]:
    """Yield the files of subfolders, whose names are configurations or splits."""
    if depth > _MAX_FOLDER_DEPTH:
        return
    for path in _visible_paths(folder, Path.is_dir):
        own_split = _SPLIT_ALIASES.get(path.name, split)
        own_configuration = configuration if path.name == _DATA or path.name in _SPLIT_ALIASES else path.name
        for file in _files_in(path):
            yield _DataFile(file, own_configuration, _split_of(file) or own_split)
        yield from _nested_files(path, own_configuration, own_split, depth + 1)


def _split_of(path: Path) -> str | None:
    stem = path.name.removesuffix(file_extension(path))
    shard = _SHARD_NAME.fullmatch(stem)
    name = shard["split"] if shard else stem
    return _SPLIT_ALIASES.get(name.lower(), name if shard else None)


def _select_subset(folder: Path, files: list[_DataFile], subset: str | None) -> list[_DataFile]:
    names = sorted({file.configuration for file in files if file.configuration is not None})
    if subset is not None:
        chosen = [file for file in files if file.configuration == subset]
        if not chosen:
            known = f"set it to one of {join_names(names)}" if names else f"take subset: {subset} out"
            raise UserError(f"{folder}: has no subset '{subset}'; {known}")
        return chosen
    plain = [file for file in files if file.configuration is None]
    if plain or len(names) == 1:
        return plain or files
    raise UserError(f"{folder}: has several configurations; set `subset` to one of {join_names(names)}")
