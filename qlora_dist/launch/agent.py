"""torchrun that prints a user's error last: `python -m qlora_dist.launch.agent` with torchrun's own options.

After a rank has failed, torchrun prints a long report below the rank's message. So a rank also writes the message to
the file that torchrun names. This command prints it again at the end, and exits with the code of a user's error.
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
"""Exit code of a process after a user's error."""


def write_torchrun_error_file(error: UserError, environ: Mapping[str, str] = os.environ) -> None:
    """Write the message to the file from which torchrun's report takes the reason of a rank's failure."""
    if (path := torchrun_error_file(environ)) is not None:
        # the format of torch's `record` decorator; torch logs complaints about a shorter one
        extra = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        with suppress(OSError):
            path.write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}), encoding="utf-8")


def run_agent(argv: list[str] | None = None) -> int:
    """Run torchrun's agent, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(argv)
    try:
        if options.local_addr is None and options.standalone:
            argv = ["--local-addr", "127.0.0.1", *argv]  # otherwise the ranks resolve this machine's name
        elif not options.standalone:
            check_rendezvous_host(_rendezvous_host(options))
        run.main(argv)
    except UserError as error:
        return _report_user_error(str(error))
    except ChildFailedError as error:
        messages = [message for failure in error.failures.values() if (message := _user_error_message(failure))]
        if not messages:
            raise
        return _report_user_error(messages[0])
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _rendezvous_host(options: Any) -> str:
    endpoint = str(options.rdzv_endpoint or options.master_addr)
    host, colon, port = endpoint.rpartition(":")
    return (host if colon and port.isdigit() else endpoint).strip("[]")


def _user_error_message(failure: ProcessFailure) -> str | None:
    """Return the message that a rank has written; None if it failed in another way."""
    # torch annotates the report as a str, but it is a dict if a rank has reported an exception
    report: Any = failure.message
    if failure.exitcode != USER_ERROR_EXIT_CODE or not isinstance(report, dict):
        return None
    message = report.get("message")
    return message if message == report.get("extraInfo", {}).get("py_callstack") else None


def _report_user_error(message: str) -> int:
    sys.stdout.flush()
    print(f"qlora-dist: {message}", file=sys.stderr, flush=True)
    return USER_ERROR_EXIT_CODE


if __name__ == "__main__":
    sys.exit(run_agent())
