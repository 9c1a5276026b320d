"""If this fails, Ctrl-C has no answer while a step computes, so users press it again and lose their steps."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from qlora_dist.runtime.heartbeat import RunPhase, record_heartbeat
from qlora_dist.train.stop_requests import STOP_FILE, install_signal_handlers, remove_stale_stop_file


def block_forever(error_fd: int, rank: int, step: int, phase: RunPhase) -> None:
    """Block in a call that no signal interrupts, as a step or a collective may for minutes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    os.dup2(error_fd, 2)
    install_signal_handlers()
    record_heartbeat(step, phase)
    os.write(error_fd, b"ready\n")
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


@contextmanager
def blocked_process(rank: int, step: int, phase: RunPhase) -> Iterator[tuple[ForkProcess, int]]:
    """Yield a blocked process and the file descriptor of its stderr."""
    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=block_forever, args=(writing, rank, step, phase))
    process.start()
    os.close(writing)
    try:
        assert read_line(reading) == "ready"
        yield process, reading
    finally:
        process.kill()
        process.join()
        os.close(reading)


def read_line(reading: int, within_s: float = 60.0) -> str:
    text = b""
    while not text.endswith(b"\n"):
        assert select.select([reading], [], [], within_s)[0], f"nothing but {text!r}"
        byte = os.read(reading, 1)
        assert byte, "the end"
        text += byte
    return text.decode().strip()


@pytest.mark.parametrize(
    ("phase", "answer"),
    [
        ("loading", "stopping as soon as the model is loaded, before the next step; press Ctrl-C again to end at once"),
        ("training", "finishing step 86, then saving a checkpoint; press Ctrl-C again to end without one"),
        (
            "evaluating",
            "leaving the evaluation after 85 steps, with a checkpoint; press Ctrl-C again to end without one",
        ),
    ],
)
def test_the_first_interrupt_is_answered_at_once_and_the_second_ends(phase: RunPhase, answer: str) -> None:
    with blocked_process(0, 85, phase) as (process, stderr):
        os.kill(process.pid, signal.SIGINT)
        assert read_line(stderr) == f"qlora-dist: Ctrl-C: {answer}"
        os.kill(process.pid, signal.SIGINT)
        assert read_line(stderr).startswith("qlora-dist: ended by the second Ctrl-C without a checkpoint; ")
        process.join(60)
        assert process.exitcode == 128 + signal.SIGINT


def test_other_signals_are_answered_once_and_end_nothing() -> None:
    with blocked_process(0, 85, "training") as (process, stderr):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, number)
            time.sleep(0.1)  # two pending signals would be delivered as one
        assert read_line(stderr) == "qlora-dist: SIGTERM: finishing step 86, then saving a checkpoint"
        assert read_line(stderr) == "qlora-dist: SIGHUP: finishing step 86, then saving a checkpoint"
        assert process.is_alive()


def test_other_ranks_are_silent() -> None:
    with blocked_process(1, 85, "training") as (process, stderr):
        os.kill(process.pid, signal.SIGINT)
        assert not select.select([stderr], [], [], 0.3)[0]
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 128 + signal.SIGINT


def install_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    install_signal_handlers()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    os._exit(7)


def test_a_run_under_nohup_survives_a_closed_terminal() -> None:
    process = multiprocessing.get_context("fork").Process(target=install_under_nohup)
    process.start()
    process.join(60)
    assert process.exitcode == 7


def test_a_stop_file_of_an_earlier_start_is_removed_and_a_newer_one_is_not(tmp_path: Path) -> None:
    assert remove_stale_stop_file(tmp_path) is None
    stop = tmp_path / STOP_FILE
    stop.touch()
    assert remove_stale_stop_file(tmp_path) is None
    assert stop.exists()
    os.utime(stop, (time.time() - 10**6,) * 2)
    sentence = remove_stale_stop_file(tmp_path)
    assert sentence is not None and "was there before this start, and is removed" in sentence
    assert not list(tmp_path.iterdir())
