"""If this fails, a run ends because its terminal was closed, or because the disk of its log file is full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
from rich.console import Console
from qlora_dist.train.tolerant_output import record_lost_output, tolerate_output_errors
print("before", end="")
tolerate_output_errors()
console = Console()
for _ in range(3):
    console.print("a line")
    print("a line", file=sys.stderr)
record_lost_output(Path(sys.argv[1]))
console.print("another")
print("the end", flush=True)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_process_succeeds_without_its_output_and_records_the_loss(tmp_path: Path) -> None:
    """Use a fresh interpreter, because flushing at exit must not fail, either."""
    (tmp_path / "output-lost.txt").write_text("of an earlier start\n")
    reading, closed = os.pipe()
    os.close(reading)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full, os.fdopen(closed, "w") as pipe:
        program = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        assert subprocess.run(program, env=environ, stdout=full, stderr=pipe, check=False).returncode == 0
    first, second = (tmp_path / "output-lost.txt").read_text().splitlines()
    assert first.endswith(": stdout cannot be written (No space left on device); the run continues without it")
    assert second.endswith(": stderr cannot be written (Broken pipe); the run continues without it")


def test_readable_output_is_complete_and_in_order(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    program = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(program, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    assert done.stdout.decode() == "before" + 6 * "a line\n" + "another\nthe end\n"
    assert not list(tmp_path.iterdir())
