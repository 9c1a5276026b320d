"""If this fails, a run starts with a library that is too old, or a good installation is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_dist.compat.versions import _parse_release, check_versions

ROOT = Path(__file__).resolve().parents[2]


def test_this_installation_is_accepted():
    check_versions()


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("2.13.0", (2, 13)),
        ("2.13.0+cpu", (2, 13)),
        ("2.14.0a0+git1f2e3d", (2, 14)),
        ("2.9rc10", (2, 9)),
        ("5.0.0rc1", (5, 0)),
        ("5", (5,)),
        ("0.50.2.dev0", (0, 50)),
    ],
)
def test_release(version, release):
    assert _parse_release(version) == release


def fake_installation(folder: Path, **versions: str) -> None:
    """Write metadata of other versions, which Python finds before the metadata of the real packages."""
    for package, version in versions.items():
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"torch": "2.12.1+cu130"}, "torch 2.12.1+cu130 is too old, 2.13 is needed; pip install 'torch>=2.13'"),
        ({"transformers": "4.57.3"}, "transformers 4.57.3 is too old, 5.0 is needed"),
        ({"peft": "0.9.0"}, "peft 0.9.0 is too old, 0.21 is needed"),
        ({"bitsandbytes": "0.49.2"}, "bitsandbytes 0.49.2 is too old, 0.50 is needed"),
    ],
)
def test_an_old_library_is_refused_by_the_command_line(tmp_path, versions, message):
    fake_installation(tmp_path, **versions)
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "qlora_dist", "quantize", "source", "out"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
