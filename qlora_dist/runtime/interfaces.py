"""Which network interfaces gloo and NCCL are told to use, and whether this machine has them."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

import psutil

from qlora_dist.errors import UserError


def check_interfaces(device_type: str, environ: Mapping[str, str] = os.environ) -> None:
    """See whether the interfaces that the environment names are there.

    Args:
        device_type: cpu or cuda; NCCL's variable counts on cuda only.
        environ: with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.

    Raises:
        UserError: gloo or NCCL would end in an error of its own.
    """
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
        f"{variable}: {socket.gethostname()} has no network interface {name}; set it to one of {', '.join(available)}, or "
        "unset it",
        local_only=True,
    )


def matches_nccl_ifname(name: str, pattern: str) -> bool:
    """NCCL's rule: prefixes; `=` before them means whole names, `^` all but these."""
    match = re.match(r"(\^?=?)(.*)", pattern)
    assert match is not None, "both groups may be empty"
    sign, names = match.groups()
    fits = name in names.split(",") if "=" in sign else name.startswith(tuple(names.split(",")))
    return fits != ("^" in sign)
