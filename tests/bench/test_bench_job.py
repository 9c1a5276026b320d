"""If this fails, `bench --on slurm` finds a mistake only in the queue, or gives a wrong reason for a job's early end.

tests/slurm/test_bench.py tests it with a cluster.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.bench.bench_job import explain_unfinished_job, job_state_label, split_into_nodes
from qlora_dist.cli.main import main
from qlora_dist.errors import UserError
from qlora_dist.launch.job_script import SlurmJob
from qlora_dist.launch.slurm_queue import JobState, job_state
from tests.helpers import tiny_models


@given(st.integers(1, 200), st.integers(1, 16))
def test_ranks_fill_nodes(ranks: int, most: int) -> None:
    if ranks > most and ranks % most:
        with pytest.raises(UserError, match=f"--ranks: {ranks} cannot be split into nodes of {most} ranks each"):
            split_into_nodes(ranks, most)
        return
    nodes, on_each = split_into_nodes(ranks, most)
    assert nodes * on_each == ranks
    assert on_each <= most
    assert nodes == 1 or on_each == most


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--on", "slurm"], "--on slurm needs --cluster, a file such as configs/clusters/slurm.yaml"),
        (["--cluster", "{cluster}"], "bench: --cluster and --ranks-per-node apply to jobs; add --on slurm"),
        (["--ranks-per-node", "2"], "bench: --cluster and --ranks-per-node apply to jobs; add --on slurm"),
        (["--on", "slurm", "--cluster", "{cluster}", "--ranks", "3"], "--ranks: 3 cannot be split into nodes of 2"),
        (
            ["--on", "slurm", "--cluster", "{cluster}", "--ranks-per-node", "4"],
            "fsdp2 on 4 ranks: --ranks-per-node: 4 is more than the 2 GPUs of a node",
        ),
        (["--on", "slurm", "--cluster", "{cluster}", "data.train=[none.jsonl]"], "fsdp2 on 4 ranks: "),
        (
            ["--on", "slurm", "--cluster", "{cluster}", "--out", "{cluster}/out"],
            "cluster.yaml/out: cannot be made (Not a directory); give another folder",
        ),
    ],
)
def test_mistakes_submit_nothing(
    args: list[str],
    sentence: str,
    tiny_llama_nf4: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = tiny_models.make_config(tmp_path, tiny_llama_nf4, train__global_batch=12)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("gpus_per_node: 2\n")
    write_fake_program(tmp_path, monkeypatch, "sbatch", f"touch {tmp_path}/submitted; exit 1")
    common = ["--compare", "fsdp2", "--ranks", "4", "--out", str(tmp_path / "out")]
    own = [arg.format(cluster=cluster) for arg in args]
    code, stderr = run_cli_bench([str(config), *common, *own], monkeypatch, capfd)
    assert code == 2
    assert sentence in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "submitted").exists()


def test_a_missing_slurm_is_a_user_error(
    tiny_llama_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_models.make_config(tmp_path, tiny_llama_nf4, train__global_batch=4)
    (tmp_path / "cluster.yaml").write_text("{}")
    monkeypatch.setenv("PATH", str(tmp_path))
    args = [config, "--on", "slurm", "--cluster", tmp_path / "cluster.yaml", "--compare", "fsdp2", "--ranks", "2"]
    code, stderr = run_cli_bench([str(arg) for arg in args], monkeypatch, capfd)
    sentence = "--on slurm: there is no command sbatch; call this on a login node of a SLURM cluster"
    assert (code, stderr) == (2, f"qlora-dist: {sentence}\n")


def test_a_running_job_of_an_earlier_benchmark_is_not_disturbed(
    tiny_llama_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_models.make_config(tmp_path, tiny_llama_nf4, train__global_batch=4)
    (tmp_path / "cluster.yaml").write_text("{}")
    write_fake_program(tmp_path, monkeypatch, "sbatch", f"touch {tmp_path}/submitted; exit 1")
    write_fake_program(tmp_path, monkeypatch, "squeue", "echo '7|RUNNING'")
    run = tmp_path / "out" / "runs" / "fsdp2-2"
    run.mkdir(parents=True)
    (run / "job.json").write_text(json.dumps({"launcher": "slurm", "job_id": 7}))
    (run / "metrics.jsonl").write_text("rows of the running job")
    args = [config, "--on", "slurm", "--cluster", tmp_path / "cluster.yaml", "--compare", "fsdp2", "--ranks", "2"]
    code, stderr = run_cli_bench([*map(str, args), "--out", str(tmp_path / "out")], monkeypatch, capfd)
    assert code == 2
    assert f"{run}: job 7 of this run is running; cancel it (qlora-dist cancel), or give another --out\n" in stderr
    assert (run / "metrics.jsonl").exists() and not (tmp_path / "submitted").exists()


def run_cli_bench(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int | str | None, str]:
    monkeypatch.setattr(sys, "argv", ["qlora-dist", "bench", *args])
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capfd.readouterr().err


def write_fake_program(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """Write a script that replaces one of SLURM's commands."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")


