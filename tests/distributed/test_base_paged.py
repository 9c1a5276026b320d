"""If this fails, a paged base changes the training, or needs more memory than its budget."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.model.meta_model import build_meta_model, get_decoder_layers
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.parallel import loaded_model
from qlora_dist.runs.run_dir import RunDir, run_path
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 6
PAGED = ("parallel.base=paged", "parallel.resident_bytes=0")
"""Bytes for two of six layers."""


def write_config(folder: Path, **settings: Any) -> Path:
    base = quantize_folder(
        tiny_models.make_model(folder / "source", hidden_size=32, intermediate_size=80, head_dim=8, **settings),
        folder / "nf4",
        QuantizeOptions(),
    ).out
    return tiny_models.make_config(
        folder, base, data__seq_len=48, train__steps=3, train__global_batch=8, train__micro_batch=2, train__eval_every=2
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("paged"), num_hidden_layers=LAYERS)


def resolve(config: Path, ranks: int, *overrides: str) -> Config:
    return load_config(config, [*overrides, f"run.name=run-{ranks}-{abs(hash(overrides))}"])


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()]


def step_numbers(config: Config) -> list[list[float]]:
    """Return losses, held-out losses and gradient norms of a run."""
    return [[row[key] for row in metrics(config) if key in row] for key in ("loss", "eval_loss", "grad_norm")]


def check_equal(config: Path, ranks: int, *overrides: str, nodes: int = 1) -> Config:
    """Train with a resident base and with a paged one, and compare the numbers bit for bit."""
    overrides = (f"train.micro_batch={8 // ranks // 2}", *overrides)  # two or more micro-batches
    plain = resolve(config, ranks, "parallel.base=node", *(o for o in overrides if not o.startswith("paging")))
    paged = resolve(config, ranks, *PAGED, *overrides)
    for resolved in (plain, paged):
        run_ranks(ranks, run_training, resolved, nodes=nodes)
    assert step_numbers(paged) == step_numbers(plain)
    assert step_numbers(plain)[0][-1] < step_numbers(plain)[0][0]  # the loss has fallen
    assert all(row["base_paging"]["bytes_in"] > 0 for row in metrics(paged)[1:])
    return paged


def test_losses_equal_a_resident_bases(config: Path) -> None:
    check_equal(config, 1)


SOURCE = "model.base={source}"  # quantized while it is loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "nodes", "overrides"),
    [
        (1, 1, (SOURCE, "model.compute_dtype=bf16", "train.checkpointing=none", "parallel.prefetch=0")),
        (2, 1, ("model.compute_dtype=bf16", "paging.ahead=3", "train.checkpointing=2")),
        (2, 1, (SOURCE, "parallel.prefetch=2", "paging.ahead=0", "paging.to=host", "train.checkpointing=none")),
        (3, 1, ("parallel.prefetch=0", "lora.dora=true", "train.global_batch=6")),
        (4, 2, (SOURCE, "parallel.adapter=node")),
    ],
    ids=str,
)
def test_losses_equal_a_resident_bases_with_other_settings(
    ranks: int, nodes: int, overrides: tuple[str, ...], config: Path
) -> None:
    check_equal(config, ranks, *(o.format(source=config.parent / "source") for o in overrides), nodes=nodes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("Qwen2", {}),  # biases in the layers
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("Llama", {"tie_word_embeddings": True}),
    ],
)
def test_other_architectures(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    check_equal(write_config(tmp_path, arch=arch, num_hidden_layers=4, **settings), 2)


def layer_bytes(config: Config, ranks: int) -> int:
    """Return the bytes of each layer's page on each rank: whole rows, each shard padded to a multiple of 16 bytes."""
    model = build_meta_model(ModelFolder(config.model.base), config.model)
    sizes = set()
    for layer in get_decoder_layers(model):
        shards = [-(-p.shape[0] // ranks) * (p.nbytes // p.shape[0]) for p in layer.parameters()]
        sizes.add(sum(-(-nbytes // 16) * 16 for nbytes in shards))
    (size,) = sizes
    return size


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "staying", "ahead"), [(1, 3, 1), (1, 1, 2), (2, 3, 0), (2, 0, 3), (1, LAYERS, 1)])
def test_bytes_fetched_equal_the_layers_not_in_memory(ranks: int, staying: int, ahead: int, config: Path) -> None:
    """Each pass fetches all layers except the resident ones and, at its start, those still in slots."""
    size = layer_bytes(load_config(config), ranks)
    slots = max(2, 1 + ahead) if staying else 2  # the least budget holds no more
    budget = 0 if not staying else LAYERS * size if staying == LAYERS else (staying + slots) * size
    overrides = ("parallel.base=paged", f"parallel.resident_bytes={budget}", f"paging.ahead={ahead}")
    paged = resolve(config, ranks, *overrides, "train.steps=2", "train.eval_every=0", "train.micro_batch=2")
    run_ranks(ranks, run_training, paged)
    accumulation = 8 // 2 // ranks
    expected = accumulation * 2 * max(0, LAYERS - staying - slots) * size
    row = metrics(paged)[2]  # the step without an evaluation before it
    assert row["base_paging"]["bytes_in"] == expected
    assert row["base_paging"]["bytes_out"] == 0
    assert row["base_resident_bytes"] == (budget or 2 * size)
    summary = json.loads((run_path(paged.run) / "summary.json").read_text())
    assert 0 <= summary["base_stall_share"] < 1


def train_until(config: Config, step: int) -> None:
    """Request a stop, which takes effect at the end of the next step."""
    log = RunDir.log

    def logged(self: RunDir, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == step - 1:
            (run_path(config.run) / "STOP").touch()

    RunDir.log = logged  # type: ignore[method-assign]
    run_training(config)


@pytest.mark.slow
def test_a_run_resumes_with_a_paged_base_and_then_without(config: Path) -> None:
    settings = ("train.steps=5", "train.micro_batch=8")
    undisturbed = resolve(config, 1, "parallel.base=node", *settings)
    run_ranks(1, run_training, undisturbed)
    plain = load_config(config, ["run.name=resumed", "parallel.base=node", *settings])
    paged = load_config(config, ["run.name=resumed", *PAGED, "paging.ahead=2", *settings])
    run_ranks(1, train_until, plain, 2)
    run_ranks(1, train_until, paged, 4)
    run_ranks(1, run_training, plain)
    assert step_numbers(plain)[0] == step_numbers(undisturbed)[0]
    assert ["base_paging" in row for row in metrics(plain)[1:]] == [False, False, True, True, False]


def config_error(config: Config) -> str:
    """Return the error of a run, and fail if weights are read before it is raised."""

    def fail(*args: Any, **kwargs: Any) -> int:
        raise AssertionError("weights are read")

    loaded_model.load_weights = fail
    try:
        run_training(config)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_error_about_a_small_budget_names_the_least_one(ranks: int, config: Path) -> None:
    least = 2 * layer_bytes(load_config(config), ranks)
    overrides = ("parallel.base=paged", f"parallel.resident_bytes={least - 1}")
    for sentence in run_ranks(ranks, config_error, resolve(config, ranks, *overrides)):
        assert sentence == (
            f"parallel.resident_bytes: {least - 1} is less than two layers of the base, which take {least} bytes on "
            "each rank; raise it, or set it to 0 for just two"
        )


@pytest.mark.parametrize("folder", ["no folder", "full"])
def test_a_full_disk_is_found_before_weights_are_read(folder: str, config: Path, tmp_path: Path) -> None:
    def limited(config: Config) -> str:
        if folder == "full":  # limit this process's files, as a full disk would
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return config_error(config)

    (tmp_path / "file").touch()
    to = tmp_path / ("file" if folder == "no folder" else "")
    (sentence,) = run_ranks(
        1,
        limited,
        load_config(config, [*PAGED, "optim.name=adamw", f"paging.dir={to}", f"run.name=room-{len(folder)}"]),
    )
    assert sentence.startswith(f"{to}: ")
    assert sentence.endswith("; name another folder in paging.dir, or raise parallel.resident_bytes")
    assert ("cannot make a file for the base's layers" if folder == "no folder" else "no room for") in sentence


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("paging.to=unified", "paging.to: unified memory is for optimizer states only"),
        ("parallel.offload=base", "parallel.offload: base and parallel.base: paged exclude each other"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(override: str, message: str, config: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(config, ["parallel.base=paged", override])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_peak_memory_falls_by_the_layers_and_grows_by_the_budget(tmp_path: Path) -> None:
    """The kernel reports the peak of a whole process, so the run has one of its own."""
    result = tmp_path / "result.json"
    size = ["--layers", "10", "--hidden", "2048", "--steps", "1", "--tokens", "16", "--checkpointing", "none"]
    command = [sys.executable, "benchmarks/base_paging.py", *size, "--shares", "0.25", "--ahead", "1"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--dir", str(tmp_path), "--json", str(result)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(result.read_text())
    plain, paged = measured["runs"]
    saved = measured["layers_bytes"] - paged["resident_bytes"]
    assert saved > 150 * 2**20
    assert plain["peak_bytes"] - paged["peak_bytes"] > 0.9 * saved
