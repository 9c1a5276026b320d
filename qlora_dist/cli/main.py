"""Commands of `qlora-dist`. Imports are lazy, so that help and user errors appear without importing torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora_dist import __version__
from qlora_dist.cli.command_process import (
    exit_with_user_error,
    gc_disabled,
    prepare_process,
    reject_keys_as_options,
    run_recorded,
)
from qlora_dist.cli.model_commands import model_app
from qlora_dist.errors import UserError

if TYPE_CHECKING:
    from qlora_dist.config.schema import Config
    from qlora_dist.launch.cluster import Cluster

app = typer.Typer(
    name="qlora-dist",
    help="QLoRA over many GPUs and many nodes: the frozen 4-bit base and the adapters sharded separately.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(model_app)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, winning over the file.", metavar="[KEY=VALUE]...")
]
RunsFolder = Annotated[Path, typer.Option("--dir", help="Folder of all runs (run.dir).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _load_run_config(path: Path, overrides: list[str] | None) -> Config:
    """Return the configuration of a run, with the values of the adapter that it begins from."""
    from qlora_dist.config.config_file import load_config
    from qlora_dist.config.lora_from_adapter import fill_lora_from_adapter

    return fill_lora_from_adapter(load_config(path, overrides or ()))


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(help="Check everything that needs no weights, print the configuration and the result, and stop."),
    ] = False,
    resume: Annotated[
        str,
        typer.Option(help="auto: resume from the run's newest complete checkpoint; none; or a checkpoint's folder."),
    ] = "auto",
) -> None:
    """Train an adapter, as a single process or as a rank of torchrun."""
    from qlora_dist.runtime.system import check_platform

    check_platform()  # before importing modules that fail on an unsupported system
    if not dry_run:
        from qlora_dist.runtime.mpi import share_store_address
        from qlora_dist.train.stop_requests import install_signal_handlers
        from qlora_dist.train.tolerant_output import tolerate_output_errors

        tolerate_output_errors()
        install_signal_handlers()  # before torch is imported, which takes a while
        share_store_address()  # before a rank may exit with an error, because MPI would let the others wait for ever
    from qlora_dist.runs.run_action import skip_if_finished
    from qlora_dist.runtime.environment import read_rank_info

    resolved, ranks = _load_run_config(config, overrides), read_rank_info()
    if not dry_run and skip_if_finished(resolved, resume, ranks.rank):  # also before importing torch
        return
    prepare_process()
    if dry_run:
        with gc_disabled():
            from qlora_dist.train.dry_run import dry_run as check_run
        check_run(resolved, resume)
        return
    with gc_disabled():
        from qlora_dist.cli.train_command import train_and_report
    run_recorded(train_and_report, resolved, resume)


@app.command()
def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    on: Annotated[
        Literal["local", "torchrun", "slurm", "mpi"],
        typer.Option(help="One process, torchrun or mpirun here, or a SLURM job."),
    ] = "local",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks per node; without it, one per GPU.")] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="YAML file of the cluster, such as configs/clusters/slurm.yaml.")
    ] = None,
    form: Annotated[
        Literal["srun", "torchrun"] | None, typer.Option(help="Starter of a job's ranks; overrides the cluster's file.")
    ] = None,
    array: Annotated[
        int, typer.Option(min=0, help="Number of jobs in a chain, instead of one job that requeues itself.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the script or command, and stop.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's output until it ends.")] = False,
) -> None:
    """Start a run on this machine, or as a SLURM job that saves before its time limit and resumes."""
    from qlora_dist.runtime.system import check_platform

    check_platform()
    from qlora_dist.launch.launch import LaunchOptions, launch_local, launch_slurm

    resolved = _load_run_config(config, overrides)
    options = LaunchOptions(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        array=array,
        dry_run=dry_run,
        follow=follow,
        config_args=(str(config), *(overrides or ())),
    )
    from rich.console import Console

    if on != "slurm":
        prepare_process()
        launch_local(resolved, on, options, Console(stderr=True))
        return
    cluster_config = _require_cluster(cluster)
    if form is not None:
        cluster_config = cluster_config.model_copy(update={"form": form})
    prepare_process()
    launch_slurm(resolved, cluster_config, options, Console(stderr=dry_run))


def _require_cluster(path: Path | None) -> Cluster:
    if path is None:
        raise UserError("--on slurm needs --cluster, a file such as configs/clusters/slurm.yaml")
    from qlora_dist.launch.cluster import load_cluster

    return load_cluster(path)


@app.command()
def preprocess(
    config: ConfigFile,
    overrides: Overrides = None,
    show: Annotated[
        int, typer.Option(min=0, help="Number of sequences of each source to print, with the trained part marked.")
    ] = 0,
    as_json: AsJson = False,
    force: Annotated[bool, typer.Option("--force", help="Tokenize again even if the cache has the data.")] = False,
) -> None:
    """Tokenize the data into the cache that train reads, and print its statistics."""
    from qlora_dist.config.config_file import load_config

    resolved = load_config(config, overrides or ())
    prepare_process()
    from rich.console import Console

    from qlora_dist.data.preprocess import preprocess_data

    preprocess_data(resolved, Console(), Console(stderr=True), num_samples=show, as_json=as_json, rebuild_cache=force)


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="config.json, a folder with one, a name such as llama-3.1-405b, or a run's YAML file.", metavar="MODEL"
        ),
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs per node.")] = 1,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, such as h100-80gb.")] = "h100-80gb",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    network: Annotated[str, typer.Option(help="Network between nodes, such as ethernet-100g.")] = "infiniband-400g",
    seq_len: Annotated[int | None, typer.Option(min=1, help="Same as data.seq_len=...")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Same as train.micro_batch=...")] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="YAML file of your own GPUs and links, in the format of plan/gpus.yaml.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Print the fastest configuration that fits, as a configuration file.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also run one training step on tensors without memory; takes seconds.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine, or a launcher's nodes, for later plans.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="File of the measured values. Default: in ~/.cache/qlora-dist.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Image file for memory, and tokens/s against nodes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory, traffic and time of a run before a GPU is rented."""
    if measure:
        from rich.console import Console

        from qlora_dist.trace.calibrate import calibrate

        calibrate(calibration, Console(highlight=False))
        return
    if model is None:
        raise UserError(
            "plan: no model; give a config.json, a folder with one, a name such as llama-3.1-8b, or a run's YAML file"
        )
    from qlora_dist.cli.plan_command import run_plan
    from qlora_dist.plan.plan_args import PlanArgs

    run_plan(
        PlanArgs(
            model=model,
            overrides=overrides or [],
            gpus=gpus,
            gpu=gpu,
            nodes=nodes,
            network=network,
            seq_len=seq_len,
            micro_batch=micro_batch,
            hardware=hardware,
            calibration=calibration,
        ),
        search=search,
        plot=plot,
        as_json=as_json,
        with_trace=trace,
    )


