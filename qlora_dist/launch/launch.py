"""`qlora-dist launch`: a run on one process, on torchrun's or mpirun's ranks here, or as a SLURM job."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from rich.console import Console

from qlora_dist.config.config_file import dump_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.launch.cluster import Cluster
from qlora_dist.launch.job_script import SlurmJob, render_job_script
from qlora_dist.launch.run_status import JOB_FILE
from qlora_dist.launch.slurm_queue import queued_jobs
from qlora_dist.runs.json_object import read_json_object
from qlora_dist.runtime.process_identity import process_identity

LaunchTarget = Literal["local", "torchrun", "slurm", "mpi"]


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line says besides the configuration."""

    nodes: int = 1
    ranks_per_node: int | None = None
    """None: as many as a node has GPUs."""
    array: int = 0
    dry_run: bool = False
    follow: bool = False
    given: Sequence[str] = ()
    """The configuration's file and what overrides it, as given."""


def launch_local(config: Config, on: LaunchTarget, options: LaunchOptions, console: Console) -> None:
    """Check a run and start it on this machine, in this process's place. Returns only from a dry run.

    Args:
        config: of the run.
        on: what starts its ranks.
        options: of the command line.
        console: for progress; of a dry run the command goes to stdout.

    Raises:
        UserError: more than one node, a name that is taken, or what `train --dry-run` refuses.
    """
    from qlora_dist.launch.job_check import check_local_run
    from qlora_dist.runs.run_action import finished_run_note

    if options.nodes > 1:
        raise UserError(
            f"--nodes: --on {on} starts this machine's ranks alone; use --on slurm, launch/torchrun.sh on each node, "
            "or launch/mpirun.sh with a list of hosts"
        )
    if on == "local" and (options.ranks_per_node or 1) > 1:
        raise UserError(
            f"--ranks-per-node: {options.ranks_per_node} ranks are more than the one process that --on local starts; "
            "use --on torchrun"
        )
    if (done := finished_run_note(config)) is not None:
        print(done)
        return
    ranks = 1 if on == "local" else options.ranks_per_node or _visible_gpu_count(console)
    if on != "local" or options.dry_run:  # a single process says itself what is wrong, and says it last
        check_local_run(config, on, ranks, console)
    if options.dry_run:
        print(shlex.join(_command(on, ranks, options.given)))
        return
    run = _absolute_run_path(config)
    folder = _new_submission_dir(run)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    write_job_file(run, on, None, os.getpid(), None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or every rank computes on all cores
    # Open MPI refuses to run as root, as containers do, unless told to
    os.environ.update({"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # torchrun would end; the ranks listen to them
        signal.signal(number, signal.SIG_IGN)
    command = _command(on, ranks, [str(folder / "config.yaml")])
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: there is no such command; install an MPI, such as mpich from PyPI") from None


def _command(on: LaunchTarget, ranks: int, given: Sequence[str]) -> list[str]:
    train = ["-m", "qlora_dist", "train", *given]
    if on == "torchrun":
        torchrun = [sys.executable, "-m", "qlora_dist.launch.agent", "--standalone", f"--nproc-per-node={ranks}"]
        return [*torchrun, *train]
    return [*(["mpirun", "-n", str(ranks), "--bind-to", "none"] if on == "mpi" else []), sys.executable, *train]


def _visible_gpu_count(console: Console) -> int:
    """Count the GPUs that this machine lets its processes see, one rank for each."""
    import torch

    if count := torch.cuda.device_count():
        return count
    console.print("no GPU here: one rank; --ranks-per-node starts more", highlight=False)
    return 1


def launch_slurm(config: Config, cluster: Cluster, options: LaunchOptions, console: Console) -> None:
    """Check, render and submit a job.

    Args:
        config: of the run.
        cluster: where it goes.
        options: of the command line.
        console: where to print; of a dry run the script goes to stdout.

    Raises:
        UserError: what the user has to mend, before anything is submitted.
    """
    from qlora_dist.launch import submit
    from qlora_dist.launch.job_check import check_job
    from qlora_dist.runs.run_action import finished_run_note

    job = make_job(config, options.nodes, options.ranks_per_node or default_ranks_per_node(cluster), options.array)
    script = render_job_script(job, cluster)
    if not options.dry_run and not cluster.singleton:
        check_not_queued(job.run, "give run.name another value, or set singleton: true in the cluster's file")
    if (done := finished_run_note(config)) is not None:
        console.print(done, highlight=False, markup=False, soft_wrap=True)
        return
    check_job(config, cluster, job.nodes, job.ranks_per_node, console)
    if options.dry_run:
        sys.stdout.write(script)
        return
    job_id = submit_job(config, job, script)
    console.print(f"job {job_id}: {job.nodes} x {job.ranks_per_node} ranks, {job.script}", soft_wrap=True)
    if options.follow:
        submit.follow_job(job_id, job.output)
        return
    console.print(f"watch it with `qlora-dist jobs`, or tail -f {job.output}", soft_wrap=True)


def default_ranks_per_node(cluster: Cluster) -> int:
    """On a node, unless somebody says otherwise."""
    return cluster.gpus_per_node or 1


def make_job(config: Config, nodes: int, ranks_per_node: int, array: int = 0) -> SlurmJob:
    """The next submission of a run, from the current folder."""
    run = _absolute_run_path(config)
    return SlurmJob(config.run.name, Path.cwd(), run, _new_submission_dir(run), nodes, ranks_per_node, array)


def submit_job(config: Config, job: SlurmJob, script: str) -> int:
    """Write what the job reads, submit it, and say in the run's folder who runs it.

    Returns:
        SLURM's number of it.

    Raises:
        UserError: there is no SLURM here, or it refuses.
    """
    from qlora_dist.launch.submit import sbatch

    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    job.script.write_text(script, encoding="utf-8")
    job_id = sbatch(job.script)
    write_job_file(job.run, "slurm", job_id, None, job.output)
    return job_id


def write_job_file(run: Path, launcher: LaunchTarget, job_id: int | None, pid: int | None, log: Path | None) -> None:
    """Say in the run's folder who runs it."""
    run.mkdir(parents=True, exist_ok=True)
    tree = {
        "launcher": launcher,
        "job_id": job_id,
        "host": socket.gethostname(),
        "pid": pid,
        **({} if pid is None else process_identity(pid)),
        "log": None if log is None else str(log),
        "submitted": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    (run / JOB_FILE).write_text(json.dumps(tree) + "\n", encoding="utf-8")


def _absolute_run_path(config: Config) -> Path:
    from qlora_dist.runs.run_dir import run_path

    return Path.cwd() / run_path(config.run)


def _new_submission_dir(run: Path) -> Path:
    """Of this submission: a job that waits must not read what a later one brings."""
    numbers = [int(path.name) for path in (run / "jobs").glob("*") if path.name.isdecimal()]
    return run / "jobs" / str(max(numbers, default=0) + 1)


def check_not_queued(run: Path, remedy: str) -> None:
    """Two jobs would write over one another.

    Args:
        run: its folder.
        remedy: what to do but to cancel the one that there is.

    Raises:
        UserError: there is one already.
    """
    tree = read_json_object(run / JOB_FILE)
    job_id = tree.get("job_id") if tree.get("launcher") == "slurm" else None
    if job_id is not None and (state := (queued_jobs() or {}).get(str(job_id))) is not None:
        raise UserError(f"{run}: job {job_id} of this run is {state.lower()}; cancel it (qlora-dist cancel), {remedy}")
