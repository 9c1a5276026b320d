"""If this fails, `bench --on slurm` differs from `launch`, times jobs that disturb each other, or leaves jobs."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.bench.bench_result import BenchResult
from qlora_dist.cli.main import main
from qlora_dist.config.config_file import load_config
from qlora_dist.launch.cluster import load_cluster
from qlora_dist.launch.launch import LaunchOptions, launch_slurm
from tests.helpers import tiny_models
from tests.helpers.waiting import wait_for
from tests.helpers.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    return tiny_models.make_config(tmp_path_factory.mktemp("bench"), tiny_llama_nf4, train__global_batch=4)


def cluster_file(folder: Path, python: Path) -> Path:
    path = folder / "cluster.yaml"
    tree = {"gpus_per_node": 0, "python": str(python), "preflight": False, "env": {"PYTHONPATH": str(ROOT)}}
    path.write_text(json.dumps(tree))
    return path


class Bench:
    """The command in a forked process, because it needs a main thread and should not repeat imports."""

    def __init__(self, *words: str | Path) -> None:
        self.out = Path(words[words.index("--out") + 1])
        self._words = [*map(str, words)]
        self._output = self.out.with_suffix(".txt")
        self.process = multiprocessing.get_context("fork").Process(target=self._main)
        self.process.start()

    def _main(self) -> None:
        with self._output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["qlora-dist", "bench", *self._words, "--on", "slurm", "--quick"]
        main()

    def says(self, pattern: str) -> str:
        def found() -> str:
            match = re.search(pattern, self._output.read_text() if self._output.exists() else "")
            assert match or self.process.is_alive(), self._output.read_text()
            return match[1] if match else ""

        return wait_for(found, PATIENCE_S)

    def ends(self) -> tuple[int | None, str]:
        self.process.join(PATIENCE_S)
        return self.process.exitcode, self._output.read_text()


def test_layouts_are_jobs_that_take_turns(slurm: Any, config: Path, tmp_path: Path) -> None:
    with warm_python(tmp_path) as python:
        cluster = cluster_file(tmp_path, python)
        words = ["--compare", "fsdp2,two-mesh", "--ranks", "2", "--ranks-per-node", "2", "--out", tmp_path / "out"]
        code, output = Bench(config, *words, "--cluster", cluster).ends()
    assert code == 0, output
    result = BenchResult.model_validate_json((tmp_path / "out" / "bench.json").read_text(), strict=True)
    assert [f.layout for f in result.layouts] == ["fsdp2", "two-mesh"]
    assert result.losses.agree and len(result.layouts[0].losses) == 4
    runs = [tmp_path / "out" / "runs" / name for name in ("fsdp2-2", "two-mesh-2")]
    jobs = [slurm.job(json.loads((run / "job.json").read_text())["job_id"]) for run in runs]
    assert [(job["JobState"], job["Requeue"], job["NumTasks"]) for job in jobs] == [("COMPLETED", "0", "2")] * 2
    assert [f.nodes for f in result.layouts] == [[job["NodeList"]] for job in jobs]
    assert jobs[0]["EndTime"] <= jobs[1]["StartTime"], "one disturbs the other"
    for job in jobs:
        assert f"job {job['JobId']} runs on {job['NodeList']}\n" in output
    recorded = json.loads((runs[0] / "process.json").read_text())["machine"]
    assert (result.machine.cores, result.machine.versions) == (recorded["cores"], recorded["versions"])

    # apart from requeueing it is the script of `launch`
    script = (runs[0] / "jobs" / "1" / "job.sbatch").read_text()
    run_config = load_config(runs[0] / "jobs" / "1" / "config.yaml")
    launched = tmp_path / "launched"
    options = LaunchOptions(nodes=1, ranks_per_node=2, dry_run=True)
    with launched.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        launch_slurm(run_config, load_cluster(cluster), options, Console(quiet=True))
    bench_lines, launch_lines = (
        set(text.replace("/jobs/2", "/jobs/1").splitlines()) for text in (script, launched.read_text())
    )
    assert {line for line in bench_lines ^ launch_lines if "max_requeues" not in line and "count >= " not in line} == {
        "#SBATCH --no-requeue"
    }


def test_what_ends_a_job_or_the_benchmark_leaves_nothing_behind(slurm: Any, config: Path, tmp_path: Path) -> None:
    """Three run at a time: a job that is cancelled, a benchmark that gets Ctrl-C, and a job that fails."""
    benches = {}
    for name, ranks in (("cancelled", "exec sleep 300"), ("interrupted", "exec sleep 300"), ("failed", "exit 1")):
        folder = tmp_path / name
        folder.mkdir()
        python = folder / "python"
        python.write_text(f"#!/bin/bash\n{ranks}\n")
        python.chmod(0o755)
        words = ["--compare", "fsdp2", "--ranks", "1", "--out", folder / "out"]
        benches[name] = Bench(config, *words, "--cluster", cluster_file(folder, python))
    jobs = {name: int(benches[name].says(r"job (\d+) runs on")) for name in ("cancelled", "interrupted")}
    slurm("scancel", str(jobs["cancelled"]))
    assert benches["interrupted"].process.pid is not None
    os.kill(benches["interrupted"].process.pid, signal.SIGINT)
    ends = {name: bench.ends() for name, bench in benches.items()}
    folder = "out/runs/fsdp2-1/jobs/1/output.log"
    assert ends["cancelled"][0] == 2, ends["cancelled"]
    sentence = f"job {jobs['cancelled']} was cancelled; start the benchmark again (its output: {tmp_path}/cancelled/"
    assert f"qlora-dist: fsdp2 on 1 rank: {sentence}{folder})\n" in ends["cancelled"][1]
    assert ends["failed"][0] == 2, ends["failed"]
    assert f" has failed (FAILED); see {tmp_path}/failed/{folder}\n" in ends["failed"][1]
    assert ends["interrupted"][0] == 130, ends["interrupted"]
    assert f"job {jobs['interrupted']}: cancelled\n" in ends["interrupted"][1]
    assert all("Traceback" not in output for _, output in ends.values())
    assert slurm.ends(jobs["interrupted"], PATIENCE_S)["JobState"] == "CANCELLED"
    wait_for(lambda: "fsdp2-1" not in slurm("squeue", "--noheader", "--format=%j"), PATIENCE_S)
