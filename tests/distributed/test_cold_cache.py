"""If this fails, each rank tokenizes the same data, or ranks wait in a collective while one of them tokenizes."""

from __future__ import annotations

import os
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import SoftFileLease

from qlora_dist.cli.main import main
from qlora_dist.config.config_file import load_config
from qlora_dist.config.sections import SourceConfig
from qlora_dist.data import prepare_datasets
from qlora_dist.data.cache_key import source_cache_key
from qlora_dist.data.row_encoder import RowEncoder
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.runtime.lease import LEASE_DURATION_S
from tests.helpers import tiny_models
from tests.helpers.ranks import free_port, started_ranks

RANKS = 8
TIMEOUT_S = 500


def train_and_log_preparation(config: Path, log: Path) -> None:
    """Run the command line, which adds a line to a file whenever it tokenizes."""
    tokenize = prepare_datasets.tokenize_to_file

    def counted(*args: Any, **options: Any) -> Any:
        with log.open("a") as file:
            file.write(options["source_name"] + "\n")
        return tokenize(*args, **options)

    prepare_datasets.tokenize_to_file = counted
    sys.argv = ["qlora-dist", "train", str(config)]
    main()


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_eight_ranks_start_on_a_cold_cache(tiny_llama_nf4, tmp_path):
    path = tiny_models.make_config(tmp_path, tiny_llama_nf4, train__steps=2, train__global_batch=8)
    config = load_config(path)
    cache = Path(config.data.cache)
    train, held_out = config.data.train[0], config.data.eval
    encoder = RowEncoder(load_tokenizer(tiny_llama_nf4), config.data.mask, None, config.data.multi_turn)
    key = source_cache_key(SourceConfig(path=train), config.data, encoder.fingerprint(), cache, print)
    (cache / "sequences").mkdir(parents=True)
    lock = SoftFileLease(cache / "sequences" / f"{key}.lock", lease_duration=LEASE_DURATION_S, heartbeat_interval=5.0)
    port, log = free_port(), tmp_path / "tokenized"
    outputs = [tmp_path / f"rank-{rank}.txt" for rank in range(RANKS)]
    lock.acquire()
    with started_ranks([partial(train_and_log_preparation, path, log)] * RANKS, tmp_path, port=port) as processes:
        end = time.monotonic() + TIMEOUT_S
        while not outputs[0].exists() or "waiting for " not in outputs[0].read_text():
            assert processes[0].is_alive() and time.monotonic() < end
            time.sleep(0.1)
        # give the others time to get as far
        time.sleep(2)
        assert f"process {os.getpid()}, to prepare " in outputs[0].read_text()
        # rank 0 does not listen, so that there is no process group and no rank in a collective
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", port)) != 0
        assert not log.exists()
        lock.release()
        for process, output in zip(processes, outputs, strict=True):
            process.join(max(0, end - time.monotonic()))
            assert process.exitcode == 0, output.read_text()
    assert sorted(log.read_text().splitlines()) == sorted([train, held_out])
    entries = [path for path in (cache / "sequences").iterdir() if path.is_dir()]  # leave out the marks of checks
    assert len(entries) == 2
    assert all(entry.is_dir() and len(entry.name) == 64 for entry in entries), "no lock, nothing half-written"
