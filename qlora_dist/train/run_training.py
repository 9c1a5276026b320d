"""A training run from its configuration to its adapter."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from qlora_dist.adapters.export import export_adapter
from qlora_dist.config.schema import Config
from qlora_dist.io.read_ahead import ReadProgress
from qlora_dist.model.load_weights import load_weights
from qlora_dist.model.meta_model import get_decoder_layers
from qlora_dist.parallel.engine import parallelize
from qlora_dist.parallel.mesh import build_meshes
from qlora_dist.parallel.paged_layers import PagedLayers
from qlora_dist.parallel.static_bytes import check_static_bytes
from qlora_dist.runs.run_action import skip_if_finished
from qlora_dist.runs.run_dir import DONE_MARKER, REQUEUE_MARKER, STOPPED_MARKER, RunDir, run_path
from qlora_dist.runs.run_lock import lock_run_dir
from qlora_dist.runtime.device_memory import free_memory_bytes
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.runtime.machine_info import machine_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.runtime.watchdog import watchdog
from qlora_dist.train.console import RunConsole
from qlora_dist.train.initial_adapter import load_initial_tensors
from qlora_dist.train.optimizer import make_optimizer_state
from qlora_dist.train.out_of_memory import explain_out_of_memory
from qlora_dist.train.prediction import RunPrediction, check_adapter_numel, predict_run
from qlora_dist.train.rank_consistency import check_ranks_agree, check_shared_run_dir
from qlora_dist.train.run_checkpointer import find_resume_point
from qlora_dist.train.run_setup import RunSetup, set_up_run
from qlora_dist.train.stop_requests import MANUAL_STOP_REASONS, remove_stale_stop_file
from qlora_dist.train.summary import LoadStats, describe_run, summarize
from qlora_dist.train.tolerant_output import record_lost_output
from qlora_dist.train.trackers import open_trackers
from qlora_dist.train.trainer import train_loop

AfterTraining = Callable[[Path, Callable[[str], None]], None]
"""A function that rank 0 calls with the folder of a finished run, and with a function that prints a line."""


def run_training(config: Config, resume: str = "auto", after_training: AfterTraining | None = None) -> None:
    """Train on every rank, under any launcher or in a single process.

    Args:
        config: of the run.
        resume: `auto`: go on from the run's newest whole checkpoint, if it has one; `none`; or a checkpoint's folder.
        after_training: called once the run is done.

    Raises:
        UserError: what the user has to mend; nearly always before any rank waits for another.
    """
    ranks = read_rank_info()
    if skip_if_finished(config, resume, ranks.rank):
        return
    timeout_s, path = config.train.timeout, run_path(config.run)
    with (
        RunConsole(ranks.rank, plain=ranks.launcher == "mpi") as console,
        # only rank 0 holds the folder: where it goes, the others go
        lock_run_dir(path, console.say) if ranks.rank == 0 else nullcontext(),
    ):
        if ranks.rank == 0 and (dropped := remove_stale_stop_file(path)):
            console.say(dropped)
        setup = set_up_run(config, ranks, console.console)
        with (
            process_group(ranks, setup.device, timeout_s) as store,
            watchdog(store, ranks, timeout_s),
            explain_out_of_memory(setup),
        ):
            train_and_export(setup, console, resume)
        if ranks.rank == 0 and (path / DONE_MARKER).exists():
            if after_training is not None:
                after_training(path, console.say)
            adapter = shlex.quote(str(path / "adapter"))
            console.say(f"try it: qlora-dist generate 'Your question' --adapter {adapter}")


def train_and_export(setup: RunSetup, console: RunConsole, resume: str = "auto") -> None:
    """The whole way through, on every rank of the process group."""
    started = time.perf_counter()
    config, model = setup.config, setup.model
    check_ranks_agree(config, setup.ranks, setup.device, setup.data_sha256)
    check_shared_run_dir(config, setup.ranks)
    start = find_resume_point(setup, resume, console)
    run_dir = None
    if setup.ranks.rank == 0:
        machine = machine_info(setup.device.type)
        run_dir = RunDir(
            config, is_new=start.manifest is None, replace=start.replaces_run, steps=setup.steps, machine=machine
        )
        record_lost_output(run_dir.path)
    expected = predict_run(setup)
    if isinstance(expected, RunPrediction):
        check_adapter_numel(expected.run, model)
    for line in describe_run(setup):
        console.say(line)
    console.say(expected if isinstance(expected, str) else expected.sentence())

    torch.manual_seed(config.train.seed + setup.ranks.rank + start.step)  # dropout: every rank its own
    offload = config.parallel.offload == "base"
    meshes = build_meshes(setup.sizes, setup.device.type, separate_groups=offload)
    traffic = parallelize(model, meshes, config)
    # room for what does not stay on the device is reserved before the weights are read
    optimizer_state = make_optimizer_state(model, setup)

    def on_read(reading: ReadProgress) -> None:
        record_heartbeat(phase="loading")
        console.loaded(reading)

    pages = _make_paged_layers(setup, console)
    console.start_loading()
    load_started = time.perf_counter()
    read_bytes = load_weights(
        model, setup.folder, setup.device, config.train.seed, meshes.base_replicas, offload, on_read, pages
    )
    if setup.initial_tensors and start.manifest is None:
        load_initial_tensors(model, setup.initial_tensors)
    load_s = time.perf_counter() - load_started
    page_sizes = (pages.held_bytes, pages.budget) if pages is not None else (0, 0)
    static_bytes = check_static_bytes(model, setup.sizes, *page_sizes)
    console.log_loaded(static_bytes)

    with (
        closing(optimizer_state),
        closing(pages) if pages is not None else nullcontext(),
        closing(run_dir) if run_dir is not None else nullcontext(),
        _track_metrics(config, run_dir, start.manifest is None, console),
    ):
        history = train_loop(model, optimizer_state, setup, start, traffic, console, run_dir, pages, started)
    step = history.progress.step
    if history.stop is not None:
        marker = STOPPED_MARKER if history.stop in MANUAL_STOP_REASONS else REQUEUE_MARKER
        console.say(f"stopped by {history.stop} after {step} steps; the same command goes on from there ({marker})")
        if run_dir is not None:
            run_dir.write_marker(marker, step, history.stop)
        return
    record_heartbeat(step, "saving the adapter")
    export_adapter(model, setup.adapter, run_path(config.run) / "adapter", setup.served.save)
    load_stats = LoadStats(static_bytes, optimizer_state.resident_bytes, read_bytes, load_s)
    summarize(setup, history, load_stats, expected, console, run_dir)
    if run_dir is not None:
        run_dir.write_marker(DONE_MARKER, step, "last step")


@contextmanager
def _track_metrics(config: Config, run_dir: RunDir | None, is_new: bool, console: RunConsole) -> Iterator[None]:
    """On rank 0, what goes into metrics.jsonl goes to trackers too."""
    if run_dir is None:
        yield
        return
    with open_trackers(config, run_dir.path, is_new, console.say) as log:
        run_dir.listeners.append(log)
        yield


def _make_paged_layers(setup: RunSetup, console: RunConsole) -> PagedLayers | None:
    """Take the room for the decoder layers, on the device and behind it, before any weight is read."""
    parallel = setup.config.parallel
    if parallel.base != "paged":
        return None
    free = free_memory_bytes(setup.device, setup.ranks.local_world_size)
    layers: list[FSDPModule] = []
    for layer in get_decoder_layers(setup.model):
        assert isinstance(layer, FSDPModule), "only the fsdp2 engine pages the base"
        layers.append(layer)
    pages = PagedLayers(setup.model, layers, setup.device, parallel.resident_bytes, free, setup.config.paging)
    console.say(pages.sentence())
    return pages
