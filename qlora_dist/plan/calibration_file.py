"""The file of speeds that `qlora-dist plan --calibrate` has measured, by kind of device."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, ValidationError

from qlora_dist.config.sections import ConfigSection
from qlora_dist.errors import UserError
from qlora_dist.plan.hardware import Positive
from qlora_dist.plan.step_time import RankSpeeds
from qlora_dist.runtime.system import user_cache_dir


class MeasuredSpeeds(ConfigSection):
    """Speeds per second of one kind of device, and of the links between its ranks at the time of measuring."""

    device: str
    """Name that the driver reports."""
    torch: str
    flops: Positive
    dequantized_bytes: Positive
    streamed_bytes: Positive
    host_bytes: Positive
    inside_bytes: Positive | None = None
    """Bytes that a rank received from the other ranks of its node; None if the node had one rank."""
    between_bytes: Positive | None = None
    """Bytes that all ranks of a node together received from other nodes; None if there was one node."""


class Calibration(ConfigSection):
    """Content of a calibration file."""

    devices: dict[str, MeasuredSpeeds] = Field(default_factory=dict)


def default_calibration_path() -> Path:
    return user_cache_dir() / "calibration.json"


def load_calibration(path: Path | None = None) -> Calibration:
    """Return the measured speeds, which are empty if `plan --calibrate` has not run yet.

    Raises:
        UserError: `path` does not exist, or the file holds no calibration. The user's file may be missing.
    """
    try:
        calibration_path = path or default_calibration_path()
    except UserError:  # a user without a home
        return Calibration()
    try:
        return Calibration.model_validate(json.loads(calibration_path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if path is None:
            return Calibration()
        raise UserError(f"{path}: no such file; make it with `qlora-dist plan --calibrate`") from None
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{calibration_path}: holds no calibration ({reason}); make it anew with `plan --calibrate`"
        ) from None


def save_calibration(gpu_name: str, measured: MeasuredSpeeds, path: Path | None = None) -> Path:
    """Write the speeds of a kind of device into the file, in place of its earlier ones, and return the file."""
    target_path = path or default_calibration_path()
    known = load_calibration(target_path) if target_path.exists() else Calibration()
    target_path.parent.mkdir(parents=True, exist_ok=True)
    updated = Calibration(devices=known.devices | {gpu_name: measured})
    partial = target_path.with_suffix(".part")
    partial.write_text(updated.model_dump_json(indent=2))
    partial.replace(target_path)
    return target_path


def calibrated_speeds(measured: MeasuredSpeeds, assumed: RankSpeeds | None = None) -> RankSpeeds:
    """Return a rank's measured speeds, and the links of `assumed` (None: 0 bytes per second) if none was measured."""
    return RankSpeeds(
        flops_per_s=measured.flops,
        dequantize_bytes_per_s=measured.dequantized_bytes,
        elementwise_bytes_per_s=measured.streamed_bytes,
        host_bytes_per_s=measured.host_bytes,
        intra_node_bytes_per_s=measured.inside_bytes or (assumed.intra_node_bytes_per_s if assumed else 0),
        inter_node_bytes_per_s=measured.between_bytes or (assumed.inter_node_bytes_per_s if assumed else 0),
    )
