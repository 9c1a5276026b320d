"""If this fails, plans ignore a user's calibration, or a collective is not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qlora_dist.errors import UserError
from qlora_dist.plan.calibration_file import MeasuredSpeeds, load_calibration, save_calibration
from qlora_dist.plan.plan_args import PlanArgs, plan_from_args
from qlora_dist.trace.calibrate import calibrate
from tests.helpers.ranks import run_ranks


@pytest.mark.slow
def test_two_nodes_are_measured_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "calibration.json"
    run_ranks(4, calibrate, path, Console(quiet=True), nodes=2)
    (measured,) = load_calibration(path).devices.values()
    for name, value in measured.model_dump(exclude={"device", "torch"}).items():
        assert 1e5 < value < 1e15, name


def test_plans_use_measured_speeds(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    args = PlanArgs(
        model="llama-3.1-8b", overrides=[], gpus=8, gpu="h100-80gb", nodes=2, network="ethernet-100g", calibration=path
    )
    slow = MeasuredSpeeds(
        device="H100", torch="2.13", flops=1e12, dequantized_bytes=1e12, streamed_bytes=1e12, host_bytes=1e10
    )
    save_calibration("a100-80gb", slow, path)
    before = plan_from_args(args)
    assert not before.is_calibrated
    save_calibration("h100-80gb", slow, path)
    after = plan_from_args(args)
    assert after.is_calibrated
    assert after.as_json()["uncertainty"] is None
    assert after.time.busy_s["matrix products"] == pytest.approx(after.time.flops / 1e12)
    links = "communication inside a node"
    assert after.time.busy_s[links] == before.time.busy_s[links]  # the assumed speed, where nothing was measured
    assert set(load_calibration(path).devices) == {"a100-80gb", "h100-80gb"}
    path.write_text(json.dumps({"devices": {"h100-80gb": {"flops": "fast"}}}))
    with pytest.raises(UserError, match="make it anew"):
        plan_from_args(args)
    with pytest.raises(UserError, match="no such file"):
        plan_from_args(replace(args, calibration=tmp_path / "nowhere.json"))
