"""Job script for SLURM, rendered from one template."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_dist.errors import UserError
from qlora_dist.launch.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """Submission of a run to SLURM."""

    name: str
    """Name of the run."""
    cwd: Path
    """Folder that relative paths of the configuration start from."""
    run: Path
    """Absolute path of the run's folder."""
    folder: Path
    """Absolute path of this submission's folder, with configuration, script and output."""
    nodes: int
    ranks_per_node: int
    array: int = 0
    """Number of jobs in a chain that share the run; 0: a single job that requeues itself."""

    @property
    def script(self) -> Path:
        return self.folder / "job.sbatch"

    @property
    def output(self) -> Path:
        """Path of the output of all starts of the job."""
        return self.folder / "output.log"


def render_job_script(job: SlurmJob, cluster: Cluster) -> str:
    """Return the script, with every value quoted."""
    for path in (job.cwd, job.run):
        # sbatch gives a backslash in the output's name another meaning
        if any(char < " " or char in "\x7f\\" for char in str(path)):
            raise UserError(
                f"{str(path)!r}: a job script can't name a folder like that; use one without such characters"
            )
    environment = Environment(
        loader=PackageLoader("qlora_dist.launch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the template is not HTML, and values pass through the filter `q`
    )
    environment.filters["q"] = bash_quote
    network = {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    is_torchrun = cluster.form == "torchrun"
    cores = cluster.cpus_per_task
    return environment.get_template("job.sbatch.jinja").render(
        script=job.script,
        options=list(_sbatch_options(job, cluster)),
        cwd=job.cwd,
        run=job.run,
        job=job.folder,
        python=cluster.python or ("python3" if cluster.container or cluster.setup else sys.executable),
        modules=cluster.modules,
        env={**(network if cluster.interface else {}), **cluster.env},
        setup=cluster.setup,
        cpus_per_task=cores and cores * (job.ranks_per_node if is_torchrun else 1),
        array=job.array,
        nodes=job.nodes,
        ranks_per_node=job.ranks_per_node,
        tasks_per_node=1 if is_torchrun else job.ranks_per_node,
        form=cluster.form,
        max_requeues=cluster.max_requeues,
        srun=_pyxis_options(job, cluster),
        apptainer=_apptainer_command(job, cluster),
        preflight=cluster.preflight and job.nodes > 1,
        preprocess=cluster.preprocess,
    )


def bash_quote(value: object) -> str:
    """Quote a value for bash, or each value of a sequence."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "".join(f"{shlex.quote(str(part))} " for part in value)
    return shlex.quote(str(value))


def _sbatch_options(job: SlurmJob, cluster: Cluster) -> Iterator[str]:
    """Yield options for #SBATCH lines, in which bash expands no variables."""
    is_torchrun = cluster.form == "torchrun"
    yield f"--job-name={job.name}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={1 if is_torchrun else job.ranks_per_node}"
    if cluster.gpus_per_node:
        yield f"--gpus-per-node={job.ranks_per_node}"
    if cluster.cpus_per_task:
        yield f"--cpus-per-task={cluster.cpus_per_task * (job.ranks_per_node if is_torchrun else 1)}"
    named = {
        "mem": cluster.memory,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "time": cluster.time and format_slurm_time(cluster.time),
    }
    yield from (f"--{name}={value}" for name, value in named.items() if value is not None)
    if cluster.exclusive:
        yield "--exclusive"
    if cluster.singleton:
        yield "--dependency=singleton"
    if job.array:
        yield f"--array=0-{job.array - 1}%1"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--signal=B:USR1@{cluster.save_time}"
    output = str(job.output).replace("%", "%%").replace('"', '\\"')
    yield f'--output="{output}"'
    yield from cluster.sbatch


def format_slurm_time(time: timedelta) -> str:
    """Format a time as D-HH:MM, rounded up to whole minutes."""
    minutes = -(-time // timedelta(minutes=1))
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}"


def _pyxis_options(job: SlurmJob, cluster: Cluster) -> list[str]:
    container = cluster.container
    if container is None or container.runtime != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts, f"--container-workdir={job.cwd}"]


def _apptainer_command(job: SlurmJob, cluster: Cluster) -> list[str]:
    container = cluster.container
    if container is None or container.runtime != "apptainer":
        return []
    gpus = ["--nv"] if cluster.gpus_per_node else []
    mounts = [word for mount in container.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *gpus, *mounts, "--pwd", str(job.cwd), container.image]
