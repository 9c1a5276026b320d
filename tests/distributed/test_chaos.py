"""If this fails, killed jobs end with another model than undisturbed ones. benchmarks/chaos.py has a longer test."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers import tiny_models
from tests.helpers.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_phase_ends_as_an_undisturbed_one(tmp_path: Path, tiny_llama_nf4: Path) -> None:
    data = tiny_models.make_data(tmp_path / "data.jsonl", 60)
    where = ["--base", tiny_llama_nf4, "--data", data, "--out", tmp_path / "runs", "--json", tmp_path / "result.json"]
    length = ["--kills", "5", "--steps", "12", "--seed", "3"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with warm_python(tmp_path) as python:
        command = [python, "benchmarks/chaos.py", *map(str, where), *length]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert {kill["phase"] for kill in result["kills"]} == {"forward", "backward", "update", "write", "complete"}
    assert result["equal_losses"] and result["equal_adapters"]
