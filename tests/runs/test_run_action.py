"""If this fails, a command destroys a run, or refuses to start one without a reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_dist.config.config_file import apply_changes, dump_config, load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.runs.run_action import choose_run_action, dry_run_note
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import launch_id
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.launchers import skip_unless
from tests.helpers.ranks import run_ranks

STOPPED_AT = 17


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(tiny_models.make_config(tmp_path, tmp_path / "no-model"))


def make_run(config: Config, *traces: str, steps: int = STOPPED_AT) -> Path:
    """Create a run's folder with configuration, metrics and the given further `traces`."""
    path = run_path(config.run)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(config))
    rows = [{"step": 0, "eval_loss": 3.0}, *({"step": step, "loss": 2.0} for step in range(1, steps + 1))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for trace in traces:
        if trace == "checkpoint":
            (path / "checkpoints" / "step-000005").mkdir(parents=True)
            (path / "checkpoints" / "step-000005" / "manifest.json").write_text("{}")
        elif trace == "adapter":
            (path / "adapter").mkdir()
        else:
            (path / trace).write_text(json.dumps({"step": steps, "reason": "of the test"}))
    return path


def more_steps(config: Config) -> Config:
    return apply_changes(config, {"train": {"steps": 100}})


def fewer_steps(config: Config) -> Config:
    return apply_changes(config, {"train": {"steps": 5}})


def another_rate(config: Config) -> Config:
    return apply_changes(config, {"optim": {"lr": 1e-3}})


def another_layout(config: Config) -> Config:
    return apply_changes(
        config, {"train": {"micro_batch": 2}, "parallel": {"base": "replicate"}, "data": {"workers": 1}}
    )


def with_overwrite(config: Config) -> Config:
    return apply_changes(config, {"run": {"overwrite": True}})


def unchanged(config: Config) -> Config:
    return config


@pytest.mark.parametrize(
    ("traces", "command", "resume", "way"),
    [
        (("DONE", "adapter", "checkpoint"), unchanged, "auto", "done"),
        (("DONE", "adapter", "checkpoint"), unchanged, "none", "done"),  # the same command once more
        (("DONE", "adapter", "checkpoint"), another_layout, "auto", "done"),
        (("DONE", "adapter", "checkpoint"), more_steps, "auto", "resume"),
        (("DONE", "adapter", "checkpoint"), fewer_steps, "auto", "holds a run that is finished after 17 steps"),
        (("DONE", "adapter", "checkpoint"), another_rate, "auto", "holds a run that is finished after 17 steps"),
        (("DONE", "adapter", "checkpoint"), with_overwrite, "auto", "replace"),
        (("STOPPED", "checkpoint"), unchanged, "auto", "resume"),
        (("STOPPED", "checkpoint"), another_rate, "auto", "resume"),  # a later check compares it with the checkpoint
        (("STOPPED", "checkpoint"), unchanged, "none", "holds a run already"),
        (("REQUEUE", "checkpoint"), with_overwrite, "auto", "replace"),
        (("adapter",), unchanged, "auto", "holds a run already"),
        ((), unchanged, "auto", "begin"),
        ((), another_rate, "auto", "begin"),
        ((), another_rate, "none", "begin"),
        (
            ("DONE",),
            lambda config: apply_changes(config, {"train": {"steps": None}}),
            "auto",
            "resume",
        ),  # 100 steps by default
    ],
)
def test_action_in_the_folder_of_an_earlier_run(
    traces: tuple[str, ...], command: Callable[[Config], Config], resume: str, way: str, config: Config
) -> None:
    make_run(config, *traces)
    if way in ("begin", "replace", "resume", "done"):
        assert choose_run_action(command(config), resume).kind == way
    else:
        with pytest.raises(UserError, match=way):
            choose_run_action(command(config), resume)


def test_lost_steps_of_a_run_without_a_checkpoint_are_reported(config: Config) -> None:
    """After an out-of-memory error in the first steps, users change the configuration and keep the name."""
    assert choose_run_action(config).note is None
    make_run(config)
    assert choose_run_action(config).note is None  # the same run, ended by a lost node
    found = choose_run_action(another_rate(config))
    assert found.note is not None and f"held {STOPPED_AT} steps of a run with another configuration" in found.note


@pytest.mark.parametrize("variables", ["torchrun", "srun", "mpirun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_finished_run_is_done_on_each_rank_alone(
    variables: str, rank: int, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No rank waits for another, so a single rank ends as well. No model exists that could be loaded."""
    environ = {
        "torchrun": {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "192.0.2.1",
            "MASTER_PORT": 1,
            "TORCHELASTIC_RUN_ID": "x",
        },
        "srun": {
            "SLURM_JOB_ID": 7,
            "SLURM_STEP_ID": 0,
            "SLURM_PROCID": rank,
            "SLURM_STEP_NUM_TASKS": 2,
            "SLURM_LOCALID": 0,
            "SLURM_NODEID": rank,
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        },
        "mpirun": {"PMI_RANK": rank, "PMI_SIZE": 2, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": 2},
    }[variables]
    for name, value in environ.items():
        monkeypatch.setenv(name, str(value))
    path = make_run(config, "DONE", "adapter", "checkpoint")
    os.utime(path / "DONE", (0, 0))
    run_training(config)
    message = capsys.readouterr().out
    assert message == (f"{choose_run_action(config).note}\n" if rank == 0 else "")
    # a job script only reads markers newer than its start
    assert ((path / "DONE").stat().st_mtime > 0) == (rank == 0)


JOB = {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": "7"}
ARRAY = {**JOB, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}


@pytest.mark.parametrize(
    ("before", "now", "way"),
    [
        ({}, {}, "replace"),
        (JOB, JOB | {"SLURM_RESTART_COUNT": "1"}, "resume"),
        (JOB, JOB, "replace"),  # a second command in one allocation
        (JOB, JOB | {"SLURM_JOB_ID": "8"}, "replace"),
        (ARRAY, ARRAY | {"SLURM_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "1"}, "resume"),
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "a"}, "resume"),  # the same agent
        ({}, {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}, "replace"),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "none", "elsewhere/step-000003"])
def test_a_restarted_command_continues_its_run(
    before: dict[str, str], now: dict[str, str], way: str, resume: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run.overwrite` and `--resume` apply to the first start, or a requeued job would lose its work each time."""
    path = make_run(config, "checkpoint")
    (path / "process.json").write_text(json.dumps({"launch": launch_id(before)}))
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    found = choose_run_action(with_overwrite(config), resume)
    assert (found.kind, found.resume) == (way, resume if way == "replace" else "auto")


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "process.json", "summary.json", "DONE", "REQUEUE", "SAVE", "STOP"]
)
@pytest.mark.parametrize("kind", ["a folder", "a pipe"])
def test_a_file_of_another_kind_is_refused(name: str, kind: str, config: Config) -> None:
    path = make_run(config, "checkpoint")
    (path / name).unlink(missing_ok=True)
    if kind == "a folder":
        (path / name).mkdir()
    else:
        os.mkfifo(path / name)
    with pytest.raises(UserError, match=f"{name}: is not a file, and a run needs a file there; move it away"):
        choose_run_action(config)


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "tensorboard", "."])
def test_a_folder_of_another_kind_is_refused(name: str, config: Config) -> None:
    path = make_run(config) / name
    if path.is_dir():
        shutil.rmtree(path)
    path.write_text("x")
    with pytest.raises(UserError, match="is not a folder"):
        choose_run_action(config)


