"""If this fails, a restarted run mixes two branches, begins anew, or writes where another run does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora_dist.checkpoint.manifest import CHECKPOINT_MANIFEST, find_checkpoints, read_manifest
from qlora_dist.checkpoint.select import latest_complete
from qlora_dist.cli.main import app, main
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.parallel import loaded_model
from qlora_dist.runs.run_dir import DONE_MARKER, RunDir, run_path
from qlora_dist.runtime import lease
from qlora_dist.train.run_checkpointer import _check_counters
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks, started_ranks

STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    sizes = {"train__global_batch": 2, "data__seq_len": 32, "data__eval": None, "optim__schedule": "constant"}
    saves = {"train__steps": STEPS, "train__save_every": 2, "train__keep_checkpoints": 3}
    return tiny_models.make_config(tmp_path_factory.mktemp("run-folder"), tiny_llama_nf4, **sizes, **saves)


def resolve(config: Path, name: str, *overrides: str) -> Config:
    return load_config(config, [f"run.name={name}", *overrides])


def metrics(run: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_path(run.run) / "metrics.jsonl").read_text().splitlines()]


def steps(run: Config) -> list[int]:
    return [row["step"] for row in metrics(run)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def train_and_die(config: Config, step: int, resume: str = "auto") -> None:
    log = RunDir.log

    def logged(self: RunDir, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    RunDir.log = logged  # type: ignore[method-assign]
    run_training(config, resume)


def train_and_die_on_ranks(config: Config, step: int, resume: str = "auto") -> None:
    with pytest.raises(RuntimeError, match="the process died"):
        run_ranks(1, train_and_die, config, step, resume)


def fail_while_loading(config: Config, resume: str) -> None:
    def fail(*args: object, **kwargs: object) -> int:
        raise UserError("the disk is gone")

    loaded_model.load_weights = fail
    run_training(config, resume)


def in_job(start: int, function: Callable[..., None], *args: Any) -> None:
    os.environ.update({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(start)})
    function(*args)


@pytest.fixture(scope="module")
def finished(config: Path) -> Config:
    """Train a run whose folder has foreign folders beside its checkpoints."""
    run = resolve(config, "finished")
    checkpoints = run_path(run.run) / "checkpoints"
    (checkpoints / "step-999999").mkdir(parents=True)
    (checkpoints / "step-000001").mkdir()
    (checkpoints / "step-000001" / "notes.txt").write_text("mine")
    run_ranks(1, run_training, run)
    return run


def test_foreign_folders_do_not_count_as_kept_checkpoints(finished: Config) -> None:
    checkpoints = run_path(finished.run) / "checkpoints"
    assert names(checkpoints) == ["step-000001", "step-000004", "step-000006", "step-000008", "step-999999"]
    assert names(checkpoints / "step-000001") == ["notes.txt"]
    assert names(checkpoints / "step-999999") == []


def test_a_finished_run_does_nothing_when_it_is_started_again(finished: Config) -> None:
    """Two ranks agree, and only the time of the marker changes."""
    path = run_path(finished.run)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.name != DONE_MARKER}
    run_ranks(2, run_training, finished)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.name != DONE_MARKER} == before


def test_a_dry_run_checks_everything_and_prints_what_train_would_do(config: Path, finished: Config) -> None:
    words = ["train", str(config), "run.name=finished", "--dry-run"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "train would do nothing" in done.stderr and "  name: finished\n" in done.stdout
    taken = CliRunner().invoke(app, [*words, "lora.alpha=3"])
    assert isinstance(taken.exception, UserError) and "holds a run that is finished" in str(taken.exception)
    mistaken = CliRunner().invoke(app, [*words, "lora.targets=[none]"])
    assert isinstance(mistaken.exception, UserError) and "none is no quantized layer" in str(mistaken.exception)


@pytest.mark.slow
def test_a_branch_from_an_older_checkpoint_is_resumed(config: Path, finished: Config) -> None:
    path = run_path(finished.run)
    checkpoints, older = path / "checkpoints", str(path / "checkpoints" / "step-000004")
    branch = resolve(config, "finished", "train.steps=12", "optim.lr=1e-3")
    there = names(checkpoints)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        run_ranks(1, fail_while_loading, branch, older)
    assert names(checkpoints) == there and steps(finished) == list(range(1, STEPS + 1)), "nothing is lost before"
    train_and_die_on_ranks(branch, 9, older)
    assert names(checkpoints / "abandoned") == ["step-000006", "step-000008"]
    run_ranks(1, run_training, branch)
    assert steps(branch) == list(range(1, 13)), "a step twice, or none"
    assert [row["lr"] for row in metrics(branch)][2:] == [1e-2] * 2 + [1e-3] * 8, "of the branch that was left"
    assert names(checkpoints) == [
        *("abandoned", "step-000001", "step-000008", "step-000010", "step-000012", "step-999999")
    ]
    assert json.loads((path / DONE_MARKER).read_text())["step"] == 12


@pytest.mark.slow
def test_overwriting_is_for_a_jobs_first_start(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = resolve(config, "overwritten", "run.overwrite=true")
    train_and_die_on_ranks(run, 5)
    with pytest.raises(RuntimeError, match="the process died"):
        run_ranks(1, in_job, 0, train_and_die, run, 5)
    assert "resumes after" not in capfd.readouterr().out
    run_ranks(1, in_job, 1, run_training, run)  # requeued
    assert "resumes after" in capfd.readouterr().out
    assert steps(run) == list(range(1, STEPS + 1))
    run_ranks(1, in_job, 2, run_training, run)
    assert "is done after 8 steps" in capfd.readouterr().out


@pytest.mark.slow
def test_a_run_that_failed_before_its_first_checkpoint_may_be_changed(
    config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_and_die_on_ranks(resolve(config, "mended", "train.save_every=0"), 3)
    mended = resolve(config, "mended", "lora.r=2")
    run_ranks(1, run_training, mended)
    assert "held 3 steps of a run with another configuration, which wrote no checkpoint" in capfd.readouterr().out
    assert steps(mended) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_replaced_by_one_of_its_step(config: Path, tmp_path: Path) -> None:
    """A damaged checkpoint is skipped. It must not block the next one of its step, also on another disk."""
    run = resolve(config, "again", "train.steps=4")
    run_ranks(1, run_training, run)
    checkpoints = run_path(run.run) / "checkpoints"
    shutil.move(checkpoints, tmp_path / "elsewhere")
    checkpoints.symlink_to(tmp_path / "elsewhere")
    (checkpoints / "step-000004" / "rank-00000.safetensors").write_bytes(b"x")
    run_ranks(1, run_training, resolve(config, "again", "train.steps=5"))
    assert steps(run) == list(range(1, 6))
    assert names(checkpoints / "abandoned") == ["step-000004"]
    for folder in find_checkpoints(checkpoints):
        manifest = read_manifest(folder)
        assert all((folder / name).stat().st_size == size for name, (size, _) in manifest.files.items())
    assert [folder.name for folder in find_checkpoints(checkpoints)] == ["step-000005", "step-000004", "step-000002"]


def train_cli(*words: str | Path) -> None:
    sys.argv = ["qlora-dist", "train", *map(str, words)]
    main()


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_HEARTBEAT_S", 0.5)
    first_output, second_output = tmp_path / "first", tmp_path / "second"
    for folder in (first_output, second_output):
        folder.mkdir()
    run, words = resolve(config, "twice"), (config, "run.name=twice", "train.steps=1000000")
    file = run_path(run.run) / "metrics.jsonl"

    def count() -> int:
        return file.read_text().count("\n") if file.exists() else 0

    def wait_for_steps(least: int) -> None:
        end = time.monotonic() + 120
        while count() < least:
            assert time.monotonic() < end
            time.sleep(0.05)

    with started_ranks([partial(train_cli, *words)], first_output) as (first,):
        wait_for_steps(3)
        with started_ranks([partial(train_cli, *words)], second_output) as (second,):
            second.join(120)
            assert second.exitcode == 2
        output = (second_output / "rank-0.txt").read_text()
        assert f"another run uses this folder (process {first.pid} on " in output and "Traceback" not in output
        wait_for_steps(count() + 3)
        assert first.is_alive() and steps(run) == list(range(1, len(steps(run)) + 1))
        first.kill()
        first.join()
    done = (count() // 2 + 2) * 2
    run_ranks(1, run_training, resolve(config, "twice", f"train.steps={done}"))
    assert steps(run) == list(range(1, done + 1))


def test_damaged_lines_of_metrics_are_left_out(config: Path) -> None:
    run = resolve(config, "lines")
    run_dir = RunDir(run, is_new=True)
    lines = [
        *(b'{"step": 0}', b'{"step": 1, "loss": 2.0}', b'{"step": "2"}', b'{"step": true}', b'{"step": 1.5}'),
        *(b"[1]", b"3", b"\0\0\xff\xfe", b'{"step": -1}', b"[" * 100_000, b'{"step": 2, "loss": 1.0}'),
        *(b'{"step": 2, "loss": 1.5}', b'{"step": 3, "loss": 1.0}', b'{"step": 2, "lo'),
    ]
    (run_path(run.run) / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run_dir.open_metrics(2, [])
    run_dir.log({"step": 3, "loss": 0.5})
    assert [(row["step"], row.get("loss")) for row in metrics(run)] == [(0, None), (1, 2.0), (2, 1.5), (3, 0.5)]


Edit = Callable[[dict[str, Any]], Any]


def first_shard_spec(tree: dict[str, Any]) -> Any:
    return next(iter(tree["cuts"].values()))


EDITS: dict[str, Edit] = {
    "another step": lambda t: t.update(step=3),
    "a negative step": lambda t: t.update(step=-4),
    "a step that is text": lambda t: t.update(step="4"),
    "another step of the loop": lambda t: t["state"]["progress"].update(step=3),
    "more ranks": lambda t: t.update(world_size=3),
    "fewer ranks": lambda t: t.update(world_size=1),
    "no files": lambda t: t.update(files={}),
    "a file less": lambda t: t["files"].pop("rank-00001.safetensors"),
    "a file elsewhere": lambda t: t["files"].update({"../../etc/passwd": [1, "0" * 64]}),
    "a file that is a number": lambda t: t["files"].update({"rank-00000.safetensors": 3}),
    "a shape": lambda t: first_shard_spec(t).update(shape=[1, 1]),
    "another dimension": lambda t: first_shard_spec(t).update(dim=1 - first_shard_spec(t)["dim"]),
    "no such dimension": lambda t: first_shard_spec(t).update(dim=9),
    "no shards": lambda t: first_shard_spec(t).update(shards=0),
    "more shards": lambda t: [cut.update(shards=4) for cut in t["cuts"].values()],
    "fewer shards": lambda t: [cut.update(shards=1) for cut in t["cuts"].values()],
    "a parameter less": lambda t: t["cuts"].pop(next(iter(t["cuts"]))),
    "no state": lambda t: t.update(state={}),
    "a foreign counter": lambda t: t["state"]["progress"].update(new=1),
    "a counter less": lambda t: t["state"]["progress"].pop("tokens"),
    "a batch that is text": lambda t: t["state"]["progress"].update(left_out=["a"]),
    "a negative counter": lambda t: t["state"]["progress"].update(tokens=-1),
    "a loss scale that is text": lambda t: t["state"].update(loss_scale="x"),
    "other bits": lambda t: t["state"].update(optimizer_bits=8),
    "impossible bits": lambda t: t["state"].update(optimizer_bits=7),
    "updates that are text": lambda t: t["state"].update(optimizer_steps="many"),
    "more updates than steps": lambda t: t["state"].update(optimizer_steps=99),
    "no identity": lambda t: t.update(identity={}),
    "no configuration": lambda t: t["identity"].pop("config"),
    "a foreign key": lambda t: t.update(foreign=1),
}


def choose_after_each_edit(checkpoints: Path) -> list[tuple[str, str | None, list[str]]]:
    """Edit the newest manifest, sign it again, and return the chosen checkpoint and the output."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    newest = find_checkpoints(checkpoints)[0]
    written, results = (newest / CHECKPOINT_MANIFEST).read_bytes(), []
    for kind, edit in EDITS.items():
        tree = json.loads(written)
        edit(tree)
        (newest / CHECKPOINT_MANIFEST).write_bytes(sign_manifest(tree))
        messages: list[str] = []
        chosen = latest_complete(checkpoints, messages.append, _check_counters)
        results.append((kind, chosen and chosen[0].name, messages))
    (newest / CHECKPOINT_MANIFEST).write_bytes(sign_manifest(json.loads(written)))
    chosen = latest_complete(checkpoints, print, _check_counters)
    results.append(("nothing", chosen and chosen[0].name, []))
    dist.destroy_process_group()
    return results


