"""A virtual environment for each file of requirements, cached under the file's digest."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlora-dist" / "peers"


def python_of(requirements: str, cache: Path = CACHE) -> Path:
    """Return the Python of an environment with a requirements file installed; the first call takes minutes.

    Args:
        requirements: name of a file in this folder without .txt.
        cache: folder of the environments.

    Raises:
        RuntimeError: pip failed; the message has the end of its output.
    """
    file = HERE / f"{requirements}.txt"
    digest = hashlib.sha256(file.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache / f"{requirements}-{digest}"
    python = folder / "bin" / "python"
    if (folder / "complete").is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted installation
    _run([sys.executable, "-m", "venv", str(folder)])
    # DeepSpeed compiles its kernels at first use, if at all
    _run([str(python), "-m", "pip", "install", "--quiet", "-r", str(file)], DS_BUILD_OPS="0")
    (folder / "complete").touch()
    return python


def _run(command: list[str], **variables: str) -> None:
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(run.stderr or run.stdout)[-2000:]}")
