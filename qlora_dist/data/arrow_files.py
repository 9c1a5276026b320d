"""Rows from Parquet files and from the Arrow files that `datasets` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.data.json_text import parse
from qlora_dist.data.records import Record, told
from qlora_dist.data.row import BadRow
from qlora_dist.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 64
"""Rows made into Python objects at a time."""


def read_parquet(path: Path) -> Iterator[Record | BadRow]:
    """The rows of a Parquet file, of which some pages are held.

    Raises:
        UserError: it is none, or it was cut off.
    """
    import pyarrow.parquet as pq  # a tenth of a second that JSONL need not wait

    # pre_buffer, the default, would hold a row group's columns whole: 388 MB of a file of 382 MiB, instead of 6
    yield from _read(path, lambda path: pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False).iter_batches(_ROWS))


def read_arrow(paths: list[Path]) -> Iterator[Record | BadRow]:
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


def _read(path: Path, batches: Callable[[Path], Iterator[pa.RecordBatch]]) -> Iterator[Record | BadRow]:
    import pyarrow as pa

    row = 0
    try:
        for batch in batches(path):
            for start in range(0, batch.num_rows, _ROWS):
                for fields in _fields(batch.slice(start, _ROWS)):
                    row += 1
                    place = f"{path}, row {row}"
                    yield BadRow(place, fields) if isinstance(fields, str) else (place, fields)
    except (pa.ArrowException, OSError, ValueError) as error:  # the last: the name of a column that is not UTF-8
        raise UserError(
            f"{path}: cannot be read after row {row} ({told(error)}); it is damaged or not of this type, get it anew"
        ) from None


def _fields(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """Each row's fields, or what is wrong with it."""
    decoders = {field.name: decode for field in batch.schema if (decode := _json_decoder(field.type))}
    try:
        rows = batch.to_pylist()
        for row in rows if decoders else ():
            for name, decode in decoders.items():
                row[name] = decode(row[name])
    except (
        ValueError,
        OverflowError,
        KeyError,
    ) as error:  # text that is not UTF-8, a date before the year 1, a time zone
        if batch.num_rows > 1:  # one of them; find it
            return [row for index in range(batch.num_rows) for row in _fields(batch.slice(index, 1))]
        return [f"cannot be read ({told(error)}); correct it or take the row out"]
    return rows


def _json_decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes values of text in JSON, which is how `datasets` keeps lists of objects that differ; None: no such."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else parse(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = _json_decoder(kind.value_type)
        return item and (lambda values: values and [item(value) for value in values])
    if pa.types.is_struct(kind):
        inner = {field.name: decode for field in kind if (decode := _json_decoder(field.type))}
        return (
            (lambda struct: struct and {name: inner[name](v) if name in inner else v for name, v in struct.items()})
            if inner
            else None
        )
    return None
