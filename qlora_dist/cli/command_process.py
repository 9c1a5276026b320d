"""What a verb's process does before and around its work. No torch until it is needed."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qlora_dist.errors import UserError


def run_on_every_rank(function: Callable[[], None]) -> None:
    """Run a verb that computes on all ranks, as `train` does."""
    from qlora_dist.runtime.mpi import share_store_address

    share_store_address()  # before a rank may have ended with a mistake: MPI would let the others wait for ever
    prepare_process()
    run_recorded(function)


def run_recorded(function: Callable[..., None], *args: Any) -> None:
    """Hand an exception to torchrun, which shows that of the rank that failed first; a user's mistake is not for it."""
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
    """Imports make a million objects that stay; without the collector, which looks through them again and again, they
    take a tenth less time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def prepare_process() -> None:
    """See to it that this process does not outlive its launcher, and that the libraries are new enough.

    Raises:
        UserError: they are not.
    """
    from qlora_dist.compat.versions import check_versions
    from qlora_dist.runtime.orphans import die_with_parent
    from qlora_dist.runtime.system import check_platform

    check_platform()
    die_with_parent()
    check_versions()


def reject_keys_as_options(argv: list[str]) -> None:
    """Refuse `--lora.r=16`, with the way to write it: no option has a dot in its name.

    Raises:
        UserError: a key of the configuration is written as an option.
    """
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        key = re.fullmatch(r"--([a-z]\w*\.[\w.]+)(=.*)?", word, re.DOTALL)
        if key is not None:
            value = key[2] or f"={following or 'VALUE'}"
            raise UserError(f"{word}: keys of the configuration have no dashes; write {key[1]}{value}")
