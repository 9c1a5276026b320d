"""The verbs: one function call each. Imports are lazy, so that help and mistakes come without torch."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_dist import __version__
from qlora_dist.errors import UserError

app = typer.Typer(
    name="qlora-dist",
    help="QLoRA over many GPUs and many nodes: the frozen 4-bit base and the adapters sharded separately.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, winning over the file.", metavar="[KEY=VALUE]..."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check all that can be checked without weights, and stop.")] = False,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the run's newest whole checkpoint; none; or a checkpoint's folder.")
    ] = "auto",
) -> None:
    """Train an adapter: alone, or on every rank that torchrun starts this on."""
    from qlora_dist.config_file import dump_config, load_config
    from qlora_dist.train.stop import listen

    resolved = load_config(config, overrides or ())
    if not dry_run:
        listen()  # before torch is imported, which takes a while
    _prepare_process()
    if dry_run:
        from qlora_dist.launch.environment import ranks_from_environment
        from qlora_dist.train.run_dir import check_run_dir
        from qlora_dist.train.setup import set_up

        ranks = ranks_from_environment()
        check_run_dir(resolved, resume)
        set_up(resolved, ranks)
        if ranks.rank == 0:
            typer.echo(dump_config(resolved), nl=False)
        return
    with _importing():
        from torch.distributed.elastic.multiprocessing.errors import record

        from qlora_dist.train.run import train as run_training

    # `record` hands an exception to torchrun, which shows that of the rank that failed first; a user's mistake is not
    # for it
    mistake = record(_mistake_of)(run_training, resolved, resume)
    if mistake is not None:
        raise mistake


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face model in 16 or 32 bit.", metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="Folder to make.", metavar="OUT")],
    quant_type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights per absmax.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the absmax values too.")] = True,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Quantize the input embedding and the output head too.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    file_size: Annotated[str, typer.Option(help="Largest size of a file, such as 5GB.")] = "5GB",
    min_share: Annotated[
        float, typer.Option(help="Fail if less than this part of the layers' parameters would be in 4 bit.")
    ] = 0.9,
) -> None:
    """Quantize a model to 4 bit, in bitsandbytes' own format; an interrupted run goes on where it stopped."""
    _prepare_process()
    from rich.console import Console

    from qlora_dist.model.quantize_folder import print_report, quantize_folder
    from qlora_dist.model.quantize_plan import make_options

    console = Console()
    options = make_options(quant_type, block_size, double_quant, device, file_size, min_share, embeddings)
    print_report(quantize_folder(source, out, options, console), console)


@app.command()
def preprocess(
    config: Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, winning over the file.", metavar="[KEY=VALUE]..."),
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print so many sequences of each source, the trained part marked.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Tokenize anew what is in the cache.")] = False,
) -> None:
    """Tokenize the data into the cache that train reads, and say what is in it."""
    from qlora_dist.config_file import load_config

    resolved = load_config(config, overrides or ())
    _prepare_process()
    from rich.console import Console

    from qlora_dist.data.report import preprocess

    preprocess(resolved, Console(), Console(stderr=True), show=show, as_json=as_json, force=force)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _mistake_of(function: Callable[..., None], *args: Any) -> UserError | None:
    try:
        function(*args)
    except UserError as error:
        return error
    return None


@contextmanager
def _importing() -> Iterator[None]:
    """Imports make a million objects that stay; without the collector, which looks through them again and again, they
    take a tenth less time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _prepare_process() -> None:
    from qlora_dist.launch.orphans import die_with_parent
    from qlora_dist.versions import check_versions

    die_with_parent()
    check_versions()


def main() -> None:
    """Run a verb; a user's mistake is one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        _report(error)
        sys.exit(2)


def _report(error: UserError) -> None:
    """Nearly every mistake is found by all ranks, and rank 0 tells it; else the one that finds it."""
    from qlora_dist.launch.environment import ranks_from_environment

    try:
        rank = ranks_from_environment().rank
    except UserError:
        rank = 0
    if rank == 0 or error.one_rank:
        typer.echo(f"qlora-dist: {f'[rank {rank}] ' if error.one_rank else ''}{error}", err=True)
