"""Command `qlora-dist launch`: start a run as one process, on ranks of torchrun or mpirun, or as a SLURM job."""

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
from qlora_dist.launch.slurm_queue import queued_jobs, sbatch
from qlora_dist.runs.json_object import read_json_object
from qlora_dist.runtime.process_identity import process_identity

LaunchTarget = Literal["local", "torchrun", "slurm", "mpi"]


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Options of the command line, apart from the configuration."""

    nodes: int = 1
    ranks_per_node: int | None = None
    """Ranks per node; None: one per GPU."""
    array: int = 0
    dry_run: bool = False
    follow: bool = False
    config_args: Sequence[str] = ()
    """Path of the configuration and its overrides, as given on the command line."""


def launch_local(config: Config, on: LaunchTarget, options: LaunchOptions, console: Console) -> None:
    """Check a run and replace this process by it. Return only after a dry run or for a finished run.

    The console shows progress. A dry run prints the command to stdout.
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
    if on != "local" or options.dry_run:  # a single process makes the checks itself and prints errors last
        check_local_run(config, on, ranks, console)
    if options.dry_run:
        print(shlex.join(_command(on, ranks, options.config_args)))
        return
    run = _absolute_run_path(config)
    folder = _new_submission_dir(run)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    write_job_file(run, on, None, os.getpid(), None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # otherwise every rank computes on all cores
    # Open MPI refuses to run as root, which is usual in containers, unless these are set
    os.environ.update({"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # they would end torchrun, but the ranks handle them
        signal.signal(number, signal.SIG_IGN)
    command = _command(on, ranks, [str(folder / "config.yaml")])
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: there is no such command; install an MPI, such as mpich from PyPI") from None


def _command(on: LaunchTarget, ranks: int, config_args: Sequence[str]) -> list[str]:
    train = ["-m", "qlora_dist", "train", *config_args]
    if on == "torchrun":
        torchrun = [sys.executable, "-m", "qlora_dist.launch.agent", "--standalone", f"--nproc-per-node={ranks}"]
        return [*torchrun, *train]
    return [*(["mpirun", "-n", str(ranks), "--bind-to", "none"] if on == "mpi" else []), sys.executable, *train]


def _visible_gpu_count(console: Console) -> int:
    """Return the number of GPUs that this process sees; 1, with a message, if there is none."""
    import torch

    if count := torch.cuda.device_count():
        return count
    console.print("no GPU here: one rank; --ranks-per-node starts more", highlight=False)
    return 1


def launch_slurm(config: Config, cluster: Cluster, options: LaunchOptions, console: Console) -> None:
    """Check, render and submit a job. The console shows progress, and a dry run prints the script to stdout."""
    from qlora_dist.launch.job_check import check_job
    from qlora_dist.launch.run_list import follow_job
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
        follow_job(job_id, job.output)
        return
    console.print(f"watch it with `qlora-dist jobs`, or tail -f {job.output}", soft_wrap=True)


def default_ranks_per_node(cluster: Cluster) -> int:
    return cluster.gpus_per_node or 1


def make_job(config: Config, nodes: int, ranks_per_node: int, array: int = 0) -> SlurmJob:
    """Return the next submission of a run, from the current folder."""
    run = _absolute_run_path(config)
    return SlurmJob(
        name=config.run.name,
        cwd=Path.cwd(),
        run=run,
        folder=_new_submission_dir(run),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        array=array,
    )


def submit_job(config: Config, job: SlurmJob, script: str) -> int:
    """Write the job's files, submit it, and record it in the run's folder. Return SLURM's job number."""
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    job.script.write_text(script, encoding="utf-8")
    job_id = sbatch(job.script)
    write_job_file(job.run, "slurm", job_id, None, job.output)
    return job_id


def write_job_file(run: Path, launcher: LaunchTarget, job_id: int | None, pid: int | None, log: Path | None) -> None:
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
    """Return a new folder, because a waiting job must not read the configuration of a later one."""
    numbers = [int(path.name) for path in (run / "jobs").glob("*") if path.name.isdecimal()]
    return run / "jobs" / str(max(numbers, default=0) + 1)


def check_not_queued(run: Path, remedy: str) -> None:
    """Check that no job of this run is in SLURM's queue, because two jobs would overwrite each other's files.

    The message has `remedy` as the alternative to cancelling the queued job.
    """
    tree = read_json_object(run / JOB_FILE)
    job_id = tree.get("job_id") if tree.get("launcher") == "slurm" else None
    if job_id is not None and (state := (queued_jobs() or {}).get(str(job_id))) is not None:
        raise UserError(f"{run}: job {job_id} of this run is {state.lower()}; cancel it (qlora-dist cancel), {remedy}")
