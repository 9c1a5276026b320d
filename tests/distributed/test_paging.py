"""If this fails, paging the optimizer's moments changes a loss, or a paged run cannot resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.runs.run_dir import run_path
from qlora_dist.train.run_training import run_training
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks
from tests.helpers.train_helpers import losses

STEPS = 6
PAGED = ("paging.page_bytes=4096", "paging.to=disk", "optim.resident_bytes=16KiB")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_nf4: Path) -> Path:
    folder = tmp_path_factory.mktemp("paging")
    return tiny_models.make_config(
        folder, tiny_llama_nf4, train__steps=STEPS, train__save_every=3, train__global_batch=8, train__micro_batch=2
    )


def resolve(config: Path, name: str, *overrides: str) -> Config:
    return load_config(config, [f"run.name={name}", "optim.lora_plus_ratio=4", *overrides])


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_path(config.run) / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.fixture(scope="module")
def unpaged(config: Path) -> Config:
    resolved = resolve(config, "unpaged", "optim.name=adamw")
    run_ranks(1, run_training, resolved)
    return resolved


def checkpoint_halfway(config: Path, name: str, *overrides: str) -> str:
    """Train without paging on 2 ranks, with a checkpoint after 3 steps."""
    resolved = resolve(config, name, *overrides)
    run_ranks(2, run_training, resolved)
    return str(run_path(resolved.run) / "checkpoints" / "step-000003")


def test_paging_changes_no_loss_and_metrics_say_what_moved(config: Path, unpaged: Config) -> None:
    paged = resolve(config, "paged", *PAGED)
    run_ranks(1, run_training, paged)
    assert losses(paged) == losses(unpaged)
    before, after = metrics(unpaged)[-1], metrics(paged)[-1]
    assert before["paging"]["bytes_in"] == before["paged_bytes"] == 0
    assert after["resident_bytes"] == 16384
    assert after["resident_bytes"] + after["paged_bytes"] == before["resident_bytes"] + 2 * 4096  # two slots
    for row in metrics(paged)[1:]:
        assert row["paging"]["bytes_in"] == row["paging"]["bytes_out"] == row["paged_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_a_paged_checkpoint_of_two_ranks_resumes_on_one_and_on_four(bits: int, config: Path) -> None:
    whole = resolve(config, f"whole-{bits}", f"optim.name=paged-adamw-{bits}bit", *PAGED)
    run_ranks(2, run_training, whole)
    saved = str(run_path(whole.run) / "checkpoints" / "step-000003")
    same, one, four = (
        resolve(config, f"{name}-{bits}", *options)
        for name, options in {
            "same": (f"optim.name=paged-adamw-{bits}bit", *PAGED),
            "one": ("optim.name=adamw" if bits == 32 else "optim.name=adamw-8bit",),
            "four": (f"optim.name=paged-adamw-{bits}bit", *PAGED, "optim.resident_bytes=0"),
        }.items()
    )
    for ranks, run in ((2, same), (1, one), (4, four)):
        run_ranks(ranks, run_training, run, saved)
    assert losses(same) == losses(whole)[3:]
    # blocks of 8-bit states lie within a shard, so that other ranks have other blocks
    tolerance = 1e-5 if bits == 32 else 1e-3
    for run in (one, four):
        torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(whole)[3:]), rtol=tolerance, atol=0)


@pytest.mark.slow
def test_moments_change_from_32_bit_to_8_and_back_with_a_message(config: Path, unpaged: Config) -> None:
    saved = str(run_path(unpaged.run) / "checkpoints" / "step-000003")
    fewer = resolve(config, "fewer", "optim.name=adamw-8bit", "run.dir=" + str(run_path(unpaged.run).parent))
    assert "converted from 32 to 8 bit" in resume_output(fewer, saved)
    more = resolve(config, "more", "optim.name=adamw")
    assert "converted from 8 to 32 bit" in resume_output(
        more, str(run_path(fewer.run) / "checkpoints" / "step-000006"), 7
    )
    torch.testing.assert_close(torch.tensor(losses(fewer)), torch.tensor(losses(unpaged)[3:]), rtol=1e-3, atol=0)


def resume_output(config: Config, saved: str, steps: int = STEPS) -> str:
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    (output,) = run_ranks(1, train_capturing_output, longer, saved)
    return output


def train_capturing_output(config: Config, saved: str) -> str:
    import contextlib
    import io

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        run_training(config, saved)
    return " ".join(output.getvalue().split())


def test_a_full_disk_is_reported_before_a_weight_is_read(config: Path) -> None:
    """The folder cannot hold the pages, and the run ends before it has done anything."""
    folder = config.parent / "full"
    folder.write_text("")  # a file in place of the folder
    run = resolve(config, "no-room", *PAGED, f"paging.dir={folder}")
    with pytest.raises(RuntimeError, match="cannot make a file for optimizer states there") as error:
        run_ranks(1, train_failing_on_weight_reads, run)
    assert "weights were read" not in str(error.value)


def train_failing_on_weight_reads(config: Config) -> None:
    import qlora_dist.parallel.loaded_model as loaded_model

    def fail(*args: object, **kwargs: object) -> int:
        raise AssertionError("weights were read")

    loaded_model.load_weights = fail
    run_training(config)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.resident_bytes=6000", "6000 is less than two pages, 8192; raise it"),
        ("paging.to=unified", "unified memory is CUDA's, and this run is on a CPU; set it to host or disk"),
    ],
)
def test_invalid_settings_are_one_sentence(config: Path, override: str, sentence: str) -> None:
    with pytest.raises((UserError, RuntimeError), match=sentence):
        run_ranks(1, run_training, resolve(config, "impossible", "paging.page_bytes=4096", override))
