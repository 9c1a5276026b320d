"""Schema of a cluster's YAML file, which holds the settings of all its jobs."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from qlora_dist.config.config_file import load_yaml_config
from qlora_dist.config.sections import ConfigSection, PositiveInt

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", re.IGNORECASE)

SbatchWord = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:@/&|*!()\[\]+=-]+$")]
"""Text that is safe in an `#SBATCH` line. sbatch parses those lines by its own rules."""
SingleLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$")]
EnvVarName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Container(ConfigSection):
    """Container that the ranks run in."""

    runtime: Literal["pyxis", "apptainer"]
    """Container runtime. pyxis: options of srun; apptainer: a command in front of each rank's command."""
    image: SingleLine
    """Image name in the runtime's own notation."""
    mounts: list[SingleLine] = Field(default=[])
    """Mounts, each as HOST:CONTAINER. The run's folder, the model and the data must have the same paths inside."""


class Cluster(ConfigSection):
    """Settings of a cluster, or of one kind of its nodes."""

    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    """GPUs per node, and ranks per node unless `--ranks-per-node` is given. 0: nodes without GPUs."""
    gpu_memory: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU, in GiB. A run whose plan needs more is refused."""
    cpus_per_task: PositiveInt | None = None
    """Processor cores per rank; null: SLURM's default."""
    memory: SbatchWord | None = None
    """Host memory per node, such as 480G; "0": all of it; null: SLURM's default."""
    partition: SbatchWord | None = None
    """Partition of the jobs; null: the cluster's default."""
    account: SbatchWord | None = None
    """Account that the jobs are charged to."""
    qos: SbatchWord | None = None
    """Quality of service."""
    constraint: SbatchWord | None = None
    """Features that nodes must have."""
    reservation: SbatchWord | None = None
    """Reservation of nodes."""
    exclusive: bool = False
    """Exclusive use of the nodes."""
    time: Annotated[timedelta, Field(strict=False, gt=timedelta(0))] | None = None
    """Time limit, such as 24:00:00 or P2D; null: the partition's. Shortly before it a run saves and is requeued."""
    save_time: PositiveInt = 120
    """Seconds before the time limit at which a run must save. SLURM's signal may arrive a minute early."""
    max_requeues: Annotated[int, Field(ge=0)] = 3
    """Maximum number of requeues in a row without a new checkpoint. A job requeues itself after its time limit, a crash
    or the loss of a node."""
    singleton: bool = False
    """Wait of a job until no other job with its name and user runs."""
    form: Literal["srun", "torchrun"] = "srun"
    """Process that starts the ranks. srun: srun starts all ranks; torchrun: srun starts one torchrun on each node."""
    interface: SbatchWord | None = None
    """Network interface of NCCL and gloo (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); null: they choose it."""
    env: dict[EnvVarName, SingleLine] = Field(default={})
    """Environment variables of the job, in addition to the variables of the shell that submits it."""
    modules: list[SingleLine] = Field(default=[])
    """Modules that `module load` loads."""
    setup: list[SingleLine] = Field(default=[])
    """Lines of bash that run first on the job's first node, such as `source /shared/venv/bin/activate`. They are
    inserted unquoted."""
    python: SingleLine | None = None
    """Python interpreter with qlora-dist; null: the submitting one, or python3 in a container or after `setup`."""
    container: Container | None = None
    """Container for the ranks; null: no container."""
    preprocess: bool = False
    """Tokenization of the data on one node before the ranks start, instead of on the submitting machine."""
    preflight: bool = True
    """Test before the ranks start, in which all nodes exchange data. It names a node that is missing or slow."""
    sbatch: list[Annotated[str, StringConstraints(pattern=r"^--[a-z][A-Za-z0-9_.,:@/&|*!()\[\]+=-]*$")]] = Field(
        default=[]
    )
    """Further options of sbatch, such as --mail-type=END."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if _SECRET.search(name):
                raise ValueError(
                    f"env.{name}: looks like a secret, and other users can read job scripts; export it in the shell "
                    "that submits, whose variables the job inherits"
                )
        return env

    @model_validator(mode="after")
    def _consistent(self) -> Cluster:
        if self.time is not None and self.time.total_seconds() <= self.save_time:
            raise ValueError(
                f"save_time: {self.save_time} s must be less than time: {self.time.total_seconds():.0f} s; lower it"
            )
        return self


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster's file, with the error messages of `load_config`."""
    return load_yaml_config(path, Cluster, first_keys="`gpus_per_node:` and `partition:`")
