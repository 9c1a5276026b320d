"""If this fails, each rank tokenizes the same data, or they wait in a collective while one of them does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from filelock import SoftFileLease
from ranks import _free_port

from qlora_dist.config import SourceConfig
from qlora_dist.config_file import load_config
from qlora_dist.data.cache import LEASE_S
from qlora_dist.data.encode import Encoder
from qlora_dist.data.key import source_key
from qlora_dist.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RANKS = 8
TIMEOUT_S = 500

# the command line itself, which signs in a file whenever it tokenizes
COMMAND = """
import sys
from qlora_dist import cli
from qlora_dist.data import prepare
tokenize, log = prepare.tokenize, sys.argv.pop()
def counted(*args, **options):
    with open(log, "a") as file:
        file.write(options["name"] + chr(10))
    return tokenize(*args, **options)
prepare.tokenize = counted
cli.main()
"""


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_eight_ranks_start_on_a_cold_cache(tiny_llama_nf4, tmp_path):
    path = tiny.make_config(tmp_path, tiny_llama_nf4, train__steps=2, train__global_batch=8)
    config = load_config(path)
    cache = Path(config.data.cache)
    train, held_out = config.data.train[0], config.data.eval
    encoder = Encoder(load_tokenizer(tiny_llama_nf4), config.data.mask)
    key = source_key(SourceConfig(path=train), config.data, encoder.fingerprint(), cache, print)
    (cache / "sequences").mkdir(parents=True)
    lock = SoftFileLease(cache / "sequences" / f"{key}.lock", lease_duration=LEASE_S, heartbeat_interval=5.0)
    port, log = _free_port(), tmp_path / "tokenized"
    outputs = [tmp_path / f"rank-{rank}.txt" for rank in range(RANKS)]
    processes = []
    lock.acquire()
    try:
        for rank, output in enumerate(outputs):
            environ = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS}
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            with output.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", COMMAND, "train", str(path), str(log)],
                        cwd=ROOT,
                        env=os.environ | {key: str(value) for key, value in environ.items()},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        end = time.monotonic() + TIMEOUT_S
        while "waiting for " not in outputs[0].read_text():
            assert processes[0].poll() is None and time.monotonic() < end, outputs[0].read_text()
            time.sleep(0.1)
        # the others' turn to come as far
        time.sleep(2)
        assert f"process {os.getpid()}, to prepare " in outputs[0].read_text()
        # rank 0 does not listen: there is no process group, and nobody in a collective
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", port)) != 0
        assert not log.exists()
        lock.release()
        for process, output in zip(processes, outputs, strict=True):
            assert process.wait(timeout=max(0, end - time.monotonic())) == 0, output.read_text()
    finally:
        lock.release(force=True)
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(log.read_text().splitlines()) == sorted([train, held_out])
    entries = list((cache / "sequences").iterdir())
    assert len(entries) == 2
    assert all(entry.is_dir() and len(entry.name) == 64 for entry in entries), "no lock, nothing half-written"
