"""If this fails, the quickstart trains another model as a job on two nodes than without SLURM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.launch.cluster import Cluster
from qlora_dist.launch.launch import LaunchOptions, launch_slurm
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks
from tests.helpers.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    *("train.steps=2", "train.global_batch=4", "data.seq_len=96", "data.eval=null", "data.workers=1"),
    *("optim.warmup_steps=0", "train.save_every=0"),
)
PATIENCE_S = 400.0


def resolve(folder: Path, model: Path, name: str) -> Config:
    """Return the quickstart's recipe, shortened."""
    overrides = [f"model.base={model}", f"data.train=[{folder / 'train.jsonl'}]", f"data.cache={folder / 'cache'}"]
    run = [f"run.dir={folder / 'runs'}", f"run.name={name}"]
    return load_config(ROOT / "configs" / "recipes" / "quickstart.yaml", [*SHORT, *overrides, *run])


def losses(folder: Path, name: str) -> list[float]:
    rows = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_as_a_job_is_smollm2_at_home(slurm: Any, tmp_path: Path, smollm2_folder: Path) -> None:
    """Both forms run at the same time and quantize on loading."""
    tiny_models.make_data(tmp_path / "train.jsonl", 50)
    jobs = {}
    with warm_python(tmp_path) as python:  # other tests cover the start of a new Python
        for form, others in (("srun", "n[3-7]"), ("torchrun", "n[1-2,5-7]")):
            environ = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": str(python)}
            options: dict[str, Any] = {"gpus_per_node": 0, "preflight": False, "env": environ, "python": str(python)}
            cluster = Cluster(form=form, sbatch=[f"--exclude={others}"], **options)
            config = resolve(tmp_path, smollm2_folder, form)
            launch_slurm(config, cluster, LaunchOptions(nodes=2, ranks_per_node=1), Console(quiet=True))
            jobs[form] = json.loads((tmp_path / "runs" / form / "job.json").read_text())["job_id"]
        run_ranks(2, run_training, resolve(tmp_path, smollm2_folder, "home"))
        states = {form: slurm.ends(job_id, PATIENCE_S) for form, job_id in jobs.items()}
    for form, state in states.items():
        assert state["JobState"] == "COMPLETED", (tmp_path / "runs" / form / "jobs" / "1" / "output.log").read_text()
        assert losses(tmp_path, form) == losses(tmp_path, "home")
    assert len(losses(tmp_path, "home")) == 2