def choose_as_another_user(checkpoints: Path) -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        chosen = latest_complete(checkpoints, print, _check_counters)
        return "" if chosen is None else chosen[0].name
    except UserError as error:
        return str(error)


def sign_manifest(tree: dict[str, Any]) -> bytes:
    import hashlib

    def dump(tree: dict[str, Any]) -> bytes:
        return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()

    digest = hashlib.sha256(dump({**tree, "sha256": "0" * 64})).hexdigest()
    return dump({**tree, "sha256": digest})


def test_a_manifest_that_does_not_fit_its_files_is_skipped(config: Path) -> None:
    run = resolve(config, "edited", "train.steps=4")
    run_ranks(2, run_training, run)
    (results,) = run_ranks(1, choose_after_each_edit, run_path(run.run) / "checkpoints")
    assert results.pop() == ("nothing", "step-000004", [])
    for kind, chosen, messages in results:
        assert chosen == "step-000002", (kind, messages)
        assert len(messages) == 1 and "it is skipped" in messages[0], (kind, messages)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_a_checkpoint_that_may_not_be_read_is_not_skipped(config: Path) -> None:
    """An older checkpoint would cost the steps in between, and the user only has to change a mode."""
    checkpoints = Path(tempfile.mkdtemp()) / "checkpoints"
    try:
        run = resolve(config, "forbidden", "train.steps=4")
        run_ranks(1, run_training, run)
        shutil.copytree(run_path(run.run) / "checkpoints", checkpoints)
        checkpoints.parent.chmod(0o755)
        assert run_ranks(2, choose_as_another_user, checkpoints) == ["step-000004"] * 2
        (checkpoints / "step-000004" / "rank-00000.safetensors").chmod(0)
        sentence = f"{checkpoints}/step-000004: rank-00000.safetensors cannot be read (Permission denied); change"
        assert [said.startswith(sentence) for said in run_ranks(2, choose_as_another_user, checkpoints)] == [True] * 2
    finally:
        shutil.rmtree(checkpoints.parent)
