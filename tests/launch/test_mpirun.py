"""If this fails, ranks that mpirun starts train something else, hang, or are left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qlora_dist.config.config_file import load_config
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.launchers import ROOT, alive_pids, environment, mpi, skip_unless
from tests.helpers.ranks import run_ranks
from tests.helpers.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = ROOT / "launch" / "mpirun.sh"
BOTH_MPIS = pytest.mark.parametrize("name", ["mpich", "openmpi"])
JOIN = "import os, sys, time; from qlora_dist.runtime import environment, mpi, process_exit; "


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    folder = tmp_path_factory.mktemp("mpi")
    small = {"data__seq_len": 32, "data__eval": None, "train__global_batch": 4, "train__steps": 3}
    return tiny_models.make_config(folder, tiny_llama_nf4, optim__schedule="constant", **small)


@contextmanager
def mpirun(
    name: str, folder: Path, ranks: int, *words: str | Path, script: bool = False, python: Path | None = None
) -> Iterator[subprocess.Popen]:
    """Run `mpirun` of an MPI with a Python command, or `launch/mpirun.sh`, and kill what is left of it afterwards."""
    folder.mkdir(exist_ok=True)
    path = mpi(name)
    flags = ["--allow-run-as-root", "--oversubscribe"] if name == "openmpi" and not script else []
    command = [SCRIPT] if script else [path / "mpirun", *flags]
    start = [] if script else [python or path / "python"]
    environ = environment(folder) | {"PATH": f"{path}:{os.environ['PATH']}", "OVERSUBSCRIBE": "1"}
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        process = subprocess.Popen(
            [*map(str, command), "-n", str(ranks), *map(str, start), *map(str, words)],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pid in alive_pids(folder):
            os.kill(pid, signal.SIGKILL)


def wait_for_exit(process: subprocess.Popen, folder: Path, within_s: float = 500) -> tuple[int, str]:
    code = process.wait(within_s)
    return code, (folder / "err.txt").read_text()


def expected_exit_codes(name: str, code: int) -> set[int]:
    """Return the exit codes that mpirun may have after a rank exits with `code`.

    MPICH's mpirun combines the codes of all ranks by a bitwise or, and kills the ranks that are left with SIGKILL.
    """
    return {code, code | signal.SIGKILL} if name == "mpich" else {code}


def losses(run: Path) -> torch.Tensor:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return torch.tensor([json.loads(line)["loss"] for line in lines if line.endswith("}")], dtype=torch.float64)


@pytest.fixture(scope="module")
def forked(config: Path) -> dict[int, torch.Tensor]:
    """Return the losses of ranks that no launcher has started."""
    found = {}
    for ranks in (2, 4):
        resolved = load_config(config, [f"run.name=forked-{ranks}"])
        run_ranks(ranks, run_training, resolved)
        found[ranks] = losses(Path(resolved.run.dir) / resolved.run.name)
        assert len(found[ranks]) == 3
    return found


@BOTH_MPIS
def test_the_same_losses(name: str, config: Path, forked: dict[int, torch.Tensor], tmp_path: Path) -> None:
    """One MPI runs ZeRO-3, while the reference ranks, which no launcher has started, run FSDP2."""
    engine, ranks = {"mpich": ("zero3", 4), "openmpi": ("fsdp2", 2)}[name]
    skip_unless(engine == "fsdp2" or find_spec("deepspeed") is not None, "DeepSpeed")
    words = [config, f"run.name={name}-same", f"parallel.engine={engine}"]
    with mpirun(name, tmp_path / name, ranks, *words, script=True) as process:
        code, err = wait_for_exit(process, tmp_path / name)
        assert code == 0, err
        assert not err.strip()
        wait_for(lambda: not alive_pids(tmp_path / name), within_s=60)
    torch.testing.assert_close(losses(config.parent / "runs" / f"{name}-same"), forked[ranks], rtol=1e-5, atol=0)
    out = (tmp_path / name / "out.txt").read_text()
    assert f"{ranks} ranks on cpu" in out
    assert "\x1b" not in out  # lines, though Open MPI's ranks write to a terminal


@BOTH_MPIS
def test_a_killed_rank_ends_all(name: str, config: Path, forked: dict[int, torch.Tensor], tmp_path: Path) -> None:
    run = config.parent / "runs" / f"{name}-2"
    words = [config, f"run.name={name}-2", "train.steps=1000000"]
    with mpirun(name, tmp_path / name, 2, *words, script=True) as process:
        wait_for(lambda: len(losses(run)) >= 3 or process.poll() is not None, within_s=500)
        torch.testing.assert_close(losses(run)[:3], forked[2], rtol=1e-5, atol=0)
        victim = next(pid for pid in alive_pids(tmp_path / name) if is_rank(pid, 1))
        os.kill(victim, signal.SIGKILL)
        assert process.wait(10) != 0
        wait_for(lambda: not alive_pids(tmp_path / name), within_s=60)


def is_rank(pid: int, rank: int) -> bool:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return any(f"{variable}={rank}".encode() in variables for variable in ("OMPI_COMM_WORLD_RANK", "PMI_RANK"))


@BOTH_MPIS
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_mpirun_leaves_no_rank(name: str, number: int, tmp_path: Path) -> None:
    sleep = (
        JOIN + "process_exit.die_with_parent(); mpi.share_store_address(); open(str(os.getpid()), 'w'); time.sleep(100)"
    )
    with mpirun(name, tmp_path / name, 2, "-c", sleep) as process:
        wait_for(lambda: len(list((tmp_path / name).glob("[0-9]*"))) == 2, within_s=100)
        process.send_signal(number)
        assert process.wait(10) != 0
        wait_for(lambda: not alive_pids(tmp_path / name), within_s=60)


@BOTH_MPIS
def test_a_user_error_is_reported_once(name: str, config: Path, tmp_path: Path) -> None:
    with mpirun(name, tmp_path / name, 2, config, "train.stpes=3", script=True) as process:
        code, err = wait_for_exit(process, tmp_path / name)
    assert code in expected_exit_codes(name, 2)  # Open MPI adds some lines of its own
    assert [line for line in err.splitlines() if "qlora-dist" in line] == [
        "qlora-dist: override train.stpes=3: train.stpes: unknown key; did you mean train.steps?"
    ]


@BOTH_MPIS
def test_an_error_of_one_rank_ends_all_with_its_traceback(name: str, tmp_path: Path) -> None:
    fail = (
        "mpi.share_store_address(); environment.read_rank_info().rank or time.sleep(100); "
        "process_exit.exit_with_traceback(ValueError('seven is no prime'))"
    )
    with mpirun(name, tmp_path / name, 2, "-c", JOIN + fail) as process:
        code, err = wait_for_exit(process, tmp_path / name)
        wait_for(lambda: not alive_pids(tmp_path / name), within_s=60)
    assert code in expected_exit_codes(name, 1)
    assert err.count("ValueError: seven is no prime") == 1


@BOTH_MPIS
def test_two_different_mpis_are_refused(name: str, config: Path, tmp_path: Path) -> None:
    # undetected, one MPI would give each rank a world of its own, and the other would abort
    other = mpi("openmpi" if name == "mpich" else "mpich") / "python"
    with mpirun(name, tmp_path / name, 2, "-m", "qlora_dist", "train", config, python=other) as process:
        code, err = wait_for_exit(process, tmp_path / name)
    assert code in expected_exit_codes(name, 2)
    (sentence,) = [line for line in err.splitlines() if "qlora-dist" in line]
    assert re.match(
        r"qlora-dist: mpi4py uses (Open MPI v|MPICH Version: )\S+, and the mpirun that started 2 ranks belongs to "
        "another MPI; use the mpirun of mpi4py's MPI, or set MASTER_ADDR and MASTER_PORT$",
        sentence,
    )


def test_a_missing_mpi4py_is_a_sentence(config: Path, tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError(\"No module named 'mpi4py'\")\n")
    folder = tmp_path / "mpich"
    with_stub = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = ['train', {str(config)!r}]; "
    run = with_stub + "from qlora_dist.cli.main import main; main()"
    with mpirun("mpich", folder, 2, "-c", run) as process:
        code, err = wait_for_exit(process, folder)
    assert code in expected_exit_codes("mpich", 2)
    assert err == (
        "qlora-dist: mpirun started 2 ranks, which need mpi4py to connect, and it does not work here (No module "
        "named 'mpi4py'); install mpi4py, or set MASTER_ADDR and MASTER_PORT\n"
    )
