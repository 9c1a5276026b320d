"""If this fails, a machine on which a run would fail is reported as fine."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
import torch

import qlora_dist.doctor.node_checks as node
from qlora_dist.compat.versions import TESTED_VERSIONS
from qlora_dist.doctor.node_checks import (
    check_compute_type,
    check_dequantize_kernel,
    check_devices,
    check_free_disk,
    check_free_memory,
    check_libraries,
    check_own_host_name,
)
from qlora_dist.runtime import process_group
from qlora_dist.runtime.environment import RankInfo

CPU = torch.device("cpu")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def test_tested_versions_equal_the_constraints() -> None:
    pinned = re.findall(r"^([\w-]+)==(\S+?)(?:;|$)(?!.*< \"3)", CONSTRAINTS.read_text(), re.MULTILINE)
    assert TESTED_VERSIONS.items() <= dict(pinned).items()


def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_libraries().status == "ok"
    monkeypatch.setitem(TESTED_VERSIONS, "peft", "0.0.1")
    found = check_libraries()
    assert found.status == "warn" and re.search(r"peft 0\.21\.\d+ \(tested: 0\.0\.1\)", found.said)
    monkeypatch.setitem(TESTED_VERSIONS, "no-such-library", "1")
    assert check_libraries().status == "fail" and "without no-such-library" in check_libraries().said


def test_kernels_are_compared_with_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads a wrong scale, as bitsandbytes' did on AVX512, is found."""
    assert check_dequantize_kernel(CPU).status == "ok"
    dequantize = node.dequantize_weight

    def wrong(packed: torch.Tensor, layout: node.NF4Layout, dtype: torch.dtype) -> torch.Tensor:
        values = dequantize(packed, layout, dtype)
        values[3, 7] += 0.25
        return values

    monkeypatch.setattr(node, "dequantize_weight", wrong)
    assert check_dequantize_kernel(CPU).status == "fail"
    assert "dequantizes wrongly on cpu, by up to 0.25" in check_dequantize_kernel(CPU).said


def test_a_processor_without_bf16_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : avx2")
    found = check_compute_type(CPU)
    assert found.status == "warn" and found.remedy == "set model.compute_dtype=fp32"
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512_bf16")
    assert check_compute_type(CPU).status == "ok"
    findings = node.check_node(
        RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none"), CPU, tmp_path
    )
    assert "compute type" in [finding.check for finding in findings]


def test_memory_and_disk_are_measured(tmp_path: Path) -> None:
    memory = check_free_memory(CPU)
    assert memory.values is not None and 0 < memory.values["free_bytes"] <= memory.values["total_bytes"]
    disk = check_free_disk(tmp_path / "not" / "there")
    assert disk.values is not None and disk.values["free_bytes"] > 0 and str(tmp_path) in disk.said


def test_the_names_of_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun waits silently for minutes for a name that cannot be resolved."""
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert check_own_host_name({}).status == "ok"
    found = check_own_host_name({"MASTER_ADDR": "node0.invalid"})
    assert found.status == "fail" and found.said.startswith("MASTER_ADDR: node0.invalid cannot be resolved (")
    monkeypatch.setattr(socket, "gethostname", lambda: "me.invalid")
    found = check_own_host_name({"MASTER_ADDR": "127.0.0.1"})
    assert found.status == "warn" and found.said.startswith("me.invalid, this machine's own name, cannot be resolved (")


def test_checks_run_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no process affinity, and lacks some names of sysconf."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sysconf")
    findings = node.check_node(
        RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none"), CPU, Path()
    )
    assert {finding.check for finding in findings} >= {"devices", "memory", "host name"}


def test_a_cpu_does_not_count_as_a_gpu() -> None:
    found = check_devices(RankInfo(rank=0, world_size=2, local_rank=0, local_world_size=2, launcher="torchrun"))
    assert found.status == ("ok" if torch.cuda.is_available() else "warn")
    assert "2 ranks" in found.said
