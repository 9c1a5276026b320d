"""If this fails, the message about a user's error scrolls away above torchrun's own report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from qlora_dist.errors import UserError
from qlora_dist.launch import agent
from qlora_dist.launch.agent import write_torchrun_error_file
from qlora_dist.runtime import network
from tests.helpers.launchers import environment


def test_torchruns_report_shows_the_message(tmp_path: Path) -> None:
    """The plain torchrun command shows it too, because torch reads the file that it has named for the rank."""
    file = tmp_path / "error.json"
    write_torchrun_error_file(
        UserError("lora.rr: unknown key; did you mean lora.r?"), {"TORCHELASTIC_ERROR_FILE": str(file)}
    )
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    report = str(ChildFailedError("qlora_dist", {0: failure}))
    assert report.splitlines()[-2] == "  traceback : lora.rr: unknown key; did you mean lora.r?"
    assert agent._user_error_message(failure) == "lora.rr: unknown key; did you mean lora.r?"


@pytest.mark.slow
def test_the_message_is_last(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model: {base: m}\ndata: {train: [d]}\nlora: {rr: 5}")
    command = [sys.executable, "-m", "qlora_dist.launch.agent", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "qlora_dist", "train", "my.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=200)
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("qlora-dist: my.yaml"), done.stderr
    assert "lora.rr: unknown key" in lines[-1]
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_an_unknown_master_is_reported_before_torchrun_waits_for_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun retries for minutes without a message."""
    monkeypatch.setattr(network, "_DNS_TIMEOUT_S", 0.0)
    options = ["--nnodes=2", "--node-rank=1", "--master-addr=node0.invalid", "--master-port=29500"]
    assert agent.run_agent([*options, "-m", "qlora_dist", "train", "my.yaml"]) == 2
    assert capfd.readouterr().err.startswith("qlora-dist: node0.invalid: ")
