"""A training run from its configuration to its adapter."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from qlora_dist.adapters.export import export_adapter
from qlora_dist.config.schema import Config
from qlora_dist.io.read_ahead import Reading
from qlora_dist.model.load_weights import fill
from qlora_dist.model.meta_model import decoder_layers
from qlora_dist.parallel.engine import parallelize
from qlora_dist.parallel.mesh import build_meshes
from qlora_dist.parallel.paged_layers import PagedLayers
from qlora_dist.parallel.static_bytes import check_static_bytes
from qlora_dist.runs.run_action import has_nothing_to_do
from qlora_dist.runs.run_dir import DONE, REQUEUE, STOPPED, RunDir, run_path
from qlora_dist.runs.run_lock import hold
from qlora_dist.runtime.device_memory import free_bytes
from qlora_dist.runtime.environment import ranks_from_environment
from qlora_dist.runtime.heartbeat import beat
from qlora_dist.runtime.machine_info import this_machine
from qlora_dist.runtime.process_group import process_group
from qlora_dist.runtime.watchdog import watchdog
from qlora_dist.train.console import RunConsole
from qlora_dist.train.initial_adapter import read_first_values
from qlora_dist.train.optimizer import make_states
from qlora_dist.train.out_of_memory import answered
from qlora_dist.train.prediction import Expected, check_trained, expect
from qlora_dist.train.rank_consistency import check_ranks_agree, check_shared_run_dir
from qlora_dist.train.run_checkpointer import find_start
from qlora_dist.train.run_setup import Setup, set_up
from qlora_dist.train.stop_requests import BY_HAND, drop_old_stop_file
from qlora_dist.train.summary import Held, announcement, summarize
from qlora_dist.train.tolerant_output import note_lost_output
from qlora_dist.train.trackers import trackers
from qlora_dist.train.trainer import train_loop


def train(config: Config, resume: str = "auto") -> None:
    """Train. Called on every rank, under whatever launcher, or in a single process.

    Args:
        config: of the run.
        resume: `auto`: go on from the run's newest whole checkpoint, if it has one; `none`; or a checkpoint's folder.

    Raises:
        UserError: what the user has to mend; nearly always before any rank waits for another.
    """
    ranks = ranks_from_environment()
    if has_nothing_to_do(config, resume, ranks.rank):
        return
    timeout_s, path = config.train.timeout, run_path(config.run)
    with (
        RunConsole(ranks.rank, lines=ranks.launcher == "mpi") as console,
        # only rank 0 holds the folder: where it goes, the others go
        hold(path, console.say) if ranks.rank == 0 else nullcontext(),
    ):
        if ranks.rank == 0 and (dropped := drop_old_stop_file(path)):
            console.say(dropped)
        setup = set_up(config, ranks, console.console)
        with process_group(ranks, setup.device, timeout_s) as store, watchdog(store, ranks, timeout_s), answered(setup):
            run(setup, console, resume)
        if ranks.rank == 0 and (path / DONE).exists():
            if config.run.report:
                _report(path, console)
            adapter = shlex.quote(str(path / "adapter"))
            console.say(f"try it: qlora-dist generate 'Your question' --adapter {adapter}")


def run(setup: Setup, console: RunConsole, resume: str = "auto") -> None:
    """The whole way through, on every rank of the process group."""
    started = time.perf_counter()
    config, model = setup.config, setup.model
    check_ranks_agree(config, setup.ranks, setup.device, setup.data_sha256)
    check_shared_run_dir(config, setup.ranks)
    start = find_start(setup, resume, console)
    run_dir = None
    if setup.ranks.rank == 0:
        machine = this_machine(setup.device.type)
        run_dir = RunDir(config, start.manifest is None, start.replaces, setup.steps, machine)
        note_lost_output(run_dir.path)
    expected = expect(setup)
    if isinstance(expected, Expected):
        check_trained(expected.run, model)
    for line in announcement(setup):
        console.say(line)
    console.say(expected if isinstance(expected, str) else expected.sentence())

    torch.manual_seed(config.train.seed + setup.ranks.rank + start.step)  # dropout: every rank its own
    offload = config.parallel.offload == "base"
    meshes = build_meshes(setup.sizes, setup.device.type, separate=offload)
    traffic = parallelize(model, meshes, config)
    # room for what does not stay on the device is reserved before the weights are read
    moments = make_states(model, setup)

    def loaded(reading: Reading) -> None:
        beat(phase="loading")
        console.loaded(reading)

    pages = _page_base(setup, console)
    console.start_loading()
    began = time.perf_counter()
    read_bytes = fill(
        model, setup.folder, setup.device, config.train.seed, meshes.base_replicas, offload, loaded, pages
    )
    if setup.first_values and start.manifest is None:
        read_first_values(model, setup.first_values)
    load_s = time.perf_counter() - began
    in_pages = (pages.held_bytes, pages.budget) if pages is not None else (0, 0)
    static_bytes = check_static_bytes(model, setup.sizes, *in_pages)
    console.say_loaded(static_bytes)

    with (
        closing(moments),
        closing(pages) if pages is not None else nullcontext(),
        closing(run_dir) if run_dir is not None else nullcontext(),
        _tracking(config, run_dir, start.manifest is None, console),
    ):
        history = train_loop(model, moments, setup, start, traffic, console, run_dir, pages, started)
    step = history.progress.step
    if history.stop is not None:
        marker = STOPPED if history.stop in BY_HAND else REQUEUE
        console.say(f"stopped by {history.stop} after {step} steps; the same command goes on from there ({marker})")
        if run_dir is not None:
            run_dir.mark(marker, step, history.stop)
        return
    beat(step, "saving the adapter")
    export_adapter(model, setup.adapter, run_path(config.run) / "adapter", setup.served.save)
    held = Held(static_bytes, moments.resident_bytes, read_bytes, load_s)
    summarize(setup, history, held, expected, console, run_dir)
    if run_dir is not None:
        run_dir.mark(DONE, step, "last step")


@contextmanager
def _tracking(config: Config, run_dir: RunDir | None, fresh: bool, console: RunConsole) -> Iterator[None]:
    """On rank 0, what goes into metrics.jsonl goes to trackers too."""
    if run_dir is None:
        yield
        return
    with trackers(config, run_dir.path, fresh, console.say) as log:
        run_dir.listeners.append(log)
        yield


def _report(path: Path, console: RunConsole) -> None:
    """Whatever becomes of it, the run is done."""
    try:
        from qlora_dist.report.write_report import report

        console.say(f"report: {report([path])}")
    except Exception as error:
        console.say(f"no report: {type(error).__name__}: {error}; try qlora-dist report {path}")


def _page_base(setup: Setup, console: RunConsole) -> PagedLayers | None:
    """Take the room for the decoder layers, on the device and behind it, before any weight is read."""
    parallel = setup.config.parallel
    if parallel.base != "paged":
        return None
    free = free_bytes(setup.device, setup.ranks.local_world_size)
    layers: list[FSDPModule] = []
    for layer in decoder_layers(setup.model):
        assert isinstance(layer, FSDPModule), "only the fsdp2 engine pages the base"
        layers.append(layer)
    pages = PagedLayers(setup.model, layers, setup.device, parallel.resident_bytes, free, setup.config.paging)
    console.say(pages.sentence())
    return pages
