"""Rows of a data file of any supported type."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from qlora_dist.data.arrow_files import read_parquet_rows
from qlora_dist.data.json_files import (
    MAX_ROW_SIZE,
    ROW_TOO_LONG_REASON,
    format_utf8_error,
    read_json_rows,
    read_jsonl_rows,
    read_lines,
)
from qlora_dist.data.source_row import BadRow
from qlora_dist.data.validate import InvalidRowError, RawRow, format_exception_message, join_names
from qlora_dist.errors import UserError


def read_csv_rows(name: str, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    """Yield the rows of a CSV file with commas, double quotes and a header; every cell is text.

    Python's reader is used, because a row's location is the line on which it starts, and quoted cells may hold line
    feeds.
    """
    columns: list[str] = []
    for line, cells in _rows(file):
        location = f"{name}, line {line}"
        if not columns:
            if isinstance(cells, InvalidRowError):
                raise UserError(f"{location}: {cells}")
            columns = cells
            duplicates = {column for column in columns if columns.count(column) > 1}
            if duplicates:
                raise UserError(
                    f"{location}: the header names a column twice ({join_names(sorted(duplicates))}); rename one"
                )
        elif isinstance(cells, InvalidRowError):
            yield BadRow(location, str(cells))
        elif len(cells) != len(columns):
            yield BadRow(
                location,
                f"the row has {len(cells)} cells, the header {len(columns)}; put cells that hold commas in quotes",
            )
        else:
            yield location, dict(zip(columns, cells, strict=True))


def _rows(file: BinaryIO) -> Iterator[tuple[int, list[str] | InvalidRowError]]:
    """Yield the first line of each row, and its cells or the reason why it is invalid; blank lines are skipped."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_SIZE))  # a limit of the process, 128 KiB by default
    mistakes: list[str] = []
    reader = csv.reader(_text(file, mistakes), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            mistakes.append(f"not valid CSV ({error}); double the quotes within a quoted cell")
            cells = []
        if mistakes:
            yield start, InvalidRowError(mistakes[0])
            mistakes.clear()
        elif cells:
            yield start, cells


def _text(file: BinaryIO, mistakes: list[str]) -> Iterator[str]:
    """Yield the lines as text. Errors are collected, not raised, because `csv.reader` could not continue."""
    for _, line in read_lines(file):
        if len(line) > MAX_ROW_SIZE:
            mistakes.append(f"the line is {ROW_TOO_LONG_REASON}")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            mistakes.append(format_utf8_error(error))
            yield line.decode("utf-8", errors="replace")


_TEXT_READERS: dict[str, Callable[[str, BinaryIO], Iterator[RawRow | BadRow]]] = {
    ".jsonl": read_jsonl_rows,
    ".ndjson": read_jsonl_rows,
    ".json": read_json_rows,
    ".csv": read_csv_rows,
}
DATA_FILE_TYPES = ".jsonl, .json, .csv (each also with .gz) or .parquet"


def data_file_type(path: Path) -> str | None:
    """Return the type of a file, '.jsonl' also for 'a.JSONL.gz'; None if it is not supported."""
    name = path.name.lower()
    known = (".parquet", *_TEXT_READERS)
    return next(
        (end for end in known if name.endswith(end) or (end in _TEXT_READERS and name.endswith(f"{end}.gz"))), None
    )


def file_extension(path: Path) -> str:
    """Return the extension with the one before `.gz`, such as '.jsonl' or '.jsonl.gz'."""
    return "".join(path.suffixes[-2 if path.suffix.lower() == ".gz" else -1 :])


def read_data_file(path: Path) -> Iterator[RawRow | BadRow]:
    kind = data_file_type(path)
    if kind is None:
        raise UserError(f"{path}: {_unsupported_file_reason(path)}")
    if kind == ".parquet":
        yield from read_parquet_rows(path)
        return
    try:
        with _open(path) as file:
            yield from _TEXT_READERS[kind](str(path), file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: not a gzip file, or damaged or truncated ({format_exception_message(error)}); get it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a file that can") from None


def _unsupported_file_reason(path: Path) -> str:
    name = path.name.lower()
    if name.endswith((".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".7z", ".br")):
        return f"files compressed as {path.suffix} are not read; decompress it, or compress it with gzip"
    if name.endswith((".txt", ".md", ".html")):
        return 'plain text has no rows; write each document as {"text": ...} on a line of a .jsonl file'
    if name.endswith((".tsv", ".tab")):
        return "tab-separated files are not read; write it with commas, as .csv"
    if name.endswith((".arrow", ".feather")):
        return "a single Arrow file is not read; give the folder that `save_to_disk` wrote, or write Parquet"
    return f"its name does not show the type of the file; rename it to end in {DATA_FILE_TYPES}"


def _open(path: Path) -> BinaryIO:
    is_gzip = path.name.lower().endswith(".gz")
    return io.BufferedReader(gzip.open(path), 1 << 20) if is_gzip else path.open("rb", buffering=1 << 20)
