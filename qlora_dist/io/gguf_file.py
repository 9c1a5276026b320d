"""Headers of GGUF files: metadata, and the place of each tensor.

The reader of the package `gguf` takes seconds for a large vocabulary, because it makes several arrays of each token.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import TensorEntry

GGUF_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""ggml types that are plain numbers. All others are blocks of codes."""

_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Codes of `struct` for the types of values in the metadata. Types 8 and 9 are strings and arrays."""
_STRING, _ARRAY = 8, 9
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf")
_DEFAULT_ALIGNMENT = 32  # unless `general.alignment` gives another


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Tensor in a GGUF file."""

    ggml_type: str
    """Name of its type, such as Q4_K."""
    shape: tuple[int, ...]
    entry: TensorEntry
    """Place of its bytes. The type is uint8 and the last dimension counts bytes, unless the ggml type is in
    `GGUF_FLOATS`."""


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the metadata and the table of tensors of a GGUF file, but none of the tensors.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Raises:
        UserError: the file is damaged, of an unsupported version, or has tensors of an unknown type.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, table, start = _read_header(data)
        tensors = {name: _make_tensor(path, name, shape, kind, start + at) for name, shape, kind, at in table}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy the file again") from None
    except (ValueError, struct.error) as error:
        raise UserError(f"{path}: is not a GGUF file that can be read ({error}); get the file anew") from None
    end = max((tensor.entry.stop for tensor in tensors.values()), default=start)
    if size < end:
        raise UserError(f"{path}: is truncated: {size:,} of {end:,} bytes are there; copy it again")
    return GgufHeader(metadata=metadata, tensors=tensors)


def read_split_gguf(path: Path) -> GgufHeader:
    """Read the header of a file, with the tensors of all files if it is the first of a split model.

    Raises:
        UserError: a file is damaged or missing.
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    header = read_gguf_header(path)
    if match is None:
        return header
    if int(match["index"]) != 1:
        raise UserError(f"{path}: is part {int(match['index'])} of a model; give the first part")
    tensors = dict(header.tensors)
    for index in range(2, int(match["count"]) + 1):
        part = path.with_name(f"{match['stem']}-{index:05}-of-{match['count']}.gguf")
        if not part.exists():
            raise UserError(
                f"{path}: is part 1 of {int(match['count'])}, and {part.name} is missing; put all parts into one folder"
            )
        tensors |= read_gguf_header(part).tensors
    return replace(header, tensors=tensors)


def find_gguf(source: Path) -> Path | None:
    """Return the GGUF file that `source` is or holds, the first one of a split model; None if it holds none.

    Raises:
        UserError: a folder holds several models.
    """
    if source.is_file() and source.suffix == ".gguf":
        return source
    if not source.is_dir() or any(source.glob("*.safetensors")):
        return None
    files = sorted(source.glob("*.gguf"))
    first = [file for file in files if not (match := _SPLIT_NAME.fullmatch(file.name)) or int(match["index"]) == 1]
    if len(first) > 1:
        raise UserError(f"{source}: holds {len(first)} GGUF files, such as {first[0].name}; give one of them")
    return next(iter(first or files), None)


def _read_header(data: mmap.mmap) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
    """Return the metadata, name, shape, type and offset of each tensor, and the first byte of the data."""
    cursor = _Cursor(data)
    magic, version, tensor_count, value_count = cursor.read("4sIQQ")
    if magic != b"GGUF" or version not in _VERSIONS:
        raise ValueError(f"it begins with {magic!r} and version {version}")
    metadata = {}
    for _ in range(value_count):
        key = cursor.read_string()
        (kind,) = cursor.read("I")
        metadata[key] = cursor.read_value(kind)
    table = []
    for _ in range(tensor_count):
        name = cursor.read_string()
        (dimensions,) = cursor.read("I")
        *sizes, ggml_type, offset = cursor.read(f"{dimensions}QIQ")
        table.append((name, tuple(reversed(sizes)), ggml_type, offset))  # ggml names the fastest dimension first
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    return metadata, table, -(-cursor.position // alignment) * alignment


def _make_tensor(path: Path, name: str, shape: tuple[int, ...], type_number: int, start: int) -> GgufTensor:
    import gguf

    ggml_type = gguf.GGMLQuantizationType(type_number)  # a ValueError names an unknown type
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    columns = shape[-1] if shape else 1
    if columns % block:
        raise ValueError(f"{name} has rows of {columns} values in blocks of {block}")
    dtype = GGUF_FLOATS.get(ggml_type.name, torch.uint8)
    nbytes = math.prod(shape) // block * block_bytes
    entry = TensorEntry(
        path=path,
        dtype=dtype,
        shape=shape if dtype != torch.uint8 else (*shape[:-1], columns // block * block_bytes),
        start=start,
        stop=start + nbytes,
    )
    return GgufTensor(ggml_type=ggml_type.name, shape=shape, entry=entry)


class _Cursor:
    """Position in a file's bytes, which are little-endian."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def read(self, kinds: str) -> tuple[Any, ...]:
        kinds = f"<{kinds}"
        values = struct.unpack_from(kinds, self._data, self.position)
        self.position += struct.calcsize(kinds)
        return values

    def read_string(self) -> str:
        (length,) = self.read("Q")
        self._check_count(length)
        return bytes(self.read(f"{length}s")[0]).decode()

    def read_value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.read(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self.read_string()
        if kind != _ARRAY:
            raise ValueError(f"its metadata has a value of type {kind}")
        element, count = self.read("IQ")
        self._check_count(count)
        if element in _NUMBERS:
            return list(self.read(f"{count}{_NUMBERS[element]}"))
        return [self.read_value(element) for _ in range(count)]

    def _check_count(self, count: int) -> None:
        if count > len(self._data) - self.position:
            raise ValueError(f"a list of {count:,} elements goes beyond its end")
