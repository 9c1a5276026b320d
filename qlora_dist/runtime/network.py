"""Checks of host names and network interfaces, made before ranks wait for each other."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping

import psutil

from qlora_dist.errors import UserError

_DNS_TIMEOUT_S = 10.0
"""Seconds for which a name server may fail temporarily before a name counts as unknown."""


def resolve_error(host: str, timeout_s: float = 0.0) -> str | None:
    """Return the reason why a name or address cannot be resolved; None if it can.

    While the name server fails temporarily, retry for `timeout_s` seconds.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return None
        except (OSError, UnicodeError) as error:
            is_temporary = getattr(error, "errno", None) == socket.EAI_AGAIN
            if not is_temporary or time.monotonic() >= end:
                return str(getattr(error, "strerror", None) or error)
        time.sleep(0.5)


def check_rendezvous_host(host: str) -> None:
    """Raise UserError if this machine cannot resolve the name of rank 0's machine."""
    if (reason := resolve_error(host, _DNS_TIMEOUT_S)) is not None:
        hint = " (with `torchrun --local-addr 127.0.0.1` the ranks of one machine need no name)"
        raise UserError(
            f"{host}: {socket.gethostname()} cannot resolve this name of rank 0's machine ({reason}); set "
            f"MASTER_ADDR to an address of rank 0's machine, or add the name to the DNS or to /etc/hosts"
            f"{hint if host in (socket.gethostname(), socket.getfqdn()) else ''}",
            local_only=True,
            retryable=True,
        )


def check_interfaces(device_type: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if an interface in GLOO_SOCKET_IFNAME, or for cuda in NCCL_SOCKET_IFNAME, does not exist."""
    available = sorted(psutil.net_if_addrs())
    if gloo := environ.get("GLOO_SOCKET_IFNAME"):
        missing = [name for name in gloo.split(",") if name not in available]
        if missing:
            raise _unknown_interface_error("GLOO_SOCKET_IFNAME", missing[0], available)
    nccl = environ.get("NCCL_SOCKET_IFNAME")
    if nccl and device_type == "cuda" and not any(matches_nccl_ifname(name, nccl) for name in available):
        raise _unknown_interface_error("NCCL_SOCKET_IFNAME", nccl, available)


def _unknown_interface_error(variable: str, name: str, available: list[str]) -> UserError:
    return UserError(
        f"{variable}: {socket.gethostname()} has no network interface {name}; set it to one of "
        f"{', '.join(available)}, or unset it",
        local_only=True,
    )


def matches_nccl_ifname(name: str, pattern: str) -> bool:
    """Return whether NCCL's pattern selects an interface.

    The pattern is a list of prefixes. A leading `=` requires whole names, and a leading `^` selects all others.
    """
    match = re.match(r"(\^?=?)(.*)", pattern)
    assert match is not None, "both groups may be empty"
    sign, names = match.groups()
    fits = name in names.split(",") if "=" in sign else name.startswith(tuple(names.split(",")))
    return fits != ("^" in sign)
