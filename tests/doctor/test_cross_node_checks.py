"""If this fails, the doctor reports a network or a folder wrongly."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.doctor.cross_node_checks import check_bandwidth, check_peer_host_names, check_shared_run_folder
from qlora_dist.doctor.run_doctor import run_doctor
from qlora_dist.runtime import shared_folder
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group, resolve_device
from tests.helpers.launchers import skip_unless
from tests.helpers.ranks import run_ranks

_CLONE_NEWNET = 0x40000000


def doctor_json(folder: Path) -> tuple[bool, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        fine = run_doctor(folder, "cpu", as_json=True)
    return fine, output.getvalue()


def test_a_job_of_two_nodes(tmp_path: Path) -> None:
    (fine, output), *others = run_ranks(4, doctor_json, tmp_path, nodes=2)
    assert all(output == "" for _, output in others)
    report = json.loads(output)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert report["ranks"] == 4 and report["nodes"] == 2
    assert {"names", "ports", "shared folder", "clocks", "kernels"} <= set(found)
    assert fine and all(finding["status"] != "fail" for finding in found.values())
    for dim, ranks in (("node", 2), ("across", 2), ("world", 4)):
        assert found[f"bandwidth {dim}"]["said"].startswith(f"{ranks} ranks: all_gather ")
        assert min(found[f"bandwidth {dim}"]["values"].values()) > 0
    assert max(map(abs, found["clocks"]["values"]["skew_s"].values())) < 0.5  # the nodes share one clock
    assert list(tmp_path.iterdir()) == []


def in_process_group(check: Any, *args: Any) -> Any:
    ranks = read_rank_info()
    with process_group(ranks, resolve_device("cpu", ranks), 60):
        return check(ranks, *args)


def check_unshared_folder(ranks: Any, folder: Path) -> str:
    """Check with a different folder on the second node."""
    if ranks.rank == 1:
        folder = folder / "elsewhere"
        folder.mkdir()
    shared_folder._VISIBLE_TIMEOUT_S = 0.5
    return check_shared_run_folder(["n1", "n2"], ranks, folder).said


def test_a_folder_that_is_not_shared_is_found(tmp_path: Path) -> None:
    messages = run_ranks(2, in_process_group, check_unshared_folder, tmp_path, nodes=2)
    assert messages[0] == f"{tmp_path} of n1 is not seen by n2"


def check_unknown_host(ranks: Any) -> str:
    return check_peer_host_names(["localhost", "no-such-host.invalid"], ranks).said


def test_an_unknown_name_is_found() -> None:
    assert "cannot resolve no-such-host.invalid" in run_ranks(2, in_process_group, check_unknown_host, nodes=2)[0]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, str]]:
    """Create two network namespaces with 200 Mbit/s between them."""
    skip_unless(os.geteuid() == 0 and shutil.which("tc") is not None, "root, ip or tc, for network namespaces,")
    names = tuple(f"qd{os.getpid() % 100000}{side}" for side in "ab")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for index, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.93.7.{index + 1}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
            limit = f"tc qdisc add dev {name} root tbf rate 200mbit burst 256kb latency 100ms"
            ip("netns", "exec", name, *limit.split())
        yield names  # type: ignore[misc]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def measure_in_namespace(names: tuple[str, str]) -> dict[str, float]:
    name = names[int(os.environ["RANK"])]
    with Path(f"/run/netns/{name}").open() as namespace:
        assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) == 0
    os.environ |= {"MASTER_ADDR": "10.93.7.1", "GLOO_SOCKET_IFNAME": name}
    (found,) = in_process_group(lambda ranks: check_bandwidth(ranks, resolve_device("cpu", ranks)))
    assert found.check == "bandwidth world"
    return found.values


@pytest.mark.slow
def test_the_bandwidth_is_that_of_the_network(two_nodes: tuple[str, str]) -> None:
    values, _ = run_ranks(2, measure_in_namespace, two_nodes, nodes=2)
    set_bytes_per_s = 200e6 / 8
    assert values["all_reduce_bytes_per_s"] == pytest.approx(set_bytes_per_s, rel=0.2)
    # gloo's all-gather does not send and receive all the time
    assert 0.5 * set_bytes_per_s < values["all_gather_bytes_per_s"] < 1.2 * set_bytes_per_s
