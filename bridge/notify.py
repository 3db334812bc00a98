"""What systemd is told of a service with Type=notify: that it runs, and that it stops.

Source: sd_notify(3): one datagram to the socket that NOTIFY_SOCKET names; @ stands for the abstract namespace.
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*lines: str) -> None:
    """Send assignments such as "READY=1"; nothing happens where nobody listens."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(f"\0{where[1:]}" if where.startswith("@") else where)
        sender.sendall("\n".join(lines).encode())
