"""If this fails, a dead run is shown as running, or a run cannot be stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_dist.errors import UserError
from qlora_dist.launch.cancel_run import cancel_run
from qlora_dist.launch.run_list import follow_run, print_runs
from qlora_dist.launch.run_status import find_run_dirs, read_run_status
from qlora_dist.runtime.environment import process_record
from tests.helpers import tiny_models
from tests.helpers.ranks import started_ranks
from tests.helpers.waiting import wait_for

BORN = psutil.Process().create_time()
THIS_HOST = {"host": socket.gethostname(), "pid": os.getpid(), "born": BORN, "steps": 100}
THIS_PROCESS = THIS_HOST | process_record()
STEP = {"loss": 2.0, "tokens_per_s": 1000.0, "step_s": 0.5}


def dead_process() -> dict[str, object]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return THIS_HOST | {"pid": process.pid}


def make_run(folder: Path, steps: int = 10, **files: object) -> Path:
    path = folder / "run"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("train: {steps: 100}\n")
    lines = [json.dumps({"step": 0, "eval_loss": 3.0}), *(json.dumps({"step": n + 1, **STEP}) for n in range(steps))]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for name, content in files.items():
        (path / name.replace("_json", ".json")).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("files", "queue", "state"),
    [
        ({"DONE": {"step": 100, "reason": "last step"}}, None, "done"),
        ({"STOPPED": {"step": 10, "reason": "STOP"}}, None, "stopped"),
        ({"REQUEUE": {"step": 10, "reason": "SIGTERM"}}, None, "to be requeued"),
        ({"REQUEUE": {"step": 10, "reason": "SIGTERM"}, "process_json": THIS_HOST}, None, "running"),
        ({"process_json": THIS_HOST}, None, "running"),
        ({"process_json": THIS_HOST | {"born": THIS_HOST["born"] - 1000}}, None, "failed"),  # a reused process number
        # the clock was set meanwhile, so that the process seems to have started two minutes later
        ({"process_json": THIS_PROCESS | {"born": BORN - 120}}, None, "running"),
        ({"job_json": THIS_PROCESS | {"submitted": "2020-01-01T00:00:00+00:00", "born": BORN - 120}}, None, "running"),
        ({"process_json": THIS_PROCESS | {"start_ticks": THIS_PROCESS["start_ticks"] - 1}}, None, "failed"),
        ({"process_json": THIS_PROCESS | {"boot": "of another day"}}, None, "failed"),
        ({"process_json": THIS_HOST | {"host": "elsewhere"}}, None, "running"),  # the run has just written
        ({"job_json": {"launcher": "torchrun", "job_id": None, **THIS_HOST}}, None, "running"),
        ({}, None, "failed"),
        ({"job_json": {"launcher": "slurm", "job_id": "7"}}, {"7": "PENDING"}, "waiting"),
        ({"job_json": {"launcher": "slurm", "job_id": "7"}}, {"7": "RUNNING"}, "running"),
        ({"job_json": {"launcher": "slurm", "job_id": "7"}}, {"8": "RUNNING"}, "failed"),
        ({"process_json": THIS_HOST | {"host": "n1", "job_id": "7.0"}}, {"7": "RUNNING"}, "running"),
        ({"process_json": THIS_HOST | {"host": "n1", "job_id": "7.0"}}, {}, "failed"),
        ({"REQUEUE": {"step": 10}, "job_json": {"job_id": "7"}}, {"7": "PENDING"}, "waiting"),
        ({"REQUEUE": {"step": 10}, "job_json": {"job_id": "7"}}, {}, "to be requeued"),
    ],
)
def test_states(tmp_path, files, queue, state):
    assert read_run_status(make_run(tmp_path, **files), queue).state == state


def test_a_dead_process_is_a_failed_run(tmp_path):
    assert read_run_status(make_run(tmp_path, process_json=dead_process()), None).state == "failed"


def test_progress(tmp_path, capsys):
    make_run(tmp_path, process_json=THIS_HOST | {"steps": 110})
    print_runs(tmp_path, as_json=True)
    (run,) = json.loads(capsys.readouterr().out)
    assert run.pop("path") == str(tmp_path / "run")
    assert run == {
        "name": "run",
        "state": "running",
        "reason": None,
        "step": 10,
        "steps": 110,  # computed from its data, not from the configuration
        "loss": 2.0,
        "tokens_per_s": 1000.0,
        "left_s": 50.0,
        "job_id": None,
        "host": THIS_HOST["host"],
        "log": None,
    }
    print_runs(tmp_path, as_json=False)
    table = capsys.readouterr().out
    assert all(text in table for text in ("running", "10 of 110", "2.0000", "1,000", "0:00:50"))
    print_runs(tmp_path / "nothing", as_json=False)
    assert capsys.readouterr().out == f"no runs in {tmp_path / 'nothing'}\n"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.floats(0, 1), min_size=5, max_size=5), garbage=st.binary(max_size=20))
def test_half_written_files_are_no_error(tmp_path_factory, cuts, garbage):
    job = {"launcher": "slurm", "job_id": "7", "host": "n1", "pid": 3, "log": "x", "submitted": "2026-01-01T00:00:00"}
    path = make_run(
        tmp_path_factory.mktemp("half"), job_json=job, process_json=THIS_HOST, REQUEUE={"step": 10, "reason": "x"}
    )
    for file, cut in zip(sorted(path.iterdir()), cuts, strict=True):
        content = file.read_bytes()
        file.write_bytes(content[: round(cut * len(content))] + garbage)
    print_runs(path.parent, as_json=False)
    assert read_run_status(path, {"7": "RUNNING"}).state in ("running", "failed", "to be requeued")


@pytest.mark.parametrize(
    "value", [None, [], "text", {"pid": "x", "host": THIS_HOST["host"]}, {"steps": "x", "job_id": {}}]
)
def test_files_with_something_else_in_them_are_no_error(tmp_path, value):
    path = make_run(tmp_path, process_json=value, job_json=value, REQUEUE=value)
    (path / "metrics.jsonl").write_text(
        json.dumps({"step": "x", **STEP}) + "\n" + json.dumps({"step": 1, "loss": None})
    )
    (path / "config.yaml").write_text("train: 7")
    print_runs(tmp_path, as_json=True)
    print_runs(tmp_path, as_json=False)


def test_the_output_is_followed_until_the_run_ends(tmp_path, capsys):
    log = tmp_path / "log.txt"
    path = make_run(tmp_path, process_json=THIS_HOST, job_json={"log": str(log)})

    def write() -> None:
        time.sleep(0.7)
        log.write_text("step 1\n")
        time.sleep(0.7)
        with log.open("a") as file:
            file.write("step 2\n")
        (path / "DONE").write_text("{}")

    thread = threading.Thread(target=write)
    thread.start()
    follow_run(tmp_path, "run")
    thread.join()
    assert capsys.readouterr().out == "step 1\nstep 2\n"


def test_a_missing_run_or_output_is_an_error_message(tmp_path):
    with pytest.raises(UserError, match=r"rum: no such run; .* holds run; name their folder with --dir"):
        make_run(tmp_path)
        follow_run(tmp_path, "rum")
    with pytest.raises(UserError, match="the output file of this run is not recorded"):
        follow_run(tmp_path, "run")
    with pytest.raises(UserError, match=r"run: does not run \(failed\)"):
        cancel_run(tmp_path, "run", now=False, as_json=False)


def test_a_job_that_waits_is_taken_out_of_the_queue(tmp_path, monkeypatch, capsys):
    commands = {
        "squeue": f"test -e {tmp_path}/cancelled || echo '77|PENDING'",
        "scancel": f"test $1 = 77 && touch {tmp_path}/cancelled",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = make_run(
        tmp_path / "runs", job_json={"launcher": "slurm", "job_id": "77"}, REQUEUE={"step": 10, "reason": "x"}
    )
    cancel_run(tmp_path / "runs", "run", now=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["state"] == "stopped"
    assert not (path / "REQUEUE").exists()


@pytest.mark.slow
def test_a_real_run_is_seen_stopped_and_killed(tiny_llama_nf4, tmp_path, capsys):
    small = {"train__steps": 10**6, "train__global_batch": 2, "data__eval": None, "data__seq_len": 32}
    config = tiny_models.make_config(tmp_path, tiny_llama_nf4, **small)
    path = tmp_path / "runs" / "run"
    for now in (False, True):  # the second run resumes where the first was stopped
        with started_ranks([partial(train, config)], tmp_path) as (process,):
            before = read_run_status(path, None).step or 0
            wait_for(lambda before=before: running_past(path, before + 3), within_s=200)
            cancel_run(path.parent, "run", now=now, as_json=True)
            process.join(120)
            assert process.exitcode == (-9 if now else 0)
        outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert outcome["state"] == "stopped"
        assert outcome["steps"] == 10**6
        assert outcome["step"] >= 3
        assert not (path / "STOP").exists()
        if not now:
            assert json.loads((path / "STOPPED").read_text())["step"] == outcome["step"] == stored_step(path)
    assert stored_step(path) < outcome["step"]
    assert find_run_dirs(path.parent) == [path]


def train(config: Path) -> None:
    from qlora_dist.cli.main import main

    sys.argv = ["qlora-dist", "train", str(config)]
    main()


def running_past(path: Path, step: int) -> bool:
    run = read_run_status(path, None)
    return run.state == "running" and (run.step or 0) >= step


def stored_step(path: Path) -> int:
    return max(int(found.name.removeprefix("step-")) for found in (path / "checkpoints").glob("step-*"))
