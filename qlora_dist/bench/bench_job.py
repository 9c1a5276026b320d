"""A layout's run as a job of its own: on this machine, or as the SLURM job that `qlora-dist launch` would submit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from qlora_dist.bench.bench_layouts import BenchCase
from qlora_dist.config.config_file import dump_config
from qlora_dist.errors import UserError
from qlora_dist.launch.cluster import Cluster
from qlora_dist.launch.job_script import SlurmJob, render_job_script
from qlora_dist.launch.launch import check_not_queued, default_ranks_per_node, make_job, submit_job
from qlora_dist.launch.slurm_queue import WAITING_STATES, JobState, job_state, scancel
from qlora_dist.report.run_files import RunFiles, read_run_files
from qlora_dist.runs.json_object import read_json_object
from qlora_dist.runs.run_dir import DONE_MARKER, MARKERS, REQUEUE_MARKER, STOPPED_MARKER
from qlora_dist.runtime.process_exit import USER_ERROR_FILE
from qlora_dist.runtime.system import usable_cpu_count

_JOB_STATE_MESSAGES = {
    "CANCELLED": "was cancelled; start the benchmark again",
    "PREEMPTED": "was preempted; start the benchmark again, or give another partition or qos in the cluster's file",
    "TIMEOUT": "has reached its time limit; raise time in the cluster's file",
    "NODE_FAIL": "has lost a node; start the benchmark again",
    "BOOT_FAIL": "has lost a node; start the benchmark again",
    "OUT_OF_MEMORY": "had less host memory than it needs; raise memory in the cluster's file",
}
_MIN_POLL_S, _MAX_POLL_S = 1.0, 10.0
"""Seconds between two queries to SLURM, at first and for jobs that take minutes."""
_LAST_LINES = 40
_FILE_TIMEOUT_S = 60.0
"""Seconds to wait until files that nodes wrote to a shared file system are visible here."""


def threads_per_rank(ranks: int) -> int:
    """Return each rank's share of the cores of this process."""
    return max(1, usable_cpu_count() // ranks)


def run_local_job(case: BenchCase, folder: Path) -> RunFiles:
    """Train in one process or on torchrun's ranks, and read the run's files.

    The configuration and the log are written into `folder`, which holds the `run.dir` of the case.

    Raises:
        UserError: the run reported a user's error.
        RuntimeError: the run failed otherwise; the message has the end of its log.
    """
    config, log = folder / f"{case.name}.yaml", folder / f"{case.name}.log"
    config.write_text(dump_config(case.config), encoding="utf-8")
    command = [sys.executable]
    if case.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    command += ["-m", "qlora_dist", "train", str(config), "--resume", "none"]
    environ = os.environ | {"OMP_NUM_THREADS": str(threads_per_rank(case.ranks)), "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, env=environ, stdout=output, stderr=output, check=False).returncode
    if code:
        text = log.read_text(encoding="utf-8", errors="replace")
        user_errors = re.findall(r"^qlora-dist: (.+)$", text, re.MULTILINE)
        if user_errors:
            raise UserError(f"{case.label}: {user_errors[0]}")
        raise RuntimeError(f"{case.name} ended with exit code {code}\n" + "\n".join(text.splitlines()[-_LAST_LINES:]))
    run = Path(case.config.run.dir) / case.config.run.name
    files = read_run_files(run)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return files


@dataclass(frozen=True)
class SlurmPlacement:
    """The cluster, and the ranks of its nodes."""

    cluster: Cluster
    ranks_per_node: int | None = None
    """Number of ranks on a node; None means one per GPU."""

    def make_job_script(self, case: BenchCase) -> tuple[SlurmJob, str]:
        """Return the layout's next job and its script.

        SLURM must not requeue the job, because a second start would resume and time fewer steps than other runs.

        Raises:
            UserError: the ranks do not fill nodes, a job uses the run's folder, or a script cannot name the folder.
        """
        nodes, ranks_per_node = split_into_nodes(
            case.ranks, self.ranks_per_node or default_ranks_per_node(self.cluster)
        )
        job = make_job(case.config, nodes, ranks_per_node)
        check_not_queued(job.run, "or give another --out")
        once = {"max_requeues": 0, "sbatch": [*self.cluster.sbatch, "--no-requeue"]}
        return job, render_job_script(job, self.cluster.model_copy(update=once))


def split_into_nodes(ranks: int, max_ranks_per_node: int) -> tuple[int, int]:
    """Return the number of nodes, and of ranks on each.

    Raises:
        UserError: the ranks need several nodes, which would be unequal.
    """
    if ranks <= max_ranks_per_node:
        return 1, ranks
    if ranks % max_ranks_per_node:
        raise UserError(
            f"--ranks: {ranks} cannot be split into nodes of {max_ranks_per_node} ranks each; give a multiple of "
            f"{max_ranks_per_node}, or another --ranks-per-node"
        )
    return ranks // max_ranks_per_node, max_ranks_per_node


def check_slurm_cases(cases: Sequence[BenchCase], placement: SlurmPlacement) -> None:
    """Check all jobs before the first one is submitted.

    Raises:
        UserError: a job has a mistake; the message names the layout.
    """
    from qlora_dist.launch.job_check import check_job

    if shutil.which("sbatch") is None:
        raise UserError("--on slurm: there is no command sbatch; call this on a login node of a SLURM cluster")
    jobs = [placement.make_job_script(case)[0] for case in cases]
    for case, job in zip(cases, jobs, strict=True):
        try:
            check_job(case.config, placement.cluster, job.nodes, job.ranks_per_node, Console(quiet=True))
        except UserError as error:
            raise UserError(f"{case.label}: {error}") from None


def run_slurm_job(case: BenchCase, placement: SlurmPlacement, console: Console) -> RunFiles:
    """Submit a layout's job, wait for its end, and read the run's files. If the wait is interrupted, cancel the job.

    Raises:
        UserError: the job did not finish its run.
    """
    job, script = placement.make_job_script(case)
    _clear(job.run)
    job_id = None
    with _signals_to_exit():
        try:
            with _signals_blocked():  # a signal here would lose the job's number
                job_id = submit_job(case.config, job, script)
            state = _wait(case.label, job_id, console)
        except BaseException:
            if job_id is not None:
                with _signals_blocked():
                    _cancel(job_id)
            raise
    _wait_for_files(job.run / DONE_MARKER, state)
    if not (job.run / DONE_MARKER).exists():
        raise UserError(f"{case.label}{explain_unfinished_job(job, job_id, state)}")
    files = read_run_files(job.run)
    shutil.rmtree(job.run / "checkpoints", ignore_errors=True)
    return files


def explain_unfinished_job(job: SlurmJob, job_id: int, state: JobState) -> str:
    """Return why a job did not finish its run, as a text to append to the layout's name."""
    try:
        return f", job {job_id}: {(job.folder / USER_ERROR_FILE).read_text(encoding='utf-8').strip()}"
    except OSError:
        pass  # the job reported no user's error
    has_output = job.output.exists()
    output = f" (its output: {job.output})" if has_output else ""
    if state.state in _JOB_STATE_MESSAGES:
        return f": job {job_id} {_JOB_STATE_MESSAGES[state.state]}{output}"
    if (job.run / REQUEUE_MARKER).exists():
        reason = read_json_object(job.run / REQUEUE_MARKER).get("reason")
        return (
            f": job {job_id} was stopped before its last step ({reason}), as jobs are before their time limit; "
            f"raise time in the cluster's file{output}"
        )
    if (job.run / STOPPED_MARKER).exists():
        return f": job {job_id} was stopped by hand; start the benchmark again{output}"
    if not has_output:
        return f": job {job_id} has left no output at {job.output}; give an --out that all nodes see"
    return f": job {job_id} has failed ({state.state}); see {job.output}"


def job_state_label(state: JobState | None) -> str:
    """Return a job's state as the predicate of a sentence."""
    if state is None:
        return "is in an unknown state, because SLURM does not answer"
    if state.state in WAITING_STATES:
        return f"waits ({state.reason})" if state.reason not in ("", "None") else "waits"
    return "ends" if state.state == "COMPLETING" else f"runs on {state.nodes}"


def _wait(label: str, job_id: int, console: Console) -> JobState:
    """Wait until a job has ended, and print its state whenever that changes."""
    started, last_state = time.monotonic(), ""
    while True:
        state = job_state(job_id)
        if state is not None and state.has_ended:
            return state
        if (new_state := job_state_label(state)) != last_state:
            console.print(f"{label}: job {job_id} {new_state}", markup=False, soft_wrap=True)
            last_state = new_state
        time.sleep(min(_MAX_POLL_S, max(_MIN_POLL_S, (time.monotonic() - started) / 20)))


def _wait_for_files(marker: Path, state: JobState) -> None:
    """Wait until the run's marker is visible, because a network file system shows new files late."""
    deadline = time.monotonic() + (_FILE_TIMEOUT_S if state.state in ("COMPLETED", "UNKNOWN") else 0)
    while time.monotonic() < deadline and not (marker.exists() or marker.with_name(STOPPED_MARKER).exists()):
        time.sleep(_MIN_POLL_S)


def _clear(run: Path) -> None:
    """Delete files of an earlier run, which would be taken for this run's results or resumed."""
    for name in (*MARKERS, "metrics.jsonl", "summary.json"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def _cancel(job_id: int) -> None:
    try:
        scancel(str(job_id))
        message = f"job {job_id}: cancelled"
    except UserError as error:
        message = f"{error}; it may still run"
    Console(stderr=True).print(f"qlora-dist: {message}", markup=False, soft_wrap=True)


@contextmanager
def _signals_to_exit() -> Iterator[None]:
    """Turn signals that would kill this process into an exit, so that it can cancel its job."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    # nohup ignores them
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals in this process and in the commands that it calls, because Ctrl-C reaches all of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
