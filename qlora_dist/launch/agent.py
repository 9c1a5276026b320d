"""torchrun, with a user's mistake said last: `python -m qlora_dist.launch.agent`, and torchrun's own options.

torchrun ends with a report of its own after a rank has failed, a screen after the sentence. A rank leaves the sentence
in the file that torchrun names for it, and here it is said once more, at the end, with the exit code of a mistake.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qlora_dist.errors import UserError
from qlora_dist.runtime.environment import torchrun_error_file
from qlora_dist.runtime.network import check_rendezvous_host

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USER_ERROR_EXIT_CODE = 2
"""With which a process ends after a mistake of the user's."""


def write_torchrun_error_file(error: UserError, environ: Mapping[str, str] = os.environ) -> None:
    """Write the sentence where torchrun looks for the reason of a rank's end, so that its report shows it."""
    if (path := torchrun_error_file(environ)) is not None:
        # the form in which torch's own `record` writes an exception; with less, torch logs complaints
        more = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        with suppress(OSError):
            path.write_text(json.dumps({"message": {"message": str(error), "extraInfo": more}}), encoding="utf-8")


def run_agent(argv: list[str] | None = None) -> int:
    """Run torchrun's agent and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(argv)
    try:
        if options.local_addr is None and options.standalone:
            argv = ["--local-addr", "127.0.0.1", *argv]  # else the ranks ask for this machine by its name
        elif not options.standalone:
            check_rendezvous_host(_rendezvous_host(options))
        run.main(argv)
    except UserError as error:
        return _report_user_error(str(error))
    except ChildFailedError as error:
        sentences = [sentence for failure in error.failures.values() if (sentence := _user_error_message(failure))]
        if not sentences:
            raise
        return _report_user_error(sentences[0])
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _rendezvous_host(options: Any) -> str:
    """Name the machine where torchrun's options have the nodes meet."""
    endpoint = str(options.rdzv_endpoint or options.master_addr)
    host, colon, port = endpoint.rpartition(":")
    return (host if colon and port.isdigit() else endpoint).strip("[]")


def _user_error_message(failure: ProcessFailure) -> str | None:
    """Return the sentence that a rank has left; None: it has ended in another way."""
    # torch annotates the message as a str; it is a dict where a rank has left a report of an exception
    message: Any = failure.message
    if failure.exitcode != USER_ERROR_EXIT_CODE or not isinstance(message, dict):
        return None
    sentence = message.get("message")
    return sentence if sentence == message.get("extraInfo", {}).get("py_callstack") else None


def _report_user_error(sentence: str) -> int:
    sys.stdout.flush()
    print(f"qlora-dist: {sentence}", file=sys.stderr, flush=True)
    return USER_ERROR_EXIT_CODE


if __name__ == "__main__":
    sys.exit(run_agent())
