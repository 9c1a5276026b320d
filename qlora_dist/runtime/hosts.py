"""Whether the names of machines lead anywhere, before ranks wait for each other by them."""

from __future__ import annotations

import socket
import time

from qlora_dist.errors import UserError

_DNS_TIMEOUT_S = 10.0
"""How long a name server may be silent before a name counts as unknown."""


def resolve_error(host: str, timeout_s: float = 0.0) -> str | None:
    """Return the reason why a name or address leads nowhere; None: it leads somewhere.

    Args:
        host: as in MASTER_ADDR.
        timeout_s: seconds to ask again while the answer is only that there is none for now.
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
    """See whether this machine knows the machine where the ranks meet.

    Raises:
        UserError: it does not.
    """
    if (reason := resolve_error(host, _DNS_TIMEOUT_S)) is not None:
        own = " (with `torchrun --local-addr 127.0.0.1` the ranks of one machine need no name)"
        raise UserError(
            f"{host}: {socket.gethostname()} does not know this machine, where the ranks are to meet ({reason}); set "
            f"MASTER_ADDR to an address of rank 0's machine, or add the name to the DNS or to /etc/hosts"
            f"{own if host in (socket.gethostname(), socket.getfqdn()) else ''}",
            local_only=True,
            retryable=True,
        )
