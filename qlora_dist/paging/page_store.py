"""Stores of the pages that are not on the device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from qlora_dist.config.sections import PagingConfig
from qlora_dist.errors import UserError


class PageStore(Protocol):
    """Bytes outside the device. They are zero until they are written."""

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fill `out`, uint8[n] on any device, with the bytes from `start` on."""

    def write(self, start: int, values: torch.Tensor) -> None:
        """Store `values`, uint8[n] on any device, from `start` on."""

    def close(self) -> None:
        """Free the bytes."""


def page_store_factory(
    paging: PagingConfig, device: torch.device, content: str, hint: str
) -> Callable[[int], PageStore]:
    """Return a function that makes the store of the section `paging`, given its bytes.

    Error messages contain the name of the store's content and a hint, the remedy for the user.
    """
    on_host = paging.to == "host" or (paging.to == "auto" and device.type != "cpu")

    def make_store(nbytes: int) -> PageStore:
        if on_host:
            return HostStore(nbytes, device)
        return FileStore(nbytes, Path(paging.dir or tempfile.gettempdir()), device, content, hint)

    return make_store


class HostStore:
    """A store in host memory, which is pinned if the device is a GPU (not run on a GPU).

    A copy to or from a GPU is queued on its current stream.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._bytes = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def read(self, start: int, out: torch.Tensor) -> None:
        out.copy_(self._bytes[start : start + out.numel()], non_blocking=True)

    def write(self, start: int, values: torch.Tensor) -> None:
        self._bytes[start : start + values.numel()].copy_(values, non_blocking=True)

    def close(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)


class FileStore:
    """A store in a file on local storage. Its space is reserved at once, and it disappears with the process.

    The file is read and written, not mapped. Mapped pages would count as this process's memory, and a failing disk
    would kill the process with a signal instead of an error. A GPU's pages pass through host memory of a page's size
    (not run on a GPU). A folder that cannot be made or written, or has too little space, is a `UserError`. A disk that
    fails later is an `OSError`.
    """

    def __init__(self, nbytes: int, folder: Path, device: torch.device, content: str, hint: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, path = tempfile.mkstemp(prefix="qlora-dist-", suffix=".pages", dir=folder)
            os.unlink(path)  # noqa: PTH108 (nothing is left of the file however this process ends)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot make a file for {content} there ({error.strerror}); {hint}", local_only=True
            ) from None
        try:
            os.posix_fallocate(self._file, 0, nbytes)
        except OSError as error:
            os.close(self._file)
            raise UserError(
                f"{folder}: no room for {nbytes / 2**30:.3g} GiB of {content} ({error.strerror}); {hint}",
                local_only=True,
            ) from None
        self._staged = device.type != "cpu"

    def read(self, start: int, out: torch.Tensor) -> None:
        host = torch.empty_like(out, device="cpu", pin_memory=True) if self._staged else out
        left = host.numpy().data
        while left:
            done = os.preadv(self._file, [left], start)
            if done == 0:
                raise OSError(f"the file of pages ends at byte {start}")
            left, start = left[done:], start + done
        if self._staged:
            out.copy_(host)

    def write(self, start: int, values: torch.Tensor) -> None:
        left = values.cpu().numpy().data
        while left:
            done = os.pwrite(self._file, left, start)
            left, start = left[done:], start + done

    def close(self) -> None:
        os.close(self._file)
