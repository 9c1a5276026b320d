"""A training run from its configuration to its adapter."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch

from qlora_dist.adapters.export import export_adapter
from qlora_dist.config.schema import Config
from qlora_dist.model.adapter_init import init_adapter
from qlora_dist.model.meta_model import LossModel
from qlora_dist.parallel.loaded_model import load_trainable_model, shard_model
from qlora_dist.parallel.paged_layers import PagedLayers
from qlora_dist.runs.run_action import skip_if_finished
from qlora_dist.runs.run_dir import DONE_MARKER, REQUEUE_MARKER, STOPPED_MARKER, RunDir, run_path
from qlora_dist.runs.run_lock import lock_run_dir
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.heartbeat import record_heartbeat
from qlora_dist.runtime.process_group import process_group
from qlora_dist.runtime.system import machine_info
from qlora_dist.runtime.watchdog import watchdog
from qlora_dist.train.console import RunConsole
from qlora_dist.train.control_flags import MANUAL_STOP_REASONS
from qlora_dist.train.initial_adapter import load_initial_tensors
from qlora_dist.train.out_of_memory import explain_out_of_memory
from qlora_dist.train.prediction import predict_run
from qlora_dist.train.rank_consistency import check_ranks_agree, check_shared_run_dir
from qlora_dist.train.run_checkpointer import find_resume_point
from qlora_dist.train.run_setup import RunSetup, set_up_run
from qlora_dist.train.stop_requests import remove_stale_stop_file
from qlora_dist.train.summary import LoadStats, describe_run, summarize
from qlora_dist.train.tolerant_output import record_lost_output
from qlora_dist.train.trackers import open_trackers
from qlora_dist.train.trainer import Trainer

AfterTraining = Callable[[Path, Callable[[str], None]], None]
"""Function that rank 0 calls with the folder of a finished run, and with a function that prints a line."""


def run_training(config: Config, resume: str = "auto", after_training: AfterTraining | None = None) -> None:
    """Train on every rank, under any launcher or in a single process.

    `resume` is `auto` (resume from the run's newest complete checkpoint, if any), `none`, or a checkpoint's folder.

    Raises:
        UserError: the user must correct something. Nearly all checks come before any rank waits for another.
    """
    ranks = read_rank_info()
    if skip_if_finished(config, resume, ranks.rank):
        return
    timeout_s, path = config.train.timeout, run_path(config.run)
    with (
        RunConsole(ranks.rank, plain=ranks.launcher == "mpi") as console,
        # rank 0 locks the folder for all ranks
        lock_run_dir(path, console.say) if ranks.rank == 0 else nullcontext(),
    ):
        if ranks.rank == 0 and (removed := remove_stale_stop_file(path)):
            console.say(removed)
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
    """Load, train and export. Called on every rank of the process group."""
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
    for line in describe_run(setup):
        console.say(line)

    torch.manual_seed(config.train.seed + setup.ranks.rank + start.step)  # each rank has its own dropout
    sharded = shard_model(model, config, setup.ranks, setup.device)

    def fill_adapter(model: LossModel) -> None:
        if setup.initial_tensors and start.manifest is None:
            load_initial_tensors(model, setup.initial_tensors)
        else:
            init_adapter(model, config.train.seed)

    def before_reading(paged_layers: PagedLayers | None) -> None:
        if paged_layers is not None:
            console.say(paged_layers.sentence())
        console.start_loading()

    loaded = load_trainable_model(
        sharded, setup.folder, fill_adapter=fill_adapter, before_reading=before_reading, on_read=console.loaded
    )
    optimizer_state, pages, static_bytes = loaded.optimizer_state, loaded.paged_layers, loaded.static_bytes
    console.log_loaded(static_bytes)

    prediction = predict_run(setup)
    console.say(prediction if isinstance(prediction, str) else prediction.describe())
    with (
        closing(optimizer_state),
        closing(pages) if pages is not None else nullcontext(),
        closing(run_dir) if run_dir is not None else nullcontext(),
        _track_metrics(config, run_dir, console, is_new=start.manifest is None),
    ):
        trainer = Trainer(setup, start, loaded, console, run_dir)
        result = trainer.train(run_started=started)
    step = result.progress.step
    if result.stop_reason is not None:
        marker = STOPPED_MARKER if result.stop_reason in MANUAL_STOP_REASONS else REQUEUE_MARKER
        console.say(f"stopped by {result.stop_reason} after {step} steps; the same command continues ({marker})")
        if run_dir is not None:
            run_dir.write_marker(marker, step, result.stop_reason)
        return
    record_heartbeat(step, "saving the adapter")
    export_adapter(model, setup.adapter, run_path(config.run) / "adapter", setup.served.save)
    load_stats = LoadStats(
        static_bytes=static_bytes,
        optimizer_state_bytes=optimizer_state.resident_bytes,
        read_bytes=loaded.read_bytes,
        load_s=loaded.load_s,
    )
    summarize(setup, result, load_stats, prediction, console, run_dir)
    if run_dir is not None:
        run_dir.write_marker(DONE_MARKER, step, "last step")


@contextmanager
def _track_metrics(config: Config, run_dir: RunDir | None, console: RunConsole, *, is_new: bool) -> Iterator[None]:
    """Send the metrics of rank 0 to the trackers too."""
    if run_dir is None:
        yield
        return
    with open_trackers(config, run_dir.path, console.say, is_new=is_new) as log:
        run_dir.listeners.append(log)
        yield