def test_metrics_of_another_program_are_kept(config: Config) -> None:
    path = make_run(config)
    (path / "config.yaml").unlink()
    with pytest.raises(UserError, match="holds a run already"):
        choose_run_action(config)


def test_an_invalid_marker_is_ignored(config: Config) -> None:
    path = make_run(config, "checkpoint")
    for content in (b"xx", b"[]", b'{"step": "17"}', b'{"step": -1}', b"\xff", b"[" * 200_000):
        (path / "DONE").write_bytes(content)
        assert choose_run_action(config).kind == "resume", content


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Create a folder that every user may read, unlike pytest's, which belong to root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def check_as_other_user(config: Config) -> str:
    """Return the action or error message for a user other than root, because file modes do not stop root."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        return choose_run_action(config).kind
    except UserError as error:
        return str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_missing_permissions_are_reported(config: Config, open_folder: Path) -> None:
    config = apply_changes(config, {"run": {"dir": str(open_folder / "runs")}})
    path = make_run(config, "checkpoint")
    for mine in (path.parent, path, *path.rglob("*")):
        os.chown(mine, 65534, 65534)
    assert run_ranks(1, check_as_other_user, config) == ["resume"]
    newest = path / "checkpoints" / "step-000005"
    for spoilt, mode in [
        (path, 0o555),
        (path / "metrics.jsonl", 0o000),
        (path / "metrics.jsonl", 0o444),
        (path / "config.yaml", 0o444),
        (path / "checkpoints", 0o000),
        (path / "checkpoints", 0o555),
        (newest, 0o000),
        (newest / "manifest.json", 0o000),
    ]:
        before = spoilt.stat().st_mode
        spoilt.chmod(mode)
        (message,) = run_ranks(1, check_as_other_user, config)
        spoilt.chmod(before)
        assert message.startswith(f"{spoilt}: cannot be ") and f"mode {mode:03o}; this is user 65534" in message, (
            message
        )
    new = apply_changes(config, {"run": {"name": "new"}})
    path.parent.chmod(0o555)
    assert "give run.dir another value" in run_ranks(1, check_as_other_user, new)[0]


def test_a_read_only_file_system_is_reported(config: Config, tmp_path: Path) -> None:
    skip_unless(os.geteuid() == 0, "root, to mount,")
    folder = tmp_path / "mounted"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    try:
        config = apply_changes(config, {"run": {"dir": str(folder)}})
        make_run(config, "checkpoint")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for name in ("run", "new"):
            with pytest.raises(UserError, match=r"cannot be .*the file system is read-only"):
                choose_run_action(apply_changes(config, {"run": {"name": name}}))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("traces", "command", "note"),
    [
        ((), unchanged, None),
        (("DONE",), unchanged, "train would do nothing: .* is done after 17 steps"),
        (("checkpoint",), unchanged, "train would resume the run in"),
        (("DONE",), with_overwrite, "train would replace the run in"),
    ],
)
def test_a_dry_run_prints_what_train_would_do(
    traces: tuple[str, ...], command: Callable[[Config], Config], note: str | None, config: Config
) -> None:
    make_run(config, *traces)
    message = dry_run_note(command(config), "auto")
    assert message == note or re.match(str(note), str(message)), message


@pytest.mark.parametrize(
    ("traces", "command", "message"),
    [(("DONE",), another_rate, "holds a run that is finished"), (("adapter",), unchanged, "holds a run already")],
)
def test_a_dry_run_refuses_what_train_would_refuse(
    traces: tuple[str, ...], command: Callable[[Config], Config], message: str, config: Config
) -> None:
    make_run(config, *traces)
    with pytest.raises(UserError, match=message):
        dry_run_note(command(config), "auto")


def test_a_run_does_not_replace_the_adapter_that_it_begins_from(config: Config) -> None:
    path = make_run(config, "DONE", "adapter")
    command = apply_changes(with_overwrite(config), {"lora": {"from": str(path / "adapter")}})
    with pytest.raises(UserError, match=r"lora.from: .* lies in the folder of this run, which run.overwrite=true"):
        choose_run_action(command)
