"""Names on the wire: subjects, KV keys, stream and consumer names. Pure.

Every byte outside `[A-Za-z0-9_-]` of a source, schema, table or key becomes `=XX` (upper-case hex of the UTF-8 byte),
in subjects and KV keys alike, so that no table name can form a wildcard, a dot or a space, and two names never collide.
KV keys allow `[-/_=.a-zA-Z0-9]` (NATS ADR-8).
"""

from __future__ import annotations

import re
from functools import lru_cache

_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_ESCAPED = re.compile(rb"=([0-9A-F]{2})")


@lru_cache(maxsize=4096)
def token(name: str) -> str:
    """`name` as one subject token; an empty name is `=`, which no other name gives."""
    if not name:
        return "="
    return "".join(chr(byte) if byte in _SAFE else f"={byte:02X}" for byte in name.encode())


def untoken(text: str) -> str:
    """The name that `token` made `text` from."""
    if text == "=":
        return ""
    raw = _ESCAPED.sub(lambda m: bytes([int(m[1], 16)]), text.encode())
    return raw.decode()


def table_subject(prefix: str, source: str, schema: str, table: str) -> str:
    """The subject that a table's events are published to."""
    return f"{prefix}.{token(source)}.{token(schema)}.{token(table)}"


def source_subjects(prefix: str, source: str) -> str:
    """The wildcard over everything that one source publishes."""
    return f"{prefix}.{token(source)}.>"


def checkpoint_key(source: str) -> str:
    """KV key of a source's checkpoint."""
    return f"checkpoint.{token(source)}"


def epochs_key(source: str) -> str:
    """KV key of a source's list of writers."""
    return f"epochs.{token(source)}"


def snapshot_key(source: str, schema: str, table: str) -> str:
    """KV key of a table's snapshot status."""
    return f"snapshot.{token(source)}.{token(schema)}.{token(table)}"


def table_key(source: str, schema: str, table: str) -> str:
    """KV key of a table's columns and key."""
    return f"table.{token(source)}.{token(schema)}.{token(table)}"


def index_key(source: str, name: str) -> str:
    """KV key of an index's generations."""
    return f"index.{token(source)}.{token(name)}"
