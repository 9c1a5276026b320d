"""If this fails, a SLURM job trains something else than the same run without SLURM, or does not resume after an event.

The events are a preemption, the time limit, a requeue, a signal and a lost node. No processes may be left behind. All
jobs run at the same time, several on the same nodes. Each has 2 nodes with one rank. Its losses are compared with an
undisturbed run without SLURM.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.config.config_file import load_config
from qlora_dist.launch.cluster import Cluster
from qlora_dist.launch.launch import LaunchOptions, launch_slurm
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks
from tests.helpers.waiting import wait_for
from tests.helpers.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 40, 4
PATIENCE_S = 300.0
"""Seconds to wait for progress of a job. Starting a rank takes 10 s of a core, and the tests may have two cores."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Job and the event that it gets."""

    act: Callable[[Run], None]
    exclude: str
    """Nodes that other jobs use."""
    form: str = "srun"
    steps: int = STEPS
    extra: tuple[tuple[str, Any], ...] = ()
    """Further keys of the cluster's file."""
    engine: str = "fsdp2"
    warm: bool = False
    """True to fork the job's processes from a warm one, because their start is not tested."""


class Run:
    """Submitted job."""

    def __init__(
        self, slurm: Any, folder: Path, config: Path, name: str, scenario: Scenario, warm_script: Path
    ) -> None:
        self.slurm, self.name, self.scenario = slurm, name, scenario
        self.neighbours: list[str] = []
        self.path = folder / "runs" / name
        cluster = Cluster(
            gpus_per_node=0,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            form=scenario.form,
            python=str(warm_script) if scenario.warm else None,
            sbatch=[f"--exclude={scenario.exclude}"],
            **{"preflight": False, "save_time": 5, **dict(scenario.extra)},
        )
        changes = [f"run.name={name}", f"train.steps={scenario.steps}", f"parallel.engine={scenario.engine}"]
        resolved = load_config(config, changes)
        launch_slurm(resolved, cluster, LaunchOptions(nodes=2, ranks_per_node=1), Console(quiet=True))
        self.job_id = json.loads((self.path / "job.json").read_text())["job_id"]

    def rows(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def losses(self) -> list[float]:
        rows = [row for row in self.rows() if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step twice, or none"
        return [row["loss"] for row in rows]

    def output(self) -> str:
        return (self.path / "jobs" / "1" / "output.log").read_text()

    def reaches(self, step: int) -> int:
        def reached() -> int:
            rows = self.rows()
            return rows[-1]["step"] if rows and rows[-1]["step"] >= step else 0

        return wait_for(reached, PATIENCE_S)

    def starts_again(self, starts: int = 2) -> None:
        wait_for(lambda: len(re.findall(r"^\S+ job \d+, start \d+: 2 x 1", self.output(), re.M)) >= starts, PATIENCE_S)

    def finish(self) -> dict[str, str]:
        self.scenario.act(self)
        return self.slurm.ends(self.job_id, PATIENCE_S)


def signal_then_requeue(run: Run) -> None:
    """Signal the ranks as a user would, and later requeue the job as an administrator would."""
    run.reaches(6)
    run.neighbours = run.slurm("squeue", "--noheader", "--states=RUNNING", "--nodelist=n1", "--format=%j").split()
    run.slurm("scancel", "--signal=USR1", str(run.job_id))
    run.starts_again(2)
    run.reaches(20)
    run.slurm("scontrol", "requeue", str(run.job_id))
    run.starts_again(3)


def preempt(run: Run) -> None:
    run.reaches(6)
    run.slurm("srun", "--partition=high", "--exclusive", "--nodes=1", "--nodelist=n3", "true")
    run.starts_again()


def out_of_time(run: Run) -> None:
    """Let the time limit end the job. SLURM checks it every 30 s, so the run must be endless until then."""
    run.reaches(3)
    started = datetime.fromisoformat(run.slurm.job(run.job_id)["StartTime"])
    minutes = math.ceil(((datetime.now() - started).total_seconds() + 40) / 60)  # the signal comes 60 s before that
    run.slurm("scontrol", "update", f"JobId={run.job_id}", f"TimeLimit={minutes}")
    wait_for(lambda: run.slurm.job(run.job_id)["Restarts"] == "1", PATIENCE_S)
    run.slurm("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=60")
    config = run.path / "jobs" / "1" / "config.yaml"
    config.write_text(config.read_text().replace(f"steps: {run.scenario.steps}", f"steps: {len(run.losses()) + 5}"))


def crash(run: Run) -> None:
    run.reaches(6)
    run.slurm.cluster("node-down", "6")
    run.starts_again()


SCENARIOS = {
    "signal": Scenario(act=signal_then_requeue, exclude="n[3-7]", warm=True),
    "preempted": Scenario(act=preempt, exclude="n[1-2,5-7]", form="torchrun"),
    "time": Scenario(
        act=out_of_time,
        exclude="n[3-7]",
        steps=100_000,
        extra=(("save_time", 60), ("preflight", True), ("preprocess", True)),
        warm=True,
    ),
    "crash": Scenario(act=crash, exclude="n[1-4]", engine="zero3" if find_spec("deepspeed") is not None else "fsdp2"),
}


@dataclass(frozen=True)
class Results:
    runs: dict[str, Run]
    states: dict[str, Future[dict[str, str]]]
    reference: list[float]
    left: list[str]
    """Processes that outlived the jobs."""


@pytest.fixture(scope="module")
def results(slurm: Any, tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Results:
    folder = tmp_path_factory.mktemp("jobs")
    settings = {"optim__schedule": "constant", "train__save_every": SAVE_EVERY, "train__global_batch": 4}
    config = tiny_models.make_config(
        folder, tiny_llama_nf4, data__seq_len=48, data__eval=None, train__steps=STEPS, **settings
    )
    # start it before the pool, because a process with threads must not be forked
    with warm_python(tmp_path_factory.mktemp("python")) as warm_script, ThreadPoolExecutor() as pool:
        runs = {name: Run(slurm, folder, config, name, scenario, warm_script) for name, scenario in SCENARIOS.items()}
        states = {name: pool.submit(run.finish) for name, run in runs.items()}
        wait(states.values())
    left = processes_of(folder)
    steps = max(len(run.losses()) for run in runs.values())
    at_home = load_config(config, ["run.name=home", f"train.steps={steps}"])
    run_ranks(2, run_training, at_home)
    rows = map(json.loads, (folder / "runs" / "home" / "metrics.jsonl").read_text().splitlines())
    return Results(runs, states, [row["loss"] for row in rows if "loss" in row], left)


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of other processes that name the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(folder) in words and int(entry.name) != os.getpid():
            found.append(words)
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_run_is_finished_and_is_the_same(name: str, results: Results) -> None:
    run = results.runs[name]
    state = results.states[name].result()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), run.output()
    losses = run.losses()
    rel = 0 if run.scenario.engine == "fsdp2" else 1e-5  # the reference run has FSDP2
    assert losses == pytest.approx(results.reference[: len(losses)], rel=rel, abs=0)
    assert len(losses) == (STEPS if name != "time" else json.loads((run.path / "DONE").read_text())["step"])


@pytest.mark.parametrize(
    ("name", "reasons"), [("signal", ["SIGUSR1", "SIGTERM"]), ("preempted", ["SIGTERM"]), ("time", ["SIGUSR1"])]
)
def test_no_step_is_lost_after_a_signal(name: str, reasons: list[str], results: Results) -> None:
    output = " ".join(results.runs[name].output().split())
    stops = re.findall(r"stopped by (\w+) after (\d+) steps", output)
    assert [reason for reason, _ in stops] == reasons, output
    assert re.findall(r"resumes after (\d+) steps", output) == [step for _, step in stops]


def test_a_lost_node_costs_no_more_than_the_steps_since_the_checkpoint(results: Results) -> None:
    run = results.runs["crash"]
    (before,) = re.findall(r"resumes after (\d+) steps", " ".join(run.output().split()))
    assert int(before) >= SAVE_EVERY  # the node died at step 6 or soon after
    assert int(before) % SAVE_EVERY == 0
    assert "n[5,7]" in run.output(), "the spare node"


def test_two_jobs_on_the_same_nodes_leave_each_other_alone(results: Results) -> None:
    """Other tests compare the losses of each job."""
    neighbours = results.runs["signal"].neighbours
    assert "signal" in neighbours and len(neighbours) > 1


def test_all_nodes_are_checked_before_the_ranks_start(results: Results) -> None:
    assert re.search(r"^preflight: 2 nodes joined after", results.runs["time"].output(), re.M)


def test_nothing_is_left_behind(results: Results, slurm: Any) -> None:
    assert results.left == []
    assert slurm("squeue", "--noheader") == ""
