"""If this fails, who starts a run on Windows gets a traceback about a signal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WINDOWS = """
import signal, sys
import qlora_dist.cli
del signal.SIGUSR1, signal.SIGUSR2
sys.modules["resource"] = None
sys.platform = "win32"
sys.argv = ["qlora-dist", *sys.argv[1:]]
qlora_dist.cli.main()
"""


def test_windows_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("{model: {base: model}, data: {train: [data.jsonl]}}")
    for words in (["train", "my.yaml", "--dry-run"], ["launch", "my.yaml"]):
        command = [sys.executable, "-c", WINDOWS, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.stderr.startswith("qlora-dist: qlora-dist trains on Linux, "), done.stderr
        assert done.stderr.count("\n") == 1
        assert done.returncode == 2
