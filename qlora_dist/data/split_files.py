"""Files selected by name: splits and configurations of a downloaded data set, and glob patterns."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qlora_dist.data.data_files import DATA_FILE_TYPES, data_file_type, file_extension
from qlora_dist.data.validate import join_names
from qlora_dist.errors import UserError

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


def has_pattern(path: str) -> bool:
    return glob.has_magic(path)


def glob_data_files(pattern: str) -> list[Path]:
    """Return the files that match a pattern such as `data/*.jsonl`, sorted by name."""
    # Path.glob takes no absolute patterns.
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    files = [path for path in paths if path.is_file()]
    if not files:
        raise UserError(f"{pattern}: no file matches; give the path of a file or folder that is there")
    return files


def _files_in(folder: Path) -> list[Path]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error}); give a folder that can") from None
    return [path for path in paths if data_file_type(path) and path.name not in _METADATA_FILES]


def _nested_files(folder: Path, configuration: str | None, split: str | None, depth: int) -> Iterator[_DataFile]:
    """Yield the files of subfolders, whose names are configurations or splits."""
    if depth > _MAX_FOLDER_DEPTH:
        return
    try:
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error}); give a folder that can") from None
    for path in subfolders:
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