@pytest.mark.parametrize(
    ("state", "files", "sentence"),
    [
        ("CANCELLED", ["output"], ": job 7 was cancelled; start the benchmark again (its output: {output})"),
        ("CANCELLED", [], ": job 7 was cancelled; start the benchmark again"),
        ("CANCELLED", ["output", "REQUEUE"], ": job 7 was cancelled; start the benchmark again (its output: {output})"),
        ("TIMEOUT", [], ": job 7 has reached its time limit; raise time in the cluster's file"),
        ("FAILED", ["output", "MISTAKE"], ", job 7: lora.r: is wrong; lower it"),
        (
            "FAILED",
            ["output", "REQUEUE"],
            ": job 7 was stopped before its last step (SIGUSR1), as jobs are before their time limit; raise time "
            "in the cluster's file (its output: {output})",
        ),
        (
            "COMPLETED",
            ["output", "STOPPED"],
            ": job 7 was stopped by hand; start the benchmark again (its output: {output})",
        ),
        ("FAILED", [], ": job 7 has left no output at {output}; give an --out that all nodes see"),
        ("FAILED", ["output"], ": job 7 has failed (FAILED); see {output}"),
        ("UNKNOWN", ["output"], ": job 7 has failed (UNKNOWN); see {output}"),
    ],
)
def test_the_reason_of_an_unfinished_job(state: str, files: list[str], sentence: str, tmp_path: Path) -> None:
    job = SlurmJob(
        name="fsdp2-2", cwd=tmp_path, run=tmp_path, folder=tmp_path / "jobs" / "1", nodes=1, ranks_per_node=2
    )
    job.folder.mkdir(parents=True)
    texts = {
        "output": (job.output, "text"),
        "MISTAKE": (job.folder / "MISTAKE", "lora.r: is wrong; lower it\n"),
        "REQUEUE": (job.run / "REQUEUE", json.dumps({"step": 1, "reason": "SIGUSR1"})),
        "STOPPED": (job.run / "STOPPED", json.dumps({"step": 1, "reason": "STOP"})),
    }
    for name in files:
        path, text = texts[name]
        path.write_text(text)
    assert explain_unfinished_job(job, 7, JobState(state)) == sentence.replace("{output}", str(job.output))


@pytest.mark.parametrize(
    ("squeue", "sacct", "expected"),
    [
        ("echo 'PENDING|Resources|'", "exit 1", (JobState("PENDING", "Resources", ""), False, "waits (Resources)")),
        ("echo 'RUNNING|None|n[1-2]'", "exit 1", (JobState("RUNNING", "None", "n[1-2]"), False, "runs on n[1-2]")),
        ("echo 'COMPLETED|None|n1'", "exit 1", (JobState("COMPLETED", "None", "n1"), True, None)),
        # the queue has dropped the job, with and without accounting
        (
            "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1",
            "echo CANCELLED by 0",
            (JobState("CANCELLED"), True, None),
        ),
        ("true", "echo disabled >&2; exit 1", (JobState("UNKNOWN"), True, None)),
        ("echo Unable to contact slurm controller >&2; exit 1", "exit 1", (None, False, "is in an unknown state")),
    ],
)
def test_job_state_labels(
    squeue: str,
    sacct: str,
    expected: tuple[JobState | None, bool, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, script in (("squeue", squeue), ("sacct", sacct)):
        write_fake_program(tmp_path, monkeypatch, name, script)
    state, (expected_state, has_ended, label) = job_state(7), expected
    assert state == expected_state
    assert (state is not None and state.has_ended) == has_ended
    if label is not None:
        assert job_state_label(state).startswith(label)
