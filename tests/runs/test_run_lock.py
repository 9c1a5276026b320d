"""If this fails, two runs write to one folder, or a run cannot start because another one has died."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from qlora_dist.errors import UserError
from qlora_dist.runs import run_lock as holding
from qlora_dist.runs.run_lock import LOCK_FILE, lock_run_dir
from qlora_dist.runtime import lease
from tests.helpers.waiting import wait_for

CONTEXT = multiprocessing.get_context("fork")
JOB = {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": "7"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


@pytest.fixture(autouse=True)
def quick_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_HEARTBEAT_S", 0.2)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_DURATION_S", 1.5)


@pytest.fixture
def holder(path: Path) -> Iterator[BaseProcess]:
    """Start a process that holds the folder's lock for a SLURM job."""
    process = CONTEXT.Process(target=lock_forever, args=(path,), daemon=True)
    process.start()
    wait_for((path / "held").exists, within_s=60)
    yield process
    process.kill()
    process.join()


def lock_forever(path: Path) -> None:
    os.environ.update(JOB)
    os.dup2(os.open(path.parent.parent / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    with lock_run_dir(path, print):
        (path / "held").touch()
        time.sleep(600)


def pretend_other_host(path: Path) -> None:
    """Rewrite the lease as one of another host, whose process cannot be examined from here."""
    lock = path / LOCK_FILE
    lock.write_text(re.sub("^host=.*$", "host=node7", lock.read_text(), flags=re.M))


def test_a_folder_that_was_free_is_free_again(path: Path) -> None:
    messages: list[str] = []
    with lock_run_dir(path, messages.append):
        assert (path / LOCK_FILE).exists()
    assert not path.parent.exists(), "a start that has failed leaves no folder"
    path.mkdir(parents=True)
    (path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="a mistake"), lock_run_dir(path, messages.append):
        raise UserError("a mistake")
    assert [left.name for left in path.iterdir()] == ["metrics.jsonl"]
    assert messages == []


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_second_run_is_refused_while_the_first_lives(host: str, holder: BaseProcess, path: Path) -> None:
    if host == "elsewhere":
        pretend_other_host(path)  # the heartbeat goes on
    where = "node7" if host == "elsewhere" else re.escape(os.uname().nodename)
    sentence = rf"another run uses this folder \(process {holder.pid} on {where}\); wait for its end, stop it with"
    with pytest.raises(UserError, match=sentence), lock_run_dir(path, print):
        pass
    assert holder.is_alive() and (path / LOCK_FILE).exists()


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_run_killed_on_this_host_loses_its_lock_at_once(holder: BaseProcess, path: Path, *, is_reaped: bool) -> None:
    """The process is a zombie until its launcher waits for it."""
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    if is_reaped:
        holder.join()
    started = time.monotonic()
    with lock_run_dir(path, print):
        pass
    assert time.monotonic() - started < lease.LEASE_DURATION_S


def test_waiting_for_a_dead_run_on_another_host_is_limited(
    short_lease: None, holder: BaseProcess, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "_WAIT_NOTICE_S", 0.5)
    holder.kill()
    holder.join()
    pretend_other_host(path)
    messages: list[str] = []
    started = time.monotonic()
    with lock_run_dir(path, messages.append):
        assert time.monotonic() - started >= lease.LEASE_DURATION_S
    assert len(messages) == 1 and f"locked by process {holder.pid} on node7; waiting up to" in messages[0]


@pytest.mark.parametrize(("restart", "job"), [("1", "7"), ("0", "7"), ("1", "8")])
def test_a_requeued_job_takes_over_at_once(
    restart: str, job: str, holder: BaseProcess, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job, or a second command of the same job, does not take over. The old process ends."""
    pretend_other_host(path)
    for name, value in (JOB | {"SLURM_RESTART_COUNT": restart, "SLURM_JOB_ID": job}).items():
        monkeypatch.setenv(name, value)
    if (restart, job) != ("1", "7"):
        with pytest.raises(UserError, match="another run uses this folder"), lock_run_dir(path, print):
            pass
        return
    with lock_run_dir(path, print):
        assert json.loads((path / "run.lock.json").read_text())["launch"]["start"] == "0/1"
        holder.join(60)
        assert holder.exitcode == 2
        stderr = (path.parent.parent / "stderr").read_text()
        assert (
            stderr.startswith(f"qlora-dist: {path}: another run has taken over this folder") and stderr.count("\n") == 1
        )


def test_a_lock_that_is_not_a_file_is_reported(path: Path) -> None:
    path.mkdir(parents=True)
    (path / LOCK_FILE).mkdir()
    with pytest.raises(UserError, match=r"run\.lock: cannot be written \(.*\); fix that"), lock_run_dir(path, print):
        pass
