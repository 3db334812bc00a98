"""Why JetStream takes no more, and what the operator does about it. Pure.

A stream that takes no more is waited for: PostgreSQL keeps the WAL meanwhile, and nothing is lost.

Source: nats-server, server/errors.json.
"""

from __future__ import annotations

ACCOUNT_LIMIT = 10002
NO_RESOURCES = 10023
STORAGE_LIMIT = 10047
MESSAGE_TOO_LARGE = 10054
NO_REASON = 0
NOT_STORED = 10077
BATCH_INCOMPLETE = 10176

FULL = (ACCOUNT_LIMIT, NO_RESOURCES, STORAGE_LIMIT, NOT_STORED)
"""The codes of what passes once there is room."""


def remedy(code: object, reason: str, stream: str) -> str:
    """What to do about an err_code and its description with which a message for `stream` was refused."""
    if code == NOT_STORED and "exceeded" in reason:
        return (
            f"the stream has reached its limit and discards new messages: raise it (nats stream edit {stream} "
            "--max-bytes=…, --max-msgs=…), or let the oldest go (--discard=old)"
        )
    if code == ACCOUNT_LIMIT:
        return "the NATS account is full: raise its max_file (jetstream limits), or remove other streams"
    if code in (NO_RESOURCES, STORAGE_LIMIT):
        return "the NATS server is full: raise max_file_store in its jetstream block, or remove other streams"
    if code == MESSAGE_TOO_LARGE:
        return f"the stream has a limit below the server's: nats stream edit {stream} --max-msg-size=-1"
    if code in (NO_REASON, NOT_STORED, BATCH_INCOMPLETE):
        return (
            "the NATS server drops messages, see its log: if its disk is full, make room and restart it (it does not "
            "write to that stream again before; the embedded one is restarted by itself)"
        )
    return "see the NATS server's log; trying again until it is accepted"
