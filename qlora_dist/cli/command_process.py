"""Start and end of a command's process. torch is imported only when it is needed."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from qlora_dist.errors import UserError


def run_on_every_rank(function: Callable[[], None]) -> None:
    """Run a command that computes on all ranks, as `train` does."""
    from qlora_dist.runtime.mpi import share_store_address

    share_store_address()  # before a rank may exit with an error, because MPI would let the others wait for ever
    prepare_process()
    run_recorded(function)


def run_recorded(function: Callable[..., None], *args: Any) -> None:
    """Run a function, and report its exception to torchrun unless it is a user's error. torchrun shows one."""
    from torch.distributed.elastic.multiprocessing.errors import record

    user_error = record(_catch_user_error)(function, *args)
    if user_error is not None:
        raise user_error


def _catch_user_error(function: Callable[..., None], *args: Any) -> UserError | None:
    try:
        function(*args)
    except UserError as error:
        return error
    return None


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Import without the garbage collector, which takes a tenth less time.

    Imports create a million lasting objects, which the collector would examine again and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def prepare_process() -> None:
    """Tie this process's life to its launcher's, and check the system and the libraries' versions."""
    from qlora_dist.compat.versions import check_versions
    from qlora_dist.runtime.process_exit import die_with_parent
    from qlora_dist.runtime.system import check_platform

    check_platform()
    die_with_parent()
    check_versions()


def reject_keys_as_options(argv: list[str]) -> None:
    """Refuse a configuration key written as an option, such as `--lora.r=16`. No option has a dot in its name."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        key = re.fullmatch(r"--([a-z]\w*\.[\w.]+)(=.*)?", argument, re.DOTALL)
        if key is not None:
            value = key[2] or f"={following or 'VALUE'}"
            raise UserError(f"{argument}: keys of the configuration have no dashes; write {key[1]}{value}")


def exit_with_user_error(error: UserError) -> None:
    """Report a user's error to the launcher and the user, and end this process."""
    from qlora_dist.launch.agent import USER_ERROR_EXIT_CODE, write_torchrun_error_file
    from qlora_dist.runtime.process_exit import exit_process, write_user_error_file

    write_user_error_file(error)
    write_torchrun_error_file(error)
    _print_user_error(error)
    exit_process(USER_ERROR_EXIT_CODE)


def _print_user_error(error: UserError) -> None:
    """Print a user's error on rank 0, which detects nearly all of them, or else on the rank that detected it."""
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
