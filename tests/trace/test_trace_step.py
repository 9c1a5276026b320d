"""If this fails, `plan --trace` does not match the run that `train` does."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.model.model_folder import ModelFolder, read_model_json
from qlora_dist.trace.trace_step import PartialTrace, StepTrace, trace_checkpoint, trace_step
from tests.helpers import tiny_models
from tests.helpers.measured_step import measure_step
from tests.helpers.ranks import run_ranks

RUNS = [
    (1, ["parallel.base=replicate", "train.checkpointing=none", "train.global_batch=1"]),
    (2, ["train.global_batch=6"]),  # too many micro-batches to trace all
    (4, ["parallel.base=2", "train.micro_batch=2", "train.checkpointing=2"]),
]
"""Number of ranks and settings of each run."""
DEEP = ["parallel.base=2", "train.global_batch=8", "train.checkpointing=2", "model.compute_dtype=fp16"]


def trace_all(configs: list[Config], deep: Config) -> tuple[list[PartialTrace], PartialTrace, StepTrace]:
    """Trace all runs in one process, because the first trace of a process takes some seconds more."""
    traced = [
        trace_checkpoint(config, ModelFolder(config.model.base), world_size, device="cpu")
        for config, (world_size, _) in zip(configs, RUNS, strict=True)
    ]
    base = Path(deep.model.base)
    return (
        traced,
        trace_checkpoint(deep, ModelFolder(base), 8),
        trace_step(deep, read_model_json(base / "config.json"), 8),
    )


@pytest.mark.slow
def test_traced_bytes_equal_a_real_run(tmp_path: Path) -> None:
    few, many = (tiny_models.make_model(tmp_path / f"{count}", num_hidden_layers=count) for count in (3, 7))
    path, deep_path = (tiny_models.make_config(base, base) for base in (few, many))
    common = ["model.compute_dtype=bf16", "data.packing=none", "train.global_batch=8", "optim.name=adamw"]
    configs = [load_config(path, [*common, *settings]) for _, settings in RUNS]
    ((traces, deep, extrapolated),) = run_ranks(1, trace_all, configs, load_config(deep_path, DEEP))

    for (world_size, _), config, traced in zip(RUNS, configs, traces, strict=True):
        for weights_bytes, peaks, traffic in run_ranks(world_size, measure_step, config):
            assert traced.weights_bytes == weights_bytes
            assert traced.traffic == traffic
            assert peaks == pytest.approx(traced.peaks, abs=4096)  # the starts of sequences are not traced

    # few layers extrapolate to many
    assert extrapolated.weights_bytes == deep.weights_bytes
    assert extrapolated.moments_bytes == deep.moments_bytes
    assert extrapolated.traffic == deep.traffic
    assert extrapolated.phases == {
        phase: max(peak for (traced, _), peak in deep.peaks.items() if traced == phase) for phase in extrapolated.phases
    }
