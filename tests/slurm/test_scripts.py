"""If this fails, a job script on a cluster repeats a hopeless run, gives up a good one, or revives a cancelled one.

The ranks are replaced by scripts of three lines that do not import torch, because only the job script is tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.launch.cluster import Cluster
from qlora_dist.launch.job_script import SlurmJob, render_job_script
from qlora_dist.launch.slurm_queue import sbatch
from tests.helpers.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Actions of the ranks at each start, and the outcome. $start counts from 1, and $run is the run's folder."""

    ranks: str
    state: str
    starts: int
    says: str
    act: Callable[[Any, int], object] = lambda slurm, job: None
    array: int = 0
    folder: str = "run"
    before: Sequence[str] = ()
    """States of an array's jobs before the last. A job that saves must not count as failed, for `afterok`."""


def running(slurm: Any, job: int) -> None:
    wait_for(lambda: slurm.job(job)["JobState"] == "RUNNING", PATIENCE_S)


def cancel(slurm: Any, job: int) -> None:
    running(slurm, job)
    time.sleep(2)
    slurm("scancel", str(job))


def ask_at_once(slurm: Any, job: int) -> None:
    """Send the signal of the time limit before the ranks handle it."""
    running(slurm, job)
    slurm("scancel", "--signal=USR1", "--batch", str(job))


LISTEN = f"""run=$run exec {sys.executable} -c '
import os, pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(os.environ["run"], "REQUEUE").touch()
    sys.exit()
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
time.sleep(60)
sys.exit(1)'"""
SCENARIOS = {
    "done": Scenario(ranks='touch "$run/DONE"', state="COMPLETED", starts=1, says="done"),
    "nasty names": Scenario(
        ranks='touch "$run/DONE"',
        state="COMPLETED",
        starts=1,
        says="done",
        folder='it\'s $(touch x) `touch y` "$HOME" 100% #SBATCH ; é',
    ),
    "stopped by hand": Scenario(ranks='touch "$run/STOPPED"', state="COMPLETED", starts=1, says="stopped by hand"),
    "a mistake": Scenario(
        ranks='echo "lora.r: is wrong" > "$QLORA_DIST_JOB/MISTAKE"; exit 2',
        state="FAILED",
        starts=1,
        says="not started again: lora.r: is wrong",
    ),
    "no progress": Scenario(
        ranks="exit 1", state="FAILED", starts=2, says="no new checkpoint in 1 requeues (max_requeues: 1); it ends here"
    ),
    "progress": Scenario(
        ranks='((start < 4)) || { touch "$run/DONE"; exit; }; '
        'mkdir -p "$run/checkpoints/step-00000$((start + 6))"; exit 1',
        state="COMPLETED",
        starts=4,
        says="1 x 1 ranks on n1, after step 9",
    ),
    "an old marker": Scenario(
        ranks='((start > 1)) && touch "$run/DONE" && exit; touch -d 2020-01-01 "$run/DONE"; exit 1',
        state="COMPLETED",
        starts=2,
        says="failed (1)",
    ),
    "cancelled": Scenario(ranks=LISTEN, state="CANCELLED", starts=1, says="1 x 1 ranks", act=cancel),
    "asked before they listen": Scenario(
        ranks=f'((start > 1)) && touch "$run/DONE" && exit; sleep 3; {LISTEN}',
        state="COMPLETED",
        starts=2,
        says="saved after step 0",
        act=ask_at_once,
    ),
    "chain": Scenario(
        ranks='((start > 2)) && touch "$run/DONE" && exit; touch "$run/REQUEUE"',
        state="COMPLETED",
        starts=3,
        says="2 of the array",
        array=4,
        before=["COMPLETED", "COMPLETED", "COMPLETED"],
    ),
    "chain that is too short": Scenario(
        ranks='((start == 1)) && exit 1; touch "$run/REQUEUE"',
        state="FAILED",
        starts=3,
        says="this was the last job of the array, and the run is not done; submit it again",
        array=3,
        before=["FAILED", "COMPLETED"],
    ),
}


@pytest.fixture(scope="module")
def jobs(slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[SlurmJob, int]]:
    """Submit all scenarios."""
    folder = tmp_path_factory.mktemp("scripts")
    submitted = {}
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        run = folder / str(number) / scenario.folder
        job = SlurmJob(
            name="job", cwd=folder, run=run, folder=run / "jobs" / "1", nodes=1, ranks_per_node=1, array=scenario.array
        )
        job.folder.mkdir(parents=True)
        ranks = folder / f"ranks-{number}"
        ranks.write_text(
            '#!/bin/bash\nrun=${4%/jobs/1/config.yaml}\necho >> "$run/starts"; start=$(wc -l < "$run/starts")\n'
            f"{scenario.ranks}\n"
        )
        ranks.chmod(0o755)
        cluster = Cluster(gpus_per_node=0, max_requeues=1, python=str(ranks), sbatch=["--nodelist=n1"])
        job.script.write_text(render_job_script(job, cluster))
        submitted[name] = (job, sbatch(job.script))
    for name, scenario in SCENARIOS.items():
        scenario.act(slurm, submitted[name][1])
    return submitted


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_job_ends_as_it_should(name: str, jobs: dict[str, tuple[SlurmJob, int]], slurm: Any) -> None:
    scenario, (job, job_id) = SCENARIOS[name], jobs[name]
    last = job_id if not scenario.array else f"{job_id}_{scenario.array - 1}"
    state = slurm.ends(last, PATIENCE_S)
    output = job.output.read_text()
    assert state["JobState"] == scenario.state, output
    states = [slurm.job(f"{job_id}_{index}")["JobState"] for index in range(len(scenario.before))]
    assert states == list(scenario.before), output
    assert len((job.run / "starts").read_text()) == scenario.starts, output
    assert scenario.says in output
    if scenario.state == "COMPLETED":
        assert "failed" not in output.split("\n")[-2]


def test_the_scripts_of_the_cluster_files_are_accepted(slurm: Any) -> None:
    scripts = sorted((ROOT / "tests" / "launch" / "golden").glob("*.sbatch"))
    scripts += [ROOT / "slurm" / "train.sbatch", ROOT / "slurm" / "bench.sbatch"]
    assert len(scripts) > 6
    for script in scripts:
        found = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True, check=False)
        assert found.returncode == 0 and "to start at" in found.stderr, (script.name, found.stderr)


def test_the_example_script_saves_and_resumes(slurm: Any, tmp_path: Path) -> None:
    """slurm/train.sbatch gets the signal while it runs."""
    (tmp_path / "run").mkdir()
    train = tmp_path / "qlora-dist"
    train.write_text(
        f'#!/bin/bash\nrun={tmp_path}/run\n[ "$*" = "train a.yaml x=1" ] || exit 2\n'
        f"if mkdir $run/$SLURM_PROCID; then {LISTEN}; fi\nrm -f $run/REQUEUE; touch $run/DONE-$SLURM_PROCID\n"
    )
    train.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [
        "sbatch",
        "--parsable",
        f"--output={tmp_path}/output",
        ROOT / "slurm" / "train.sbatch",
        "run",
        "a.yaml",
        "x=1",
    ]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    job_id = int(done.stdout)
    wait_for((tmp_path / "run" / "0").exists, PATIENCE_S)  # a script that has not begun would not get the signal
    slurm("scancel", "--signal=USR1", "--batch", str(job_id))
    state = slurm.ends(job_id, PATIENCE_S)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), (tmp_path / "output").read_text()
    assert len(list((tmp_path / "run").glob("DONE-*"))) == 2
