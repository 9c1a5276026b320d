"""Command line of the quickstart: `python -m examples.quickstart`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.quickstart.quickstart import StageError, run_quickstart
from qlora_dist.errors import UserError


def quickstart_main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the quickstart.

    Returns:
        The exit code: 0 after success, 2 after a user error, 1 after any other failure.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart",
        description="Sharded QLoRA of a small model on Python's documentation, in minutes on two cores.",
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("work/quickstart"), help="folder for all files (default: work/quickstart)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes that train (default: 2)")
    parser.add_argument(
        "--recipe", type=Path, default=None, help="training configuration (default: the recipe in configs)"
    )
    options = parser.parse_args(arguments)
    if options.ranks < 1:
        parser.error(f"--ranks: {options.ranks} is less than one")
    try:
        return run_quickstart(options.dir, options.ranks, options.recipe)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except StageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(quickstart_main())
