"""Rows of Parquet files, and of the folders of Arrow files that `datasets.save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.data.source_row import BadRow
from qlora_dist.data.strict_json import load_json_object, parse_json
from qlora_dist.data.validate import RawRow, format_exception_message, join_names
from qlora_dist.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BATCH = 64
"""Rows that are converted to Python objects at a time."""


def read_parquet_rows(path: Path) -> Iterator[RawRow | BadRow]:
    """Yield the rows of a Parquet file; only a few pages are in memory at a time."""
    import pyarrow.parquet as pq  # here, because the import takes a tenth of a second that JSONL does not need

    # pre_buffer, the default, would hold all columns of a row group: 388 MB for a file of 382 MiB, instead of 6 MB.
    yield from _read(
        path, lambda path: pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False).iter_batches(ROWS_PER_BATCH)
    )


def is_saved_dataset(folder: Path) -> bool:
    """Return whether the folder is a saved `Dataset` or `DatasetDict`."""
    return _is_dataset_dict(folder) or all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def _is_dataset_dict(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file()


def saved_dataset_files(folder: Path, split: str) -> list[Path]:
    """Return the Arrow files of a saved `Dataset`, or of one split of a saved `DatasetDict`."""
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
            raise UserError(f"{file}: is missing; save the data set again")
    return files


def read_saved_dataset(folder: Path, split: str) -> Iterator[RawRow | BadRow]:
    """Yield the rows of a saved `Dataset`, or of one split of a saved `DatasetDict`."""
    import pyarrow as pa

    def batches(path: Path) -> Iterator[pa.RecordBatch]:
        for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
            batch.validate(full=True)  # because Arrow trusts its files: a wrong offset would crash the process
            yield batch

    for path in saved_dataset_files(folder, split):
        yield from _read(path, batches)


def _read_json_list(path: Path, key: str) -> list[Any]:
    value = load_json_object(path).get(key)
    if not isinstance(value, list):
        raise UserError(f"{path}: was not written by `datasets`; save the data set again")
    return value


def _read(path: Path, batches: Callable[[Path], Iterator[pa.RecordBatch]]) -> Iterator[RawRow | BadRow]:
    import pyarrow as pa

    row = 0
    try:
        for batch in batches(path):
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                for fields in record_batch_to_rows(batch.slice(start, ROWS_PER_BATCH)):
                    row += 1
                    location = f"{path}, row {row}"
                    yield BadRow(location, fields) if isinstance(fields, str) else (location, fields)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column name is not UTF-8
        raise UserError(
            f"{path}: cannot be read after row {row} ({format_exception_message(error)}); it is damaged or "
            "has another type; get it again"
        ) from None


def record_batch_to_rows(batch: pa.RecordBatch) -> Sequence[dict[str, Any] | str]:
    """Return, for each row, its fields or the reason why it cannot be read.

    A struct column has the fields of all its objects, and Arrow sets the fields that an object lacks to null. Such a
    null would be trained as an argument of a tool call. Nulls of struct fields are therefore dropped, because Arrow
    cannot tell them from written ones. Nulls in lists, maps, JSON text and columns are kept.
    """
    readers = [(field.name, read) for field in batch.schema if (read := _value_converter(field.type))]
    try:
        rows: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
        for row in rows if readers else ():
            for name, read in readers:
                row[name] = read(row[name])
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        # Text that is not UTF-8, a date before year 1, a time zone, a map key that is an object or a duplicate.
        if batch.num_rows > 1:  # Read the rows one by one to find the bad ones.
            return [row for index in range(batch.num_rows) for row in record_batch_to_rows(batch.slice(index, 1))]
        return [f"cannot be read ({format_exception_message(error)}); correct it or take the row out"]
    return rows


def _value_converter(arrow_type: pa.DataType) -> Callable[[Any], Any] | None:
    """Return the function that converts a value of this Arrow type; None if values stay unchanged.

    It drops null fields of objects, and decodes JSON text, which `datasets` writes for objects of different shapes.
    """
    import pyarrow as pa

    types = pa.types
    if isinstance(arrow_type, pa.JsonType):
        return lambda value: None if value is None else parse_json(value)
    if types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        item = _value_converter(arrow_type.value_type)
        return item and (lambda values: values and [item(value) for value in values])
    if types.is_map(arrow_type):
        value_of = _value_converter(arrow_type.item_type)
        return value_of and (lambda map: map and {key: value_of(value) for key, value in map.items()})
    if types.is_struct(arrow_type):
        inner = [(field.name, _value_converter(field.type)) for field in arrow_type]
        return lambda struct: (
            struct
            and {name: read(struct[name]) if read else struct[name] for name, read in inner if struct[name] is not None}
        )
    return None
