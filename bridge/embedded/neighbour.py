"""Who has the port that the embedded nats-server would have had: whoever is told no address goes there.

A nats-server tells its name and version before anybody logs in (INFO, the first line of its protocol).
"""

from __future__ import annotations

import contextlib
import json
import re

import anyio

from bridge import log as logs

# It is asked while a server is started: longer than this it is not worth waiting for.
SECONDS = 1.0
LONGEST = 64 << 10
_NAME = re.compile(r"[\w.:@+-]{1,64}", re.ASCII)

log = logs.get()


async def tell(url: str, passed: list[int]) -> None:
    """Say that the embedded server is at `url`, and who is at the ports that it would have had."""
    log.warning(
        "nats-server elsewhere",
        url=url,
        taken=", ".join([f"127.0.0.1:{port} by {await who(port)}" for port in passed]),
        next=f"point the nats CLI and other clients at it: export NATS_URL={url}, or --server {url}; bridge's own "
        "commands find it by themselves",
    )


async def who(port: int) -> str:
    """What listens there, as far as it tells."""
    said = b""
    with anyio.move_on_after(SECONDS), contextlib.suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        async with await anyio.connect_tcp("127.0.0.1", port) as connection:
            while b"\n" not in said and len(said) < LONGEST:
                said += await connection.receive()
    return _described(said.partition(b"\n")[0]) or "another process"


def _described(line: bytes) -> str:
    """A nats-server's name and version, of what it says first; empty where it is none."""
    word, _, rest = line.partition(b" ")
    if word != b"INFO":
        return ""
    try:
        found = json.loads(rest)
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    told = [str(found.get(key, "")) for key in ("server_name", "version")]
    return " ".join(["another nats-server", *(text for text in told if _NAME.fullmatch(text))])
