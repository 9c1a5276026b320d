"""If this fails, 64 ranks tokenize the same data 64 times, wait forever for a dead rank, or read half a file."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
from filelock import SoftFileLease

from qlora_dist.data import cache
from qlora_dist.data.cache import get_or_create_entry, is_entry_complete
from qlora_dist.errors import UserError
from qlora_dist.runtime import lease

CONTEXT = multiprocessing.get_context("fork")
RANKS = 6


def create_slowly(folder: Path) -> None:
    """Create an entry of two files: write the process id beside it, and continue when the test permits."""
    with (folder.parent / "makers").open("a") as file:
        file.write(f"{os.getpid()}\n")
    (folder / "first").write_text("x" * 1000)
    (folder / cache.PROGRESS_FILE).write_text("half of it")
    wait_until("the test", (folder.parent / "go").exists)
    (folder / "second").write_text("y")


def create_and_fail(folder: Path) -> None:
    create_slowly(folder)
    raise UserError("the data is bad; mend it")


def create_on_full_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    (folder / "small").write_text("x")
    (folder / "large").write_text("x" * 100_000)


def wait_until(event: str, happened: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end, f"{event}: does not happen"
        time.sleep(0.01)


def record_reader(folder: Path) -> None:
    with (folder.parent / "readers").open("a") as file:
        file.write(f"{os.getpid()}\n")


def request_entry(pipe: Connection, folder: Path, make: Callable[[Path], None], read: Callable[[Path], None]) -> None:
    messages: list[str] = []

    def log(line: str) -> None:
        messages.append(line)
        (folder.parent / f"waiting-{os.getpid()}").touch()

    try:
        get_or_create_entry(folder, make, log, read)
        pipe.send((None, messages))
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}", messages))


class EntryRequests:
    """Processes that request the same entry."""

    def __init__(
        self,
        folder: Path,
        make: Callable[[Path], None],
        count: int = RANKS,
        read: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.pipes = {}
        for _ in range(count):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=request_entry, args=(sender, folder, make, read))
            process.start()
            sender.close()
            self.pipes[receiver] = process

    def results(self) -> list[tuple[str | None, list[str]]]:
        """Return the error and the messages of each process that was not killed."""
        results, pipes = [], list(self.pipes)
        while pipes:
            ready = wait(pipes, timeout=30)
            assert ready, "a rank waits forever"
            for pipe in ready:
                pipes.remove(pipe)
                try:
                    results.append(pipe.recv())
                except EOFError:
                    assert self.pipes[pipe].exitcode != 0
        return results

    def kill(self, pid: int) -> None:
        (process,) = [process for process in self.pipes.values() if process.pid == pid]
        process.kill()
        process.join()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "_WAIT_LOG_INTERVALS_S", (0.0, 30.0))  # Waiting is reported at once.
    return tmp_path / "cache" / "sequences" / "abc"


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_DURATION_S", 1.0)
    monkeypatch.setattr(lease, "LEASE_HEARTBEAT_S", 0.2)


@pytest.fixture(params=["a disk", "NFS"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "NFS":  # On NFS, names cannot be exchanged.
        monkeypatch.setattr("filelock._soft.exchange_names", lambda source, target: False, raising=False)


def maker_pids(folder: Path) -> list[int]:
    signed = folder.parent / "makers"
    return [int(line) for line in signed.read_text().split()] if signed.exists() else []


def allow_creation(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder.parent / "go").touch()


def allow_creation_when_all_wait(folder: Path, count: int = RANKS) -> None:
    wait_until("the others", lambda: len(list(folder.parent.glob("waiting-*"))) == count - 1)
    allow_creation(folder)


def sibling_names(folder: Path) -> set[str]:
    """Return the names of files that preparation left behind, except the record of the verification."""
    return {path.name for path in folder.parent.iterdir() if path.name.startswith("abc.")} - {"abc.checked"}


def test_one_process_prepares_the_entry_for_all(folder):
    ranks = EntryRequests(folder, create_slowly)
    allow_creation_when_all_wait(folder)
    results = ranks.results()
    assert [error for error, _ in results] == [None] * RANKS
    (maker,) = maker_pids(folder)
    lines = [line for _, messages in results for line in messages]
    assert len(lines) == RANKS - 1
    assert all(f"process {maker}, to prepare {folder} (" in line for line in lines)
    assert {path.name for path in folder.iterdir()} == {"first", "second", "sums.json", "entry.json"}
    assert not sibling_names(folder), "no lock, nothing half-written"
    get_or_create_entry(folder, create_and_fail, print)  # The entry exists, so it is not created again.


def test_waiting_processes_report_the_progress(folder):
    maker = EntryRequests(folder, create_slowly, 1)
    wait_until("the first", lambda: list(folder.parent.glob(f"abc.partial-*/{cache.PROGRESS_FILE}")))
    waiting = EntryRequests(folder, create_slowly, 1)
    allow_creation_when_all_wait(folder, 2)
    ((_, (line,)),) = waiting.results()
    assert line.endswith(" s; half of it)")
    assert maker.results() == [(None, [])]


def test_an_error_in_the_data_is_raised_in_all_waiting_processes(folder):
    ranks = EntryRequests(folder, create_and_fail)
    allow_creation_when_all_wait(folder)
    assert [error for error, _ in ranks.results()] == ["UserError: the data is bad; mend it"] * RANKS
    assert len(maker_pids(folder)) == 1
    assert not folder.exists()
    assert sibling_names(folder) == {"abc.failed"}
    # A process that starts later has not waited, so it tries again.
    get_or_create_entry(folder, create_slowly, print)
    assert len(maker_pids(folder)) == 2
    assert not sibling_names(folder)


def test_a_killed_holder_is_replaced_at_once(folder, file_system):
    ranks = EntryRequests(folder, create_slowly)
    wait_until("the first", lambda: len(maker_pids(folder)) == 1)
    started = time.monotonic()
    ranks.kill(maker_pids(folder)[0])
    allow_creation(folder)
    assert [error for error, _ in ranks.results()] == [None] * (RANKS - 1)
    assert time.monotonic() - started < lease.LEASE_DURATION_S / 2
    assert len(maker_pids(folder)) == 2
    assert is_entry_complete(folder)
    assert not sibling_names(folder), "the files of the dead process are removed"


def test_a_holder_on_a_dead_node_is_replaced(folder, short_lease, file_system):
    """This node cannot see the holder's process. It can only see that the lock is not refreshed."""
    allow_creation(folder)
    lock = folder.with_name("abc.lock")
    holder = SoftFileLease(lock, lease_duration=lease.LEASE_DURATION_S, heartbeat_interval=0.9)
    holder.acquire()
    text = re.sub("^host=.*$", "host=node7", lock.read_text(), flags=re.M)
    holder.release()
    lock.write_text(text)
    messages: list[str] = []
    started = time.monotonic()
    get_or_create_entry(folder, create_slowly, messages.append)
    assert time.monotonic() - started >= lease.LEASE_DURATION_S
    assert is_entry_complete(folder)
    assert messages[0].startswith("waiting for node7, process ")


