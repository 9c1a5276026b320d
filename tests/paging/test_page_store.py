"""If this fails, paged data is lost, a disk fills up during a run, or a file is left over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from qlora_dist.errors import UserError
from qlora_dist.paging.page_store import FileStore, HostStore, PageStore

CPU = torch.device("cpu")


@pytest.fixture(params=["host", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PageStore:
    if request.param == "host":
        return HostStore(1000, CPU)
    return FileStore(1000, tmp_path / "pages", CPU, "moments", "give another folder")


def test_unwritten_bytes_are_zero(store: PageStore) -> None:
    values = torch.arange(300, dtype=torch.int32).to(torch.uint8)
    store.write(100, values)
    out = torch.full((500,), 7, dtype=torch.uint8)
    store.read(50, out)
    assert torch.equal(out[50:350], values)
    assert not out[:50].any() and not out[350:].any()
    store.close()


def test_a_file_reserves_its_space_at_once_and_has_no_name(tmp_path: Path) -> None:
    """A killed run leaves no file behind, and a started run cannot run out of disk."""
    before = os.statvfs(tmp_path)
    store = FileStore(64 * 2**20, tmp_path, CPU, "moments", "give another folder")
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(store._file).st_blocks * 512 >= 64 * 2**20
    store.close()
    assert before.f_bsize  # the folder is still there


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    """Ask the real file system for more space than it has."""
    free = os.statvfs(tmp_path)
    too_much = (free.f_bavail + 2**20) * free.f_frsize
    with pytest.raises(UserError, match=r"no room for .* GiB of moments \(.*\); give another folder") as error:
        FileStore(too_much, tmp_path, CPU, "moments", "give another folder")
    assert os.strerror(errno.ENOSPC) in str(error.value) or os.strerror(errno.EFBIG) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make a file for moments there \(.*\); give another folder"):
        FileStore(1, tmp_path / "file", CPU, "moments", "give another folder")
