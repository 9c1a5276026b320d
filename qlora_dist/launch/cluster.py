"""What is the same for all jobs of a cluster: a YAML file, as strict as a run's configuration."""

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
"""What may stand in a line of `#SBATCH`: sbatch takes those lines apart in its own way."""
SingleLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$")]
EnvVarName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Container(ConfigSection):
    """Where the ranks run."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: options of srun; apptainer: a command before each rank's."""
    image: SingleLine
    """As that runtime names images."""
    mounts: list[SingleLine] = Field(default=[])
    """HOST:CONTAINER each. The run's folder, the model and the data must be there under the names they have here."""


class Cluster(ConfigSection):
    """One cluster, or one kind of its nodes."""

    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    """GPUs of a node, and the ranks on it unless `--ranks-per-node` says otherwise. 0: nodes without GPUs."""
    gpu_memory: Annotated[float, Field(gt=0)] | None = None
    """GiB of one GPU. A run that needs more by its plan is refused."""
    cpus_per_task: PositiveInt | None = None
    """Processor cores of a rank; null: what SLURM gives by itself."""
    memory: SbatchWord | None = None
    """Host memory of a node, such as 480G; "0": all of it; null: what SLURM gives by itself."""
    partition: SbatchWord | None = None
    """Where jobs go; null: the cluster's default."""
    account: SbatchWord | None = None
    """Who pays."""
    qos: SbatchWord | None = None
    """Quality of service."""
    constraint: SbatchWord | None = None
    """Features that nodes must have."""
    reservation: SbatchWord | None = None
    """Nodes that are reserved."""
    exclusive: bool = False
    """Have the nodes alone."""
    time: Annotated[timedelta, Field(strict=False, gt=timedelta(0))] | None = None
    """Time limit, such as 24:00:00 or P2D; null: the partition's. At its end a run saves, and is requeued."""
    save_time: PositiveInt = 120
    """Seconds before the time limit at which a run is told to save. SLURM may be a minute early."""
    max_requeues: Annotated[int, Field(ge=0)] = 3
    """A job requeues itself after its time limit, a crash or the loss of a node; so often in a row without a new
    checkpoint."""
    singleton: bool = False
    """Start a job only when no other of its name and user runs."""
    form: Literal["srun", "torchrun"] = "srun"
    """Who starts the ranks: srun all of them, or srun one torchrun on each node."""
    interface: SbatchWord | None = None
    """Network interface for NCCL's and gloo's connections (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); null: their
    choice."""
    env: dict[EnvVarName, SingleLine] = Field(default={})
    """Variables of the job. The job has those of the shell that submits it, too."""
    modules: list[SingleLine] = Field(default=[])
    """Loaded by `module load`."""
    setup: list[SingleLine] = Field(default=[])
    """Lines of bash that run first on the job's first node, such as `source /shared/venv/bin/activate`. They are not
    quoted: they are a script of yours."""
    python: SingleLine | None = None
    """The Python that has qlora-dist; null: the one that submits, and python3 in a container or after `setup`."""
    container: Container | None = None
    """Run in a container."""
    preprocess: bool = False
    """Have one node tokenize the data before the ranks start, not the machine that submits."""
    preflight: bool = True
    """Before the ranks start, have all nodes meet and exchange data, and name the one that is missing or slow."""
    sbatch: list[Annotated[str, StringConstraints(pattern=r"^--[a-z][A-Za-z0-9_.,:@/&|*!()\[\]+=-]*$")]] = Field(
        default=[]
    )
    """Further options, such as --mail-type=END."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if _SECRET.search(name):
                raise ValueError(
                    f"env.{name}: looks like a secret, and job scripts are read by others; export it in the shell that "
                    "submits, which hands it on"
                )
        return env

    @model_validator(mode="after")
    def _consistent(self) -> Cluster:
        if self.time is not None and self.time.total_seconds() <= self.save_time:
            raise ValueError(
                f"save_time: {self.save_time} s are no less than time: {self.time.total_seconds():.0f} s; lower it"
            )
        return self


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster's file.

    Raises:
        UserError: naming file and line, the key, and the remedy.
    """
    return load_yaml_config(path, Cluster, first_keys="`gpus_per_node:` and `partition:`")
