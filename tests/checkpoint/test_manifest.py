"""If this fails, a run resumes from a checkpoint that was damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_dist.checkpoint.manifest import (
    CHECKPOINT_MANIFEST,
    DamagedCheckpointError,
    Manifest,
    check_file,
    file_sha256,
    find_checkpoints,
    partial_folder,
    read_manifest,
    step_folder,
)
from qlora_dist.checkpoint.resharding import ShardSpec

SAMPLE_MANIFEST = Manifest(
    step=120,
    world_size=2,
    cuts={"layer.lora_A": ShardSpec((16, 64), 1, 2)},
    state={
        "progress": {"loss": 1.25, "nothing": None},
        "optimizer_steps": 1,
        "optimizer_bits": 8,
        "loss_scale": [1.0, 0],
    },
    identity={"base": "0" * 64, "data": "1" * 64, "adapter": None, "config": {"lora.r": 16}},
    files={f"rank-0000{rank}.safetensors": (1000, "a" * 64) for rank in (0, 1)},
)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_MANIFEST).write_bytes(SAMPLE_MANIFEST.to_bytes())
    assert read_manifest(tmp_path) == SAMPLE_MANIFEST


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_flipped_bit_is_noticed(position: int, bit: int, tmp_path: Path) -> None:
    content = bytearray(SAMPLE_MANIFEST.to_bytes())
    content[position % len(content)] ^= 1 << bit
    (tmp_path / CHECKPOINT_MANIFEST).write_bytes(content)
    with pytest.raises(DamagedCheckpointError):
        read_manifest(tmp_path)


@given(length=st.integers(0, len(SAMPLE_MANIFEST.to_bytes()) - 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_missing_byte_is_noticed(length: int, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_MANIFEST).write_bytes(SAMPLE_MANIFEST.to_bytes()[:length])
    with pytest.raises(DamagedCheckpointError):
        read_manifest(tmp_path)


def test_another_files_bytes_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "rank-00000.safetensors"
    file.write_bytes(b"x" * 100)
    digest = file_sha256(file)
    check_file(tmp_path, file.name, 100, digest)
    for content in (b"x" * 99 + b"y", b"x" * 99, b"x" * 101, b""):
        file.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=file.name):
            check_file(tmp_path, file.name, 100, digest)
    file.unlink()
    with pytest.raises(DamagedCheckpointError, match="is missing"):
        check_file(tmp_path, file.name, 100, digest)


def test_checkpoints_are_sorted_newest_first_without_partial_ones(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path / "none") == []
    for step in (9, 10, 1_000_000):
        step_folder(tmp_path, step).mkdir()
    partial_folder(step_folder(tmp_path, 11)).mkdir()
    (tmp_path / "step-12").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-1000000", "step-000010", "step-000009"]
