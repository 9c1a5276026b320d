"""A layout's run as a SLURM job: the very one that `qlora-dist launch` would submit, and waited for."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from qlora_dist.bench.bench_layouts import BenchCase
from qlora_dist.errors import UserError
from qlora_dist.launch.cluster import Cluster
from qlora_dist.launch.job_script import SlurmJob, render_job_script
from qlora_dist.launch.launch import check_not_queued, default_ranks_per_node, make_job, submit_job
from qlora_dist.launch.slurm_queue import WAITING_STATES, JobState, job_state, scancel
from qlora_dist.report.run_files import RunFiles, read_run_files
from qlora_dist.runs.json_object import read_json_object
from qlora_dist.runs.run_dir import DONE_MARKER, MARKERS, REQUEUE_MARKER, STOPPED_MARKER
from qlora_dist.runtime.process_exit import USER_ERROR_FILE

_JOB_STATE_MESSAGES = {
    "CANCELLED": "was cancelled; start the benchmark again",
    "PREEMPTED": "was preempted; start the benchmark again, or give another partition or qos in the cluster's file",
    "TIMEOUT": "has reached its time limit; raise time in the cluster's file",
    "NODE_FAIL": "has lost a node; start the benchmark again",
    "BOOT_FAIL": "has lost a node; start the benchmark again",
    "OUT_OF_MEMORY": "had less host memory than it needs; raise memory in the cluster's file",
}
_MIN_POLL_S, _MAX_POLL_S = 1.0, 10.0
"""Between two questions to SLURM, at first and for jobs that take minutes."""
_FILE_TIMEOUT_S = 60.0
"""Until this machine sees what nodes have written to a file system that they share."""


@dataclass(frozen=True)
class SlurmPlacement:
    """What the command line says of the cluster."""

    cluster: Cluster
    ranks_per_node: int | None = None
    """None: as many as a node has GPUs."""

    def job(self, case: BenchCase) -> tuple[SlurmJob, str]:
        """The layout's next job, and its script.

        It is started once: a second start would go on from a checkpoint, and time less than the others.

        Raises:
            UserError: the ranks fill no nodes, another job is at work in the run's folder, or a script can't name it.
        """
        nodes, ranks_per_node = split_into_nodes(
            case.ranks, self.ranks_per_node or default_ranks_per_node(self.cluster)
        )
        job = make_job(case.config, nodes, ranks_per_node)
        check_not_queued(job.run, "or give another --out")
        once = {"max_requeues": 0, "sbatch": [*self.cluster.sbatch, "--no-requeue"]}
        return job, render_job_script(job, self.cluster.model_copy(update=once))


def split_into_nodes(ranks: int, max_ranks_per_node: int) -> tuple[int, int]:
    """Nodes, and ranks on each.

    Args:
        ranks: of all nodes.
        max_ranks_per_node: on a node.

    Raises:
        UserError: they are more than one node's, and nodes would be unequal.
    """
    if ranks <= max_ranks_per_node:
        return 1, ranks
    if ranks % max_ranks_per_node:
        raise UserError(
            f"--ranks: {ranks} cannot be dealt out to nodes of {max_ranks_per_node} ranks each; give a multiple of {max_ranks_per_node}, or "
            "another --ranks-per-node"
        )
    return ranks // max_ranks_per_node, max_ranks_per_node


def check_slurm_cases(cases: Sequence[BenchCase], placement: SlurmPlacement) -> None:
    """Find what is wrong with any job before the first one is submitted.

    Raises:
        UserError: naming the layout.
    """
    from qlora_dist.launch.job_check import check_job

    if shutil.which("sbatch") is None:
        raise UserError("--on slurm: there is no command sbatch; call this on a login node of a SLURM cluster")
    jobs = [placement.job(cell)[0] for cell in cases]
    for cell, job in zip(cases, jobs, strict=True):
        try:
            check_job(cell.config, placement.cluster, job.nodes, job.ranks_per_node, Console(quiet=True))
        except UserError as error:
            raise UserError(f"{cell.words}: {error}") from None


def run_slurm_job(case: BenchCase, placement: SlurmPlacement, console: Console) -> RunFiles:
    """Submit it, wait for it, and read what the run has left. Whatever ends the waiting ends the job.

    Args:
        case: the layout; `run.dir` of its configuration is where all nodes see it.
        placement: the cluster.
        console: for how the job is.

    Raises:
        UserError: the job has not come to its end.
    """
    job, script = placement.job(case)
    _clear(job.run)
    job_id = None
    with _signals_to_exit():
        try:
            with _signals_blocked():  # or nobody would know the job's number
                job_id = submit_job(case.config, job, script)
            state = _wait(case.words, job_id, console)
        except BaseException:
            if job_id is not None:
                with _signals_blocked():
                    _cancel(job_id)
            raise
    _wait_for_files(job.run / DONE_MARKER, state)
    if not (job.run / DONE_MARKER).exists():
        raise UserError(f"{case.words}{explain_unfinished_job(job, job_id, state)}")
    files = read_run_files(job.run)
    shutil.rmtree(job.run / "checkpoints", ignore_errors=True)
    return files


def explain_unfinished_job(job: SlurmJob, job_id: int, state: JobState) -> str:
    """Why a job has not come to its end, to be put behind the layout's name."""
    try:
        return f", job {job_id}: {(job.folder / USER_ERROR_FILE).read_text(encoding='utf-8').strip()}"
    except OSError:
        pass  # it was none of the user's
    has_output = job.output.exists()
    output = f" (its output: {job.output})" if has_output else ""
    if state.state in _JOB_STATE_MESSAGES:
        return f": job {job_id} {_JOB_STATE_MESSAGES[state.state]}{output}"
    if (job.run / REQUEUE_MARKER).exists():
        reason = read_json_object(job.run / REQUEUE_MARKER).get("reason")
        return (
            f": job {job_id} was told to end before its last step ({reason}), as jobs are before their time limit; "
            f"raise time in the cluster's file{output}"
        )
    if (job.run / STOPPED_MARKER).exists():
        return f": job {job_id} was stopped by hand; start the benchmark again{output}"
    if not has_output:
        return f": job {job_id} has left no output at {job.output}; give an --out that all nodes see"
    return f": job {job_id} has failed ({state.state}); see {job.output}"


