"""A `python` for the commands of tests that saves the seconds of imports, because it forks a process that has them.

A script replaces the interpreter, and accepts `-u`, `-m MODULE`, `-c CODE` and a file. It sends its arguments,
environment, folder, ignored signals and standard files to the process that `warm_python` has started. That process
forks one that runs the module as `__main__`, on the script's node, with the script as `sys.executable`. The script
exits with its exit code and forwards signals, and no command outlives its script. The start of a fresh interpreter is
not covered.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import runpy
import signal
import socket
import struct
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path

# a node of a cluster on this machine (slurm/local_cluster.sh) has its own host name and /etc/hosts
_NAMESPACES = {"mnt": 0x00020000, "uts": 0x04000000, "net": 0x40000000}

# it imports no package, and so starts in 30 ms
_SCRIPT = """#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
    for number in numbers:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    request = json.dumps([sys.argv[1:], {script!r}, os.getcwd(), dict(os.environ), ignored]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    answer = server.recv(1)
sys.exit(answer[0] if answer else "the process that forks is gone")
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """Yield the path of the script, in `folder`. No process that it has started outlives the `with`."""
    import torch.distributed.run  # noqa: F401

    import qlora_dist.data.preprocess
    import qlora_dist.model.quantize_folder
    import qlora_dist.train.run_training  # noqa: F401

    script = folder / "python"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen(64)
        script.write_text(_SCRIPT.format(python=sys.executable, script=str(script), address=str(folder / "socket")))
        script.chmod(0o755)
        forks = multiprocessing.get_context("fork").Process(target=_serve, args=(listening,))
        forks.start()
    try:
        yield script
    finally:
        forks.kill()
        forks.join()


def _serve(listening: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    tests = multiprocessing.parent_process()
    assert tests is not None
    while tests.sentinel not in wait([listening, tests.sentinel]):
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            try:
                _keep(connection)
            finally:
                os._exit(1)
        connection.close()


def _keep(connection: socket.socket) -> None:
    """Fork the command, forward signals to it and return its exit code. Kill it if its script is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(connection, 4, 3)
    _enter_namespaces(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(2**16)
    command = os.fork()
    if command == 0:
        connection.close()
        _become(files, *json.loads(request))
    ended = os.pidfd_open(command)
    while ended not in (ready := wait([connection, ended])):
        assert ready
        number = connection.recv(1)
        os.kill(command, number[0] if number else signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with suppress(OSError):
        connection.send(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def _enter_namespaces(script: int) -> None:
    """Enter the namespaces of the node that the script runs on."""
    libc, process = ctypes.CDLL(None, use_errno=True), os.pidfd_open(script)
    for name, flag in _NAMESPACES.items():
        if Path(f"/proc/{script}/ns/{name}").readlink() == Path(f"/proc/self/ns/{name}").readlink():
            continue
        if libc.setns(process, flag) != 0:
            raise OSError(ctypes.get_errno(), f"setns: {name}")
    os.close(process)


def _become(
    files: list[int], words: list[str], script: str, folder: str, environ: dict[str, str], ignored: list[int]
) -> None:
    """Run `python WORDS` in this process."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    sys.executable = script
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    warnings.simplefilter("ignore")
    words = [word for word in words if word != "-u"]
    code = 0
    try:
        if words[0] == "-m":
            sys.argv[1:] = words[2:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv[1:] = words[2:]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
