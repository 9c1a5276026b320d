"""Real ranks for tests: processes forked from pytest, with torchrun's variables, connected over gloo."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT_S = 400.0


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, nodes: int = 1) -> list[Any]:
    """Run `function(*args)` on each of `world_size` ranks of `nodes` equal nodes, and return what each returned.

    The first rank that fails ends the others, and its traceback is the error. No process outlives the call.
    """
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once, not once per rank
    processes, pipes = [], {}
    for rank, environ in enumerate(_environments(world_size, nodes)):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(sender, environ, function, args), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes[receiver] = rank
    try:
        return _collect(pipes, world_size)
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def started_ranks(
    functions: Sequence[Callable[[], Any]], outputs: Path, nodes: int = 1, port: int | None = None
) -> Iterator[list[BaseProcess]]:
    """Start a rank for each function, for tests that kill ranks. Nothing waits for them or collects results.

    A rank's output goes to `outputs/rank-N.txt`. No process outlives the `with`.
    """
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    try:
        for rank, environ in enumerate(_environments(len(functions), nodes, port)):
            output = outputs / f"rank-{rank}.txt"
            processes.append(context.Process(target=_run_alone, args=(output, environ, functions[rank]), daemon=True))
            processes[-1].start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _environments(world_size: int, nodes: int, port: int | None = None) -> list[dict[str, Any]]:
    """Return torchrun's variables for each rank."""
    port, local = port or free_port(), world_size // nodes
    return [
        {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank % local,
            "LOCAL_WORLD_SIZE": local,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(world_size)
    ]


def _collect(pipes: dict[Connection, int], world_size: int) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + TIMEOUT_S
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pipes.values())} have not finished after {TIMEOUT_S:.0f} s")
        for pipe in ready:
            rank = pipes.pop(pipe)
            try:
                error, result = pipe.recv()
            except EOFError:
                error, result = "the process died", None
            if error is not None:
                raise RuntimeError(f"rank {rank} of {world_size}:\n{error}")
            results[rank] = result
    return [results[rank] for rank in range(world_size)]


def _rank(pipe: Connection, environ: dict[str, Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update({key: str(value) for key, value in environ.items()})
    gc.freeze()  # else garbage collection in each rank touches, and so copies, all objects of pytest and the imports
    faulthandler.dump_traceback_later(0.9 * TIMEOUT_S, file=sys.__stderr__)  # shows where a rank waits
    try:
        pipe.send((None, function(*args)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    pipe.close()


def _run_alone(output: Path, environ: dict[str, Any], function: Callable[[], Any]) -> None:
    os.environ.update({key: str(value) for key, value in environ.items()})
    gc.freeze()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    function()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
