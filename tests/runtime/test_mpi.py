"""If this fails, ranks on another node get an address that leads to themselves, or nowhere."""

from __future__ import annotations

import socket

import psutil
import pytest

from qlora_dist.errors import UserError
from qlora_dist.runtime import mpi
from qlora_dist.runtime.mpi import reachable_address
from qlora_dist.runtime.network import check_interfaces, matches_nccl_ifname


def interfaces() -> dict[str, list[str]]:
    """Return the interfaces of this machine that are up, without loopback."""
    up = [name for name, state in psutil.net_if_stats().items() if state.isup]
    found = {
        name: [entry.address for entry in psutil.net_if_addrs()[name] if entry.family == socket.AF_INET] for name in up
    }
    return {name: addresses for name, addresses in found.items() if addresses and not addresses[0].startswith("127.")}


def test_a_named_interface_decides() -> None:
    if not interfaces():
        pytest.skip("a machine with a loopback interface only")
    for name, addresses in interfaces().items():
        assert reachable_address({"GLOO_SOCKET_IFNAME": f"none,{name}"}) == addresses[0]
        assert reachable_address({"NCCL_SOCKET_IFNAME": f"={name}"}) == addresses[0]
        assert reachable_address({"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": "^e"}) == addresses[0]


def test_an_unknown_interface_is_refused() -> None:
    with pytest.raises(UserError, match="name its network interface in GLOO_SOCKET_IFNAME"):
        reachable_address({"GLOO_SOCKET_IFNAME": "none0"})


def test_a_name_that_means_the_machine_itself_is_not_sent_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Debian's entry in /etc/hosts
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [entry])
    monkeypatch.setattr(mpi, "_interface_addresses", lambda: {"eth0": ["10.0.0.5"], "eth1": ["10.1.0.5"]})
    assert reachable_address({}) == "10.0.0.5"
    assert reachable_address({"NCCL_SOCKET_IFNAME": "eth1"}) == "10.1.0.5"


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth1", ["eth1"]),
        ("^docker,lo", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["eth1", "ib0", "docker0"]),
        ("ib,docker", ["ib0", "docker0"]),
    ],
)
def test_nccls_patterns(pattern: str, fitting: list[str]) -> None:
    assert [name for name in ("eth0", "eth1", "ib0", "docker0") if matches_nccl_ifname(name, pattern)] == fitting


def test_an_interface_that_gloo_or_nccl_would_miss_is_refused() -> None:
    """Gloo would otherwise fail with a C++ stack trace."""
    known = next(iter(psutil.net_if_addrs()))
    for device in ("cpu", "cuda"):
        check_interfaces(device, {})
        check_interfaces(device, {"GLOO_SOCKET_IFNAME": known, "NCCL_SOCKET_IFNAME": f"={known}"})
        with pytest.raises(UserError, match=r"^GLOO_SOCKET_IFNAME: .* has no network interface nosuch0; set it to one"):
            check_interfaces(device, {"GLOO_SOCKET_IFNAME": f"{known},nosuch0"})
    with pytest.raises(UserError, match=r"^NCCL_SOCKET_IFNAME: .* has no network interface nosuch;"):
        check_interfaces("cuda", {"NCCL_SOCKET_IFNAME": "nosuch"})
    check_interfaces("cpu", {"NCCL_SOCKET_IFNAME": "nosuch"})
