"""The verbs: one function call each. Imports are lazy, so that help and mistakes come without torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora_dist import __version__
from qlora_dist.cli.command_process import gc_disabled, prepare_process, reject_keys_as_options, run_recorded
from qlora_dist.cli.model_commands import model_app
from qlora_dist.errors import UserError

if TYPE_CHECKING:
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
    list[str] | None,
    typer.Argument(help="section.key=value, winning over the file.", metavar="[KEY=VALUE]..."),
]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Check all that can be checked without weights, print the configuration and a verdict, and stop."
        ),
    ] = False,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the run's newest whole checkpoint; none; or a checkpoint's folder.")
    ] = "auto",
) -> None:
    """Train an adapter: alone, or on every rank that torchrun starts this on."""
    from qlora_dist.config.config_file import load_config
    from qlora_dist.config.lora_from_adapter import fill_lora_from_adapter
    from qlora_dist.runtime.system import check_platform

    check_platform()  # before modules are imported that the system lacks
    if not dry_run:
        from qlora_dist.runtime.mpi import share_store_address
        from qlora_dist.train.stop_requests import install_signal_handlers
        from qlora_dist.train.tolerant_output import tolerate_output_errors

        tolerate_output_errors()
        install_signal_handlers()  # before torch is imported, which takes a while
        share_store_address()  # before a rank may have ended with a mistake: MPI would let the others wait for ever
    from qlora_dist.runs.run_action import skip_if_finished
    from qlora_dist.runtime.environment import read_rank_info

    resolved, ranks = fill_lora_from_adapter(load_config(config, overrides or ())), read_rank_info()
    if not dry_run and skip_if_finished(resolved, resume, ranks.rank):  # before torch, too
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
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each; without it, as many as a node has GPUs.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="YAML file of the cluster, such as configs/clusters/slurm.yaml.")
    ] = None,
    form: Annotated[
        Literal["srun", "torchrun"] | None, typer.Option(help="Who starts a job's ranks, winning over the cluster's.")
    ] = None,
    array: Annotated[
        int, typer.Option(min=0, help="A chain of so many jobs in place of one that requeues itself.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the script or command, and stop.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print what the job writes, until it is over.")] = False,
) -> None:
    """Start a run: here, or as a job that saves before its time is up, and goes on."""
    from qlora_dist.runtime.system import check_platform

    check_platform()
    from qlora_dist.config.config_file import load_config
    from qlora_dist.config.lora_from_adapter import fill_lora_from_adapter
    from qlora_dist.launch.launch import LaunchOptions, launch_local, launch_slurm

    resolved = fill_lora_from_adapter(load_config(config, overrides or ()))
    options = LaunchOptions(nodes, ranks_per_node, array, dry_run, follow, (str(config), *(overrides or ())))
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
        int, typer.Option(min=0, help="Print so many sequences of each source, the trained part marked.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Tokenize anew what is in the cache.")] = False,
) -> None:
    """Tokenize the data into the cache that train reads, and say what is in it."""
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
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each node.")] = 1,
    gpu: Annotated[str, typer.Option(help="Their kind, such as h100-80gb.")] = "h100-80gb",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    network: Annotated[str, typer.Option(help="Between nodes, such as ethernet-100g.")] = "infiniband-400g",
    seq_len: Annotated[int | None, typer.Option(min=1, help="As data.seq_len=...")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="As train.micro_batch=...")] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="YAML file of GPUs and links of your own, shaped as plan/gpus.yaml.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Print the fastest configuration that fits, as a configuration file.")
    ] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Also run a step of the code itself, on tensors without memory. Some seconds."),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure this machine, or all nodes under a launcher, for plans to come."),
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="File of what was measured. Default: in ~/.cache/qlora-dist.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw memory, and tokens/s against nodes, to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a run needs, moves and takes, before a GPU is rented."""
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
        search,
        plot,
        as_json,
        trace,
    )


_RUNS_DIR_OPTION = typer.Option("--dir", help="Folder of all runs (run.dir).")


