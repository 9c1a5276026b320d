"""If this fails, a resumed run differs from an uninterrupted one, or cannot resume."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.checkpoint.manifest import find_checkpoints, read_manifest
from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.runs.run_dir import DONE_MARKER, REQUEUE_MARKER, STOPPED_MARKER, RunDir, run_path
from qlora_dist.train.run_training import run_training
from qlora_dist.train.stop_requests import install_signal_handlers
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    steps = {"train__steps": STEPS, "train__save_every": 2, "train__global_batch": 8, "train__micro_batch": 2}
    return tiny_models.make_config(folder, tiny_llama_nf4, **steps)


def resolve(config: Path, name: str, *overrides: str) -> Config:
    return load_config(config, [f"run.name={name}", *overrides])


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]


def losses(config: Config) -> list[float]:
    rows = metrics(config)
    assert [row["step"] for row in rows] == list(range(config.train.steps + 1)), "a step twice, or none"
    return [row["loss"] for row in rows[1:]]


def eval_losses(config: Config) -> list[float]:
    return [row["eval_loss"] for row in metrics(config) if "eval_loss" in row]


def adapter(config: Config) -> dict[str, torch.Tensor]:
    return load_file(run_path(config.run) / "adapter" / "adapter_model.safetensors")


def run_after_step(step: int, action: Callable[[], Any]) -> None:
    """Do something in this process when the metrics of a step are written."""
    log = RunDir.log

    def logged(self: RunDir, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == step:
            action()

    RunDir.log = logged  # type: ignore[method-assign]


def train_and_die(config: Config, step: int) -> None:
    run_after_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_training(config)


def train_and_touch(config: Config, step: int, name: str) -> None:
    run_after_step(step, (run_path(config.run) / name).touch)
    run_training(config)


@pytest.fixture(scope="module")
def uninterrupted_run(config: Path) -> Config:
    resolved = resolve(config, "undisturbed")
    run_ranks(1, run_training, resolved)
    return resolved


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(config: Path) -> None:
    """Dropout is on, because random states are part of a checkpoint."""
    whole, killed = (resolve(config, name, "lora.dropout=0.1") for name in ("whole", "killed"))
    run_ranks(2, run_training, whole)
    with pytest.raises(RuntimeError):  # rank 0 dies after step 5, and the last checkpoint is from step 4
        run_ranks(2, train_and_die, killed, 5)
    run_ranks(2, run_training, killed)
    assert losses(killed) == losses(whole)
    assert eval_losses(killed) == eval_losses(whole)
    ours, expected = adapter(killed), adapter(whole)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert json.loads((run_path(killed.run) / DONE_MARKER).read_text())["step"] == STEPS


@pytest.mark.parametrize(
    ("before", "afterwards"), [pytest.param(a, b, marks=pytest.mark.slow) for a, b in [(1, 2), (2, 4), (4, 1)]]
)
def test_a_run_resumes_on_another_number_of_ranks(
    before: int, afterwards: int, config: Path, uninterrupted_run: Config
) -> None:
    run = resolve(config, f"from-{before}-to-{afterwards}")
    run_ranks(before, train_and_touch, run, 3, "STOP")
    assert json.loads((run_path(run.run) / STOPPED_MARKER).read_text()) == {"step": 4, "reason": "STOP"}
    assert not (run_path(run.run) / "adapter").exists()
    run_ranks(afterwards, run_training, run)
    assert not (run_path(run.run) / STOPPED_MARKER).exists()
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(uninterrupted_run)), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [((4, 2, "node", "node"), (3, 1, "world", "world"))])
def test_a_run_resumes_on_other_meshes(
    layouts: tuple[tuple[int, int, str, str], ...], config: Path, uninterrupted_run: Config
) -> None:
    """Replicated adapters are written once. Three ranks divide no dimension evenly."""
    for index, (world_size, nodes, base, adapter_mesh) in enumerate(layouts):
        run = resolve(
            config,
            "meshes",
            f"parallel.base={base}",
            f"parallel.adapter={adapter_mesh}",
            "train.global_batch=12",
            f"train.micro_batch={ {4: 3, 3: 2}[world_size] }",
        )
        if index == 0:
            run_ranks(world_size, train_and_touch, run, 3, "STOP", nodes=nodes)
            (newest,) = find_checkpoints(run_path(run.run) / "checkpoints")[:1]
            sizes = [read_manifest(newest).files[f"rank-{rank:05d}.safetensors"][0] for rank in range(4)]
            assert max(sizes[2:]) < 10_000 < min(sizes[:2])  # the second replica's hold random states only
        else:
            run_ranks(world_size, run_training, run, nodes=nodes)
    plain = resolve(config, "meshes-plain", "train.global_batch=12", "train.micro_batch=4")
    run_ranks(1, run_training, plain)
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(plain)), rtol=1e-5, atol=0)


def test_a_checkpoint_is_as_large_as_adapters_and_moments(uninterrupted_run: Config) -> None:
    parameters = sum(tensor.numel() for tensor in adapter(uninterrupted_run).values())
    newest, before = find_checkpoints(run_path(uninterrupted_run.run) / "checkpoints")
    assert (newest.name, before.name) == ("step-000008", "step-000006")  # keep_checkpoints: 2
    size = sum(path.stat().st_size for path in newest.iterdir())
    assert 12 * parameters < size <= 1.02 * 12 * parameters + 2**20


def damage_cases(folder: Path) -> list[tuple[str, Callable[[Path], None]]]:
    """Return functions that damage a checkpoint, by the kind of damage."""

    def flip(name: str, part: float) -> Callable[[Path], None]:
        def do(copy: Path) -> None:
            content = bytearray((copy / name).read_bytes())
            content[min(int(part * len(content)), len(content) - 1)] ^= 4
            (copy / name).write_bytes(content)

        return do

    def cut(name: str) -> Callable[[Path], None]:
        return lambda copy: os.truncate(copy / name, (copy / name).stat().st_size - 1)

    def drop(name: str) -> Callable[[Path], None]:
        return lambda copy: (copy / name).unlink()

    ways = []
    for name in sorted(path.name for path in folder.iterdir()):
        ways += [(f"bit at {part} of {name}", flip(name, part)) for part in (0.0, 0.001, 0.3, 0.6, 1.0)]
        ways += [(f"{name} truncated", cut(name)), (f"{name} missing", drop(name))]
    return ways


def choose_after_each_damage(checkpoints: str, names: list[str], scratch: str) -> list[tuple[str, str | None]]:
    """Return on each rank the checkpoint that is chosen after each damage to the newest one."""
    import torch.distributed as dist

    from qlora_dist.checkpoint.select import latest_complete

    dist.init_process_group("gloo")
    results = []
    newest = Path(checkpoints) / names[0]
    for kind, spoil in damage_cases(newest):
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(checkpoints, scratch)
            spoil(Path(scratch) / names[0])
        dist.barrier()
        lines: list[str] = []
        chosen = latest_complete(Path(scratch), lines.append)
        assert len(lines) == 1 and "it is skipped" in lines[0], (kind, lines)
        results.append((kind, chosen[0].name if chosen else None))
        dist.barrier()
    dist.destroy_process_group()
    return results


def test_every_damage_is_noticed_and_the_previous_checkpoint_chosen(config: Path, tmp_path: Path) -> None:
    run = resolve(config, "damaged", "train.steps=4")
    run_ranks(2, run_training, run)
    checkpoints = run_path(run.run) / "checkpoints"
    names = [path.name for path in find_checkpoints(checkpoints)]
    for results in run_ranks(2, choose_after_each_damage, str(checkpoints), names, str(tmp_path / "copy")):
        assert len(results) == 3 * 7
        assert {name for _, name in results} == {names[1]}, results


def train_with_a_limit(config: Config, step: int) -> None:
    """Limit files to 40 kB from `step` on, as a full disk would. A checkpoint's files are larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    run_after_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit[1])))
    run_after_step(STEPS, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    run_training(config)


def test_a_full_disk_ends_no_run(config: Path, uninterrupted_run: Config) -> None:
    run = resolve(config, "full-disk")
    run_ranks(1, train_with_a_limit, run, 5)
    assert losses(run) == losses(uninterrupted_run)
    kept = [path.name for path in find_checkpoints(run_path(run.run) / "checkpoints")]
    assert kept == ["step-000008", "step-000004"]  # the one of step 6 failed
    assert not list((run_path(run.run) / "checkpoints").glob(".*"))


def train_without_room_for_the_adapter(config: Config) -> None:
    """The limit of the test above begins at the last step. The adapter is larger too."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    run_after_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit[1])))
    run_training(config)


def test_a_disk_too_full_for_the_adapter_is_one_sentence_and_loses_nothing(config: Path) -> None:
    run = resolve(config, "no-room", "train.steps=3")
    with pytest.raises(RuntimeError, match=r"adapter: the adapter cannot be written \(.*\); make room, then the same"):
        run_ranks(1, train_without_room_for_the_adapter, run)
    assert not list(run_path(run.run).glob("adapter*"))
    run_ranks(2, run_training, run)
    assert (run_path(run.run) / "adapter" / "adapter_config.json").exists()
    assert len(losses(run)) == 3


def test_a_file_requests_a_checkpoint(config: Path) -> None:
    run = resolve(config, "asked", "train.save_every=0", "train.steps=4")
    run_ranks(1, train_and_touch, run, 2, "SAVE")
    kept = [path.name for path in find_checkpoints(run_path(run.run) / "checkpoints")]
    assert kept == ["step-000004", "step-000003"]
    assert not (run_path(run.run) / "SAVE").exists()


def train_and_signal(config: Config, step: int, name: str, times: int) -> None:
    """Rank 0 sends itself a signal; the others get none."""
    install_signal_handlers()
    run_after_step(step, lambda: [os.kill(os.getpid(), signal.Signals[name]) for _ in range(times)])
    run_training(config)


@pytest.mark.parametrize(
    ("name", "times", "marker"),
    [("SIGUSR1", 1, REQUEUE_MARKER), ("SIGTERM", 3, REQUEUE_MARKER), ("SIGINT", 1, STOPPED_MARKER)],
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(name: str, times: int, marker: str, config: Path) -> None:
    """SLURM sends SIGTERM twice under torchrun. A launcher may signal one process of many."""
    run = resolve(config, f"signal-{name}", "train.save_every=0")
    run_ranks(2, train_and_signal, run, 2, name, times)
    assert json.loads((run_path(run.run) / marker).read_text()) == {"step": 3, "reason": name}
    assert [path.name for path in find_checkpoints(run_path(run.run) / "checkpoints")] == ["step-000003"]


@pytest.mark.slow
def test_the_second_interrupt_ends_at_once(config: Path) -> None:
    run = resolve(config, "interrupted", "train.save_every=0")
    with pytest.raises(RuntimeError, match="the process died"):
        run_ranks(1, train_and_signal, run, 2, "SIGINT", 2)
    assert metrics(run)[-1]["step"] == 2


@pytest.mark.slow
def test_the_clock_stops_a_run(config: Path) -> None:
    run = resolve(config, "clock", "train.max_time=PT1S")
    run_ranks(1, run_training, run)
    marker = json.loads((run_path(run.run) / REQUEUE_MARKER).read_text())
    assert marker == {"step": 0, "reason": "max_time"}  # the first step begins later than a second
    run_ranks(1, run_training, resolve(config, "clock"))
    assert (run_path(run.run) / DONE_MARKER).exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lora.r=8", r"was made with lora\.r: 4, not 8; set it back, or start over"),
        ("lora.targets=[q_proj]", r"was made with lora\.targets: all-linear, not \['q_proj'\]"),
        ("data.seq_len=64", r"was made with data\.seq_len: 96, not 64"),
        ("train.seed=1", r"was made with train\.seed: 0, not 1"),
        ("train.steps=1", "was written after 2 steps, and this run has 1; raise train.steps"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(override: str, sentence: str, config: Path) -> None:
    run = resolve(config, "first-two", "train.steps=2")
    if not run_path(run.run).exists():
        run_ranks(1, run_training, run)
    changed = resolve(config, "other-" + override.split("=")[0], "train.steps=4", override, "optim.warmup_steps=1")
    checkpoint = run_path(run.run) / "checkpoints" / "step-000002"
    with pytest.raises(RuntimeError, match=sentence):
        run_ranks(1, run_training, changed, str(checkpoint))


def test_other_data_is_refused(config: Path, tmp_path: Path) -> None:
    """The other file has as many tokens in other places, so that only the content differs."""
    run = resolve(config, "data", "train.steps=2")
    run_ranks(1, run_training, run)
    (source,) = run.data.train
    other = tmp_path / "other.jsonl"
    assert isinstance(source, str)
    rows = Path(source).read_text().splitlines()
    other.write_text("\n".join(rows) + "\n")
    run_ranks(
        1, run_training, resolve(config, "data", "train.steps=3", f"data.train=[{other}]")
    )  # an equal copy in another place
    row = json.loads(rows[0])
    row["messages"][0]["content"] = " ".join(reversed(row["messages"][0]["content"].split()))
    rows[0] = json.dumps(row)
    other.write_text("\n".join(rows) + "\n")
    with pytest.raises(RuntimeError, match="was made with other training data"):
        run_ranks(1, run_training, resolve(config, "data", "train.steps=4", f"data.train=[{other}]"))


@pytest.mark.slow
def test_another_base_is_refused(config: Path, tiny_llama_nf4: Path, tmp_path: Path) -> None:
    run = resolve(config, "base", "train.steps=2")
    run_ranks(1, run_training, run)
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_nf4, other)
    run_ranks(
        1, run_training, resolve(config, "base", "train.steps=3", f"model.base={other}")
    )  # an equal copy in another place
    (file,) = other.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match="was made with another base model"):
        run_ranks(1, run_training, resolve(config, "base", "train.steps=4", f"model.base={other}"))


def write_rare_words(path: Path) -> None:
    """One row in the middle of the file differs from all others."""
    rows = path.read_text().splitlines()
    answer = " ".join(str(number**5) for number in range(20, 26))
    messages = [{"role": "user", "content": "!"}, {"role": "assistant", "content": answer}]
    rows[40] = json.dumps({"messages": messages})
    path.write_text("\n".join(rows) + "\n")


@pytest.mark.slow
def test_a_run_returns_to_before_a_spike(tmp_path: Path, tiny_llama_nf4: Path) -> None:
    config = tiny_models.make_config(
        tmp_path,
        tiny_llama_nf4,
        train__steps=60,
        train__global_batch=1,
        train__save_every=5,
        data__packing="none",
        train__eval_every=2,
    )
    write_rare_words(tmp_path / "train.jsonl")
    settings = (
        "lora.modules_to_save=[lm_head]",
        "train.spike_factor=1.7",
        "train.on_spike=rollback",
        "optim.warmup_steps=0",
    )
    run = load_config(config, [*settings, "run.name=back"])
    run_ranks(2, run_training, load_config(config, [*settings, "run.name=back", "train.global_batch=2"]))
    left_out = json.loads((run_path(run.run) / "summary.json").read_text())["left_out_batches"]
    assert len(left_out) == 1
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(61))
    assert [row["step"] for row in rows if "eval_loss" in row] == list(
        range(0, 61, 2)
    )  # those that were done twice too
    losses = [row["loss"] for row in rows[1:]]
    assert max(losses[25:]) < 1.7 * max(losses[15:25])
