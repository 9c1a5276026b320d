"""Rows from CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from qlora_dist.data.json_files import MAX_ROW_SIZE, ROW_TOO_LONG_REASON, format_utf8_error, read_lines
from qlora_dist.data.source_row import BadRow
from qlora_dist.data.validate import InvalidRowError, RawRow, join_names
from qlora_dist.errors import UserError


def read_csv_rows(name: str, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    """Cells separated by commas and quoted with ", below a line that names the columns; every cell is text.

    A row's place is the line on which it starts: quoted cells may hold line feeds.

    Raises:
        UserError: the header cannot be read, or names a column twice.
    """
    columns: list[str] = []
    for line, cells in _rows(file):
        place = f"{name}, line {line}"
        if not columns:
            if isinstance(cells, InvalidRowError):
                raise UserError(f"{place}: {cells}")
            columns = cells
            duplicates = {column for column in columns if columns.count(column) > 1}
            if duplicates:
                raise UserError(
                    f"{place}: the header names a column twice ({join_names(sorted(duplicates))}); rename one"
                )
        elif isinstance(cells, InvalidRowError):
            yield BadRow(place, str(cells))
        elif len(cells) != len(columns):
            yield BadRow(
                place,
                f"the row has {len(cells)} cells, the header {len(columns)}; put cells that hold commas in quotes",
            )
        else:
            yield place, dict(zip(columns, cells, strict=True))


def _rows(file: BinaryIO) -> Iterator[tuple[int, list[str] | InvalidRowError]]:
    """Where each row starts, and its cells or what is wrong with it; blank lines are skipped."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_SIZE))  # the process's; Python's own is 128 KiB
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
    """The lines. A mistake is noted and not raised: the reader above us could not go on after it."""
    for _, line in read_lines(file):
        if len(line) > MAX_ROW_SIZE:
            mistakes.append(f"the line is {ROW_TOO_LONG_REASON}")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            mistakes.append(format_utf8_error(error))
            yield line.decode("utf-8", errors="replace")