@app.command()
def export_ds_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the DeepSpeed JSON that engine zero3 runs with."""
    from qlora_dist.config.config_file import load_config
    from qlora_dist.config.lora_from_adapter import fill_lora_from_adapter

    resolved = fill_lora_from_adapter(load_config(config, overrides or ()))
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
        Path | None, typer.Option(help="HTML file; without it report.html, of one run in its own folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and write nothing.")] = False,
) -> None:
    """Show a run on one page, or several side by side: loss, throughput, memory, paging, configuration."""
    from qlora_dist.report.write_report import report_json, write_report

    typer.echo(report_json(runs) if as_json else str(write_report(runs, out)))


@app.command()
def bench(
    config: ConfigFile,
    overrides: Overrides = None,
    compare: Annotated[
        str, typer.Option(help="Layouts: of single-paged, fsdp2, two-mesh, zero3.", metavar="NAME,NAME")
    ] = "single-paged,fsdp2,two-mesh,zero3",
    ranks: Annotated[
        str, typer.Option(help="Numbers of ranks of each; single-paged is on one.", metavar="N,N")
    ] = "1,2",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each layout, in turns.")] = 3,
    steps: Annotated[
        int, typer.Option(min=2, help="Of each run after the first one; the last of a layout's first run is profiled.")
    ] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="One run of each, with few steps of short rows: some minutes.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of what is written; without it, one in run.dir.")] = None,
    on: Annotated[
        Literal["local", "slurm"], typer.Option(help="This machine, or SLURM jobs, one at a time.")
    ] = "local",
    cluster: Annotated[
        Path | None, typer.Option(help="With --on slurm: YAML file of the cluster, as for launch.")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="With --on slurm; without it, as many as a node has GPUs.")
    ] = None,
) -> None:
    """Compare layouts: speed, a step's parts, memory, traffic, loading; the losses must agree."""
    from qlora_dist.config.config_file import load_config
    from qlora_dist.config.lora_from_adapter import fill_lora_from_adapter

    resolved = fill_lora_from_adapter(load_config(config, overrides or ()))
    if on == "local" and (cluster is not None or ranks_per_node is not None):
        raise UserError("bench: --cluster and --ranks-per-node are of jobs; add --on slurm, or leave them out")
    cluster_config = _require_cluster(cluster) if on == "slurm" else None
    prepare_process()
    import shlex

    from rich.console import Console

    from qlora_dist.bench.slurm_bench_job import SlurmPlacement
    from qlora_dist.cli.bench_command import BenchArgs
    from qlora_dist.cli.bench_command import run_bench as compare_layouts

    command = shlex.join(["qlora-dist", *sys.argv[1:]])
    placement = None if cluster_config is None else SlurmPlacement(cluster_config, ranks_per_node)
    bench_args = BenchArgs(compare, ranks, repeats, steps, quick, json_file, out, command, placement)
    if not compare_layouts(resolved, bench_args, Console(highlight=False)):
        raise typer.Exit(1)


@app.command()
def jobs(
    folder: Annotated[Path, _RUNS_DIR_OPTION] = Path("runs"),
    follow: Annotated[str | None, typer.Option(help="Print what this run's rank 0 prints, until it ends.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List runs, those that are done included: state, step, loss, tokens/s, time left."""
    from qlora_dist.launch import run_list

    if follow is None:
        run_list.print_runs(folder, as_json)
    else:
        run_list.follow_run(folder, follow)


@app.command()
def cancel(
    name: Annotated[str, typer.Argument(help="Of the run.", metavar="NAME")],
    folder: Annotated[Path, _RUNS_DIR_OPTION] = Path("runs"),
    now: Annotated[bool, typer.Option("--now", help="Without a checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Stop a run, with a checkpoint, and wait until it has stopped."""
    from qlora_dist.launch.cancel_run import cancel_run

    cancel_run(folder, name, now, as_json)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--dir", help="Where runs go.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the other ranks.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check this machine; on the ranks that torchrun, srun or mpirun starts, all nodes and what lies between them."""
    from qlora_dist.runtime.mpi import share_store_address
    from qlora_dist.runtime.orphans import die_with_parent

    share_store_address()
    die_with_parent()
    from qlora_dist.doctor.run_doctor import run_doctor as examine

    if not examine(folder, device, timeout, as_json):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run a verb; a user's mistake is one sentence, or a line for each, and exit code 2."""
    try:
        reject_keys_as_options(sys.argv[1:])
        app()
    except UserError as error:
        from qlora_dist.launch.agent import USER_ERROR_EXIT_CODE, write_torchrun_error_file
        from qlora_dist.runtime.process_exit import exit_process
        from qlora_dist.runtime.user_error_file import write_user_error_file

        write_user_error_file(error)
        write_torchrun_error_file(error)
        _print_user_error(error)
        exit_process(USER_ERROR_EXIT_CODE)
    except Exception as error:
        from qlora_dist.runtime.process_exit import exit_with_traceback

        exit_with_traceback(error)


def _print_user_error(error: UserError) -> None:
    """Nearly every mistake is found by all ranks, and rank 0 tells it; else the one that finds it."""
    from qlora_dist.runtime.environment import read_rank_info
    from qlora_dist.runtime.process_exit import wait_for_rank_0_report

    try:
        ranks = read_rank_info()
    except UserError:
        typer.echo(f"qlora-dist: {error}", err=True)
        return
    is_only_reporter = error.local_only or (ranks.rank != 0 and wait_for_rank_0_report(ranks))
    if ranks.rank == 0 or is_only_reporter:
        typer.echo(f"qlora-dist: {f'[rank {ranks.rank}] ' if is_only_reporter else ''}{error}", err=True)
