"""Rows of CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from qlora_dist.data.json_files import MAX_ROW_SIZE, ROW_TOO_LONG_REASON, format_utf8_error, read_lines
from qlora_dist.data.source_row import BadRow
from qlora_dist.data.validate import InvalidRowError, RawRow, join_names
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