def test_a_holder_that_was_killed_before_it_wrote_its_name_is_replaced(folder, short_lease):
    allow_creation(folder)
    folder.with_name("abc.lock").touch()
    get_or_create_entry(folder, create_slowly, print)
    assert is_entry_complete(folder)
    assert not sibling_names(folder)


@pytest.mark.parametrize("first", ["the stopped one", "its successor"])
def test_a_suspended_holder_does_no_harm(folder, short_lease, first):
    """A holder that was suspended for longer than the lease continues beside its successor. Both complete the entry."""
    stopped = EntryRequests(folder, create_slowly, 1)
    wait_until("the first", lambda: len(maker_pids(folder)) == 1)
    pid = maker_pids(folder)[0]
    os.kill(pid, signal.SIGSTOP)
    successor = EntryRequests(folder, create_slowly, 1)
    wait_until("the second", lambda: len(maker_pids(folder)) == 2)
    if first == "its successor":
        allow_creation(folder)
        assert [error for error, _ in successor.results()] == [None]
    os.kill(pid, signal.SIGCONT)
    allow_creation(folder)
    assert [error for error, _ in stopped.results()] == [None]
    if first == "the stopped one":
        assert [error for error, _ in successor.results()] == [None]
    assert len(maker_pids(folder)) == 2
    assert is_entry_complete(folder)
    assert {path.name for path in folder.iterdir()} == {"first", "second", "sums.json", "entry.json"}
    assert not sibling_names(folder)


