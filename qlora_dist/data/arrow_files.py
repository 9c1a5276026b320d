"""Rows from Parquet files and from the Arrow files that `datasets` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.data.source_row import BadRow
from qlora_dist.data.strict_json import parse_json
from qlora_dist.data.validate import RawRow, format_exception_message
from qlora_dist.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_BATCH = 64
"""Rows made into Python objects at a time."""


def read_parquet_rows(path: Path) -> Iterator[RawRow | BadRow]:
    """The rows of a Parquet file, of which some pages are held.

    Raises:
        UserError: it is none, or it was cut off.
    """
    import pyarrow.parquet as pq  # a tenth of a second that JSONL need not wait

    # pre_buffer, the default, would hold a row group's columns whole: 388 MB of a file of 382 MiB, instead of 6
    yield from _read(
        path, lambda path: pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False).iter_batches(_ROWS_PER_BATCH)
    )


def read_arrow_rows(paths: list[Path]) -> Iterator[RawRow | BadRow]:
    """The rows of files in Arrow's streaming format, which are mapped into memory.

    Raises:
        UserError: one is none, or it was cut off.
    """
    import pyarrow as pa

    def batches(path: Path) -> Iterator[pa.RecordBatch]:
        for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
            batch.validate(full=True)  # Arrow trusts its files: a wrong offset would end the process without a word
            yield batch

    for path in paths:
        yield from _read(path, batches)


def _read(path: Path, batches: Callable[[Path], Iterator[pa.RecordBatch]]) -> Iterator[RawRow | BadRow]:
    import pyarrow as pa

    row = 0
    try:
        for batch in batches(path):
            for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                for fields in record_batch_to_rows(batch.slice(start, _ROWS_PER_BATCH)):
                    row += 1
                    place = f"{path}, row {row}"
                    yield BadRow(place, fields) if isinstance(fields, str) else (place, fields)
    except (pa.ArrowException, OSError, ValueError) as error:  # the last: the name of a column that is not UTF-8
        raise UserError(
            f"{path}: cannot be read after row {row} ({format_exception_message(error)}); it is damaged or not of this type, get it anew"
        ) from None


def record_batch_to_rows(batch: pa.RecordBatch) -> Sequence[dict[str, Any] | str]:
    """Return each row's fields, or what is wrong with the row.

    A struct column gives every object the fields of all objects, and Arrow fills those that an object lacks with null.
    Such a null would be trained as an argument of a tool call. It is left out: Arrow cannot tell it from a null that
    was written. The nulls in lists, in maps and in JSON text are kept, and so is a column's.
    """
    readers = [(field.name, read) for field in batch.schema if (read := _value_converter(field.type))]
    try:
        rows: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
        for row in rows if readers else ():
            for name, read in readers:
                row[name] = read(row[name])
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        # text that is not UTF-8, a date before the year 1, a time zone, a map's key that is an object or stands twice
        if batch.num_rows > 1:  # one of them; find it
            return [row for index in range(batch.num_rows) for row in record_batch_to_rows(batch.slice(index, 1))]
        return [f"cannot be read ({format_exception_message(error)}); correct it or take the row out"]
    return rows


def _value_converter(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return what turns a value of this type into the row's; None: the value stays as it is.

    Objects lose the fields that are null. Text in JSON, which `datasets` writes for objects that differ, is decoded.
    """
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else parse_json(value)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _value_converter(kind.value_type)
        return item and (lambda values: values and [item(value) for value in values])
    if types.is_map(kind):
        value_of = _value_converter(kind.item_type)
        return value_of and (lambda map: map and {key: value_of(value) for key, value in map.items()})
    if types.is_struct(kind):
        inner = [(field.name, _value_converter(field.type)) for field in kind]
        return lambda struct: (
            struct
            and {name: read(struct[name]) if read else struct[name] for name, read in inner if struct[name] is not None}
        )
    return None
