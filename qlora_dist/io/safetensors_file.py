"""Access to safetensors files by byte range: reads into existing memory, and writes tensor by tensor.

The safetensors library reads and writes whole tensors. A rank needs only the bytes of its shard, and a quantizer must
not hold the file that it writes. The format is 8 bytes of header length, a JSON header, and the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import UserError

SAFETENSORS_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_LARGEST_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte of the data, counted from the start of the file."""
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Read the entries of a file's tensors, by name."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER_BYTES):
                raise ValueError("its first bytes are not a safetensors header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data_start = 8 + length
        entries = {name: _entry(path, name, item, data_start) for name, item in header.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy the folder again") from None
    except KeyError as error:
        raise UserError(
            f"{path}: has a tensor of a type that is not supported ({error}); give a copy of the model in 16 bit"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a safetensors file ({error}); copy it again") from None
    end = max((entry.stop for entry in entries.values()), default=data_start)
    if size < end:
        raise UserError(f"{path}: is truncated: {size:,} of {end:,} bytes are there; copy it again")
    return entries


def _entry(path: Path, name: str, item: dict[str, Any], data_start: int) -> TensorEntry:
    dtype, shape, (start, stop) = SAFETENSORS_DTYPES[item["dtype"]], tuple(item["shape"]), item["data_offsets"]
    if start < 0 or min(shape, default=0) < 0 or stop - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{name} has bytes {start} to {stop} for {item['dtype']} of shape {shape}")
    return TensorEntry(path=path, dtype=dtype, shape=shape, start=data_start + start, stop=data_start + stop)


def specs_bytes(specs: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> int:
    """Return the bytes of tensors with these types and shapes."""
    return sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in specs)


class SafetensorsReader:
    """Reader of byte ranges of tensors that counts the bytes and opens files at first use."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._descriptors: dict[Path, int] = {}

    def read_into(self, out: torch.Tensor, entry: TensorEntry, start: int = 0) -> None:
        """Fill `out` (contiguous, on the CPU, of any type) with the entry's bytes from `start` on."""
        view = out.view(torch.uint8).numpy().data.cast("B") if out.numel() else memoryview(b"")
        if entry.path not in self._descriptors:
            self._descriptors[entry.path] = os.open(entry.path, os.O_RDONLY)
        position, done = entry.start + start, 0
        while done < len(view):
            count = os.preadv(self._descriptors[entry.path], [view[done:]], position + done)
            if count == 0:
                raise UserError(f"{entry.path}: became shorter while it was read; copy it again", local_only=True)
            done += count
        self.bytes_read += done

    def read(self, entry: TensorEntry) -> torch.Tensor:
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(out.flatten(), entry)
        return out

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def tensors_equal(one: TensorEntry, other: TensorEntry) -> bool:
    """Return whether two tensors have equal shapes and values."""
    with SafetensorsReader() as reader:
        return one.shape == other.shape and torch.equal(reader.read(one), reader.read(other))


class SafetensorsWriter:
    """Writer of one tensor at a time to a file whose types and shapes are known beforehand.

    The file is named `NAME.partial` until `close` completes it.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires this key
        self._spans: dict[str, tuple[int, int]] = {}
        position = 0
        for name, dtype, shape in tensors:
            nbytes = dtype.itemsize * int(torch.Size(shape).numel())
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + nbytes]}
            self._spans[name] = (position, nbytes)
            position += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._data_start = 8 + len(text)
        self._written = dict.fromkeys(self._spans, 0)
        self._file = self._partial.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write a tensor, or a contiguous part of it from its byte `start` on."""
        first, nbytes = self._spans[name]
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        assert start + data.nbytes <= nbytes, f"{name}: {data.nbytes} bytes from {start} on for {nbytes}"
        self._written[name] += data.nbytes
        self._file.seek(self._data_start + first + start)
        self._file.write(data.data)

    def close(self) -> None:
        """Sync and rename the file."""
        missing = [name for name, (_, nbytes) in self._spans.items() if self._written[name] != nbytes]
        assert not missing, f"{self._path}: never written, or not as a whole: {missing[:3]}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)