def truncate_file(folder: Path) -> None:
    (folder / "first").write_text("x" * 999)


def remove_file(folder: Path) -> None:
    (folder / "second").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "entry.json").unlink()


def truncate_manifest(folder: Path) -> None:
    (folder / "entry.json").write_text('{"first": 10')


def corrupt_file(folder: Path) -> None:
    (folder / "first").write_text("x" * 500 + "z" + "x" * 499)


def corrupt_file_and_checksums(folder: Path) -> None:
    corrupt_file(folder)
    (folder / "sums.json").write_text((folder / "sums.json").read_text().replace("first", "tsrif"))


def add_outside_path(folder: Path) -> None:
    (folder / "entry.json").write_text('{"../../../../etc/passwd": 1}')


def replace_by_symlink(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    truncate_file(folder)


DAMAGES = [truncate_file, remove_file, remove_manifest, truncate_manifest]
DAMAGES += [corrupt_file, corrupt_file_and_checksums, add_outside_path, replace_by_symlink]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_created_again(folder, damage):
    allow_creation(folder)
    get_or_create_entry(folder, create_slowly, print)
    damage(folder)
    messages: list[str] = []
    get_or_create_entry(folder, create_slowly, messages.append)
    (line,) = messages
    assert re.fullmatch(rf"{folder}: is damaged \(.+\), so it is created again", line)
    assert (folder / "first").read_text() == "x" * 1000
    assert is_entry_complete(folder)
    assert not sibling_names(folder)


def test_one_process_per_start_verifies_the_checksums(folder):
    """Otherwise, 64 ranks would read a terabyte each. A disk may change bits between two starts."""
    allow_creation(folder)
    get_or_create_entry(folder, create_slowly, print)
    folder.with_name("abc.checked").unlink()
    ranks = EntryRequests(folder, create_and_fail, read=record_reader)
    assert ranks.results() == [(None, [])] * RANKS
    assert len((folder.parent / "readers").read_text().split()) == 1
    old = time.time() - 3600
    os.utime(folder.with_name("abc.checked"), (old, old))
    get_or_create_entry(folder, create_and_fail, print, record_reader)
    assert len((folder.parent / "readers").read_text().split()) == 2, "the next start verifies again"


def test_a_read_only_cache_is_verified_too(folder, refusal, monkeypatch):
    allow_creation(folder)
    get_or_create_entry(folder, create_slowly, print)
    folder.with_name("abc.checked").unlink()

    def refused(self: SoftFileLease, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(SoftFileLease, "acquire", refused)  # Permissions do not restrict root.
    assert get_or_create_entry(folder, create_and_fail, print) == folder
    corrupt_file(folder)
    with pytest.raises(UserError) as error:
        get_or_create_entry(folder, create_and_fail, print)
    assert refusal(error.value).startswith(f"{folder.parent}: the cache cannot be written (Permission denied); ")


def test_a_full_disk(folder, refusal):
    """A limit on file sizes stands in for a full disk."""
    ((error, _),) = EntryRequests(folder, create_on_full_disk, 1).results()
    assert error is not None
    sentence = error.removeprefix("UserError: ")
    assert refusal(Exception(sentence)).startswith(f"{folder.parent}: the cache cannot be written (File too large); ")
    assert sibling_names(folder) == {"abc.failed"}
    assert json.loads(folder.with_name("abc.failed").read_text())["sentence"] == sentence


def test_a_folder_that_cannot_be_written(tmp_path, refusal):
    (tmp_path / "file").write_text("")  # Permissions do not restrict root.
    with pytest.raises(UserError) as error:
        get_or_create_entry(tmp_path / "file" / "sequences" / "abc", create_slowly, print)
    assert refusal(error.value).startswith(f"{tmp_path / 'file' / 'sequences'}: the cache cannot be written (")


def test_an_unexpected_error_leaves_no_files(folder):
    def fail_unexpectedly(partial: Path) -> None:
        (partial / "first").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        get_or_create_entry(folder, fail_unexpectedly, print)
    assert list(folder.parent.iterdir()) == []
