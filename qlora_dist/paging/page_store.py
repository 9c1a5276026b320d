"""Where pages lie that are not on the device."""

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
    """Bytes behind a device. They are zeros until they are written."""

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fill out: uint8[n], on any device, with the bytes from `start` on."""

    def write(self, start: int, values: torch.Tensor) -> None:
        """Keep values: uint8[n], on any device, from `start` on."""

    def close(self) -> None:
        """Give the room back."""


def page_store_factory(
    paging: PagingConfig, device: torch.device, content: str, hint: str
) -> Callable[[int], PageStore]:
    """Makes the store that the section `paging` asks for, of so many bytes; for the rest see `FileStore`."""
    on_host = paging.to == "host" or (paging.to == "auto" and device.type != "cpu")

    def make_store(nbytes: int) -> PageStore:
        if on_host:
            return HostStore(nbytes, device)
        return FileStore(nbytes, Path(paging.dir or tempfile.gettempdir()), device, content, hint)

    return make_store


class HostStore:
    """Host memory, pinned where the device is a GPU's (that part was not run).

    Args:
        nbytes: how much.
        device: that reads and writes.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._bytes = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def read(self, start: int, out: torch.Tensor) -> None:
        """See `PageStore`. The copy to a GPU is queued on its current stream."""
        out.copy_(self._bytes[start : start + out.numel()], non_blocking=True)

    def write(self, start: int, values: torch.Tensor) -> None:
        """See `PageStore`. The copy from a GPU is queued on its current stream."""
        self._bytes[start : start + values.numel()].copy_(values, non_blocking=True)

    def close(self) -> None:
        """See `PageStore`."""
        self._bytes = torch.empty(0, dtype=torch.uint8)


class FileStore:
    """A file on local storage, all of its room reserved beforehand, that is gone when its process is.

    It is read and written, not mapped: mapped pages would count as this process's memory, and a disk that fails would
    end it by a signal instead of an error. A GPU's pages go through host memory of a page's size (not run).

    Args:
        nbytes: how much.
        folder: where.
        device: that reads and writes.
        what: what it is for, and `remedy`: what else the user can do, for the sentence that tells of no room.

    Raises:
        UserError: the folder is none, or has no room.
    """

    def __init__(self, nbytes: int, folder: Path, device: torch.device, content: str, hint: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, path = tempfile.mkstemp(prefix="qlora-dist-", suffix=".pages", dir=folder)
            os.unlink(path)  # noqa: PTH108 (nobody else opens it, and nothing is left of it however this process ends)
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
        """See `PageStore`.

        Raises:
            OSError: the disk fails.
        """
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
        """See `PageStore`.

        Raises:
            OSError: the disk fails.
        """
        left = values.cpu().numpy().data
        while left:
            done = os.pwrite(self._file, left, start)
            left, start = left[done:], start + done

    def close(self) -> None:
        """See `PageStore`."""
        os.close(self._file)