@app.command()
def export_ds_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the DeepSpeed JSON that engine zero3 runs with."""
    resolved = _load_run_config(config, overrides)
    prepare_process()
    import json

    from qlora_dist.parallel.ds_config import ds_config
    from qlora_dist.parallel.zero3 import largest_layer_numel
    from qlora_dist.train.run_setup import set_up_model

    _, model, _ = set_up_model(resolved)
    typer.echo(json.dumps(ds_config(resolved, largest_layer_numel(model)), indent=2))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, such as runs/my-run.", metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; without it report.html, for one run in that run's folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and write no file.")] = False,
) -> None:
    """Show a run on one page, or several side by side: loss, throughput, memory, paging, configuration."""
    from qlora_dist.report.write_report import report_json, write_report

    typer.echo(report_json(runs) if as_json else str(write_report(runs, out)))


@app.command()
def bench(
    config: ConfigFile,
    overrides: Overrides = None,
    compare: Annotated[
        str, typer.Option(help="Layouts, from single-paged, fsdp2, two-mesh and zero3.", metavar="NAME,NAME")
    ] = "single-paged,fsdp2,two-mesh,zero3",
    ranks: Annotated[
        str, typer.Option(help="Numbers of ranks of each layout; single-paged always has one.", metavar="N,N")
    ] = "1,2",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each layout, in turns.")] = 3,
    steps: Annotated[
        int,
        typer.Option(min=2, help="Steps of each run after a warm-up step; the last one of the first run is profiled."),
    ] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="One run of each layout with few steps of short rows; takes minutes.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to which the figures are also written.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; without it, a folder in run.dir.")] = None,
    on: Annotated[
        Literal["local", "slurm"], typer.Option(help="This machine, or SLURM jobs, one at a time.")
    ] = "local",
    cluster: Annotated[
        Path | None, typer.Option(help="With --on slurm: YAML file of the cluster, as for launch.")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="With --on slurm: ranks per node; without it, one per GPU.")
    ] = None,
) -> None:
    """Compare layouts in speed, parts of a step, memory, traffic and loading. Their losses must agree."""
    resolved = _load_run_config(config, overrides)
    if on == "local" and (cluster is not None or ranks_per_node is not None):
        raise UserError("bench: --cluster and --ranks-per-node apply to jobs; add --on slurm, or leave them out")
    cluster_config = _require_cluster(cluster) if on == "slurm" else None
    prepare_process()
    import shlex

    from rich.console import Console

    from qlora_dist.bench.bench_job import SlurmPlacement
    from qlora_dist.cli.bench_command import BenchArgs, run_bench

    bench_args = BenchArgs(
        compare=compare,
        ranks=ranks,
        repeats=repeats,
        steps=steps,
        quick=quick,
        json=json_file,
        out=out,
        command=shlex.join(["qlora-dist", *sys.argv[1:]]),
        placement=None if cluster_config is None else SlurmPlacement(cluster_config, ranks_per_node),
    )
    if not run_bench(resolved, bench_args, Console(highlight=False)):
        raise typer.Exit(1)


@app.command()
def jobs(
    folder: RunsFolder = Path("runs"),
    follow: Annotated[str | None, typer.Option(help="Run whose rank 0's output is printed until the run ends.")] = None,
    as_json: AsJson = False,
) -> None:
    """List all runs with state, step, loss, tokens/s and time left."""
    from qlora_dist.launch.run_list import follow_run, print_runs

    if follow is None:
        print_runs(folder, as_json=as_json)
    else:
        follow_run(folder, follow)


@app.command()
def cancel(
    name: Annotated[str, typer.Argument(help="Name of the run.", metavar="NAME")],
    folder: RunsFolder = Path("runs"),
    now: Annotated[bool, typer.Option("--now", help="Kill it without a checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Stop a run with a checkpoint, and wait until it has stopped."""
    from qlora_dist.launch.cancel_run import cancel_run

    cancel_run(folder, name, now=now, as_json=as_json)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--dir", help="Folder of all runs.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the other ranks.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or all nodes and their connections if started by torchrun, srun or mpirun."""
    from qlora_dist.runtime.mpi import share_store_address
    from qlora_dist.runtime.process_exit import die_with_parent

    share_store_address()
    die_with_parent()
    from qlora_dist.doctor.run_doctor import run_doctor

    if not run_doctor(folder, device, timeout, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run a command. A user's error prints one sentence, or a line for each of several, and exits with 2."""
    try:
        reject_keys_as_options(sys.argv[1:])
        app()
    except UserError as error:
        exit_with_user_error(error)
    except Exception as error:
        from qlora_dist.runtime.process_exit import exit_with_traceback

        exit_with_traceback(error)
