"""Rows of a data file of any supported type."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from qlora_dist.data.arrow_files import read_parquet_rows
from qlora_dist.data.csv_file import read_csv_rows
from qlora_dist.data.json_files import read_json_rows, read_jsonl_rows
from qlora_dist.data.source_row import BadRow
from qlora_dist.data.validate import RawRow, format_exception_message
from qlora_dist.errors import UserError

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
    """Yield the rows of a file."""
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


_ARCHIVE_SUFFIXES = (".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".7z", ".br")
_PLAIN_TEXT_SUFFIXES = (".txt", ".md", ".html")


def _unsupported_file_reason(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(_ARCHIVE_SUFFIXES):
        return f"files compressed as {path.suffix} are not read; decompress it, or compress it with gzip"
    if name.endswith(_PLAIN_TEXT_SUFFIXES):
        return 'plain text has no rows; write each document as {"text": ...} on a line of a .jsonl file'
    if name.endswith((".tsv", ".tab")):
        return "tab-separated files are not read; write it with commas, as .csv"
    if name.endswith((".arrow", ".feather")):
        return "a single Arrow file is not read; give the folder that `save_to_disk` wrote, or write Parquet"
    return f"its name does not show the type of the file; rename it to end in {DATA_FILE_TYPES}"


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path), 1 << 20)
    return path.open("rb", buffering=1 << 20)
