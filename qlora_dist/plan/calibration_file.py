"""What `qlora-dist plan --calibrate` has measured, by kind of device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pydantic import Field, ValidationError

from qlora_dist.config.sections import ConfigSection
from qlora_dist.errors import UserError
from qlora_dist.plan.hardware import Positive
from qlora_dist.plan.step_time import RankSpeeds
from qlora_dist.runtime.system import user_cache_dir


class MeasuredSpeeds(ConfigSection):
    """Of one kind of device, and of what lies between its ranks when it was measured. Per second."""

    device: str
    """As the driver calls it."""
    torch: str
    flops: Positive
    dequantized_bytes: Positive
    streamed_bytes: Positive
    host_bytes: Positive
    inside_bytes: Positive | None = None
    """Received by a rank from those of its node. None: there was one."""
    between_bytes: Positive | None = None
    """Received by all ranks of a node together from other nodes. None: there was one node."""


class Calibration(ConfigSection):
    """A file of it."""

    devices: dict[str, MeasuredSpeeds] = Field(default_factory=dict)


def default_calibration_path() -> Path:
    """In the user's cache."""
    return user_cache_dir() / "calibration.json"


def load_calibration(path: Path | None = None) -> Calibration:
    """What has been measured; nothing, if nobody has.

    Args:
        path: of a file; None: the user's, if there is one.

    Raises:
        UserError: there is no such file, or it is another one.
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
    """Add what was measured of a kind of device, in place of what was known of it. Returns the file."""
    target_path = path or default_calibration_path()
    known = load_calibration(target_path) if target_path.exists() else Calibration()
    target_path.parent.mkdir(parents=True, exist_ok=True)
    updated = Calibration(devices=known.devices | {gpu_name: measured})
    part = target_path.with_suffix(".part")
    part.write_text(updated.model_dump_json(indent=2))
    part.replace(target_path)
    return target_path


def calibrated_speeds(measured: MeasuredSpeeds, assumed: RankSpeeds) -> RankSpeeds:
    """A rank's speeds, as far as they were measured; the others as they are assumed."""
    return replace(
        assumed,
        flops=measured.flops,
        dequantize_bytes_per_s=measured.dequantized_bytes,
        elementwise_bytes_per_s=measured.streamed_bytes,
        host=measured.host_bytes,
        inside=measured.inside_bytes or assumed.inside,
        inter_node_bytes_per_s=measured.between_bytes or assumed.inter_node_bytes_per_s,
    )