def job_state_label(state: JobState | None) -> str:
    """How a job is."""
    if state is None:
        return "is not known, SLURM does not answer"
    if state.state in WAITING_STATES:
        return f"waits ({state.reason})" if state.reason not in ("", "None") else "waits"
    return "ends" if state.state == "COMPLETING" else f"runs on {state.nodes}"


def _wait(label: str, job_id: int, console: Console) -> JobState:
    """Until it has ended; say how it is whenever that changes."""
    started, last_label = time.monotonic(), ""
    while True:
        state = job_state(job_id)
        if state is not None and state.has_ended:
            return state
        if (now := job_state_label(state)) != last_label:
            console.print(f"{label}: job {job_id} {now}", markup=False, soft_wrap=True)
            last_label = now
        time.sleep(min(_MAX_POLL_S, max(_MIN_POLL_S, (time.monotonic() - started) / 20)))


def _wait_for_files(marker: Path, state: JobState) -> None:
    """A network file system shows some things late."""
    until = time.monotonic() + (_FILE_TIMEOUT_S if state.state in ("COMPLETED", "UNKNOWN") else 0)
    while time.monotonic() < until and not (marker.exists() or marker.with_name(STOPPED_MARKER).exists()):
        time.sleep(_MIN_POLL_S)


def _clear(run: Path) -> None:
    """What an earlier run of that name has left would be taken for this one's, or gone on with."""
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
    """Signals that would end this process at once leave it time to cancel its job."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # as of nohup
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Signals wait, also those to the commands that are called: Ctrl-C goes to all of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
