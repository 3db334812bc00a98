"""Names on the wire: subjects, KV keys, stream and consumer names. Pure.

Every byte outside `[A-Za-z0-9_-]` of a source, schema, table or key becomes `=XX` (upper-case hex of the UTF-8 byte),
in subjects and KV keys alike, so that no table name can form a wildcard, a dot or a space, and two names never collide.
KV keys allow `[-/_=.a-zA-Z0-9]` (NATS ADR-8).

In a compacted log a row's subject goes on with its key, and a partition's rows stand below a token of the partition's:
`cdc.main.public.days.public=2Edays_1.2026-01-31,5`. Events without a key end in `@truncate`, `@begin` and the like,
which no escaped name can be.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache

import msgspec

_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_ESCAPED = re.compile(rb"=([0-9A-F]{2})")
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
# What a key's text must not read like: a number or word of JSON, or what opens an object, an array, or a marked text.
_AMBIGUOUS = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?|true|false|null|['\[{].*", re.DOTALL)

LONGEST_KEY = 200

TRUNCATE = "@truncate"
BEGIN = "@begin"
END = "@end"
SCHEMA = "@schema"


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


def table_of(key: str) -> tuple[str, str]:
    """Schema and table of a key in the state bucket, such as `snapshot.<source>.<schema>.<table>`."""
    schema, table = key.split(".")[2:4]
    return untoken(schema), untoken(table)


def table_subject(prefix: str, source: str, schema: str, table: str) -> str:
    """The subject that a table's events are published to."""
    return f"{prefix}.{token(source)}.{token(schema)}.{token(table)}"


def table_filter(prefix: str, source: str, schema: str, table: str, *, compact: bool) -> str:
    """What a reader of one table subscribes to: in a compacted log the subjects of all its rows and partitions."""
    found = table_subject(prefix, source, schema, table)
    return f"{found}.>" if compact else found


def message_subject(prefix: str, source: str, of: str) -> str:
    """Where logical messages with the prefix `of` go: its parts between dots are tokens. Over 200 bytes they are `#`
    and the SHA-256 of them."""
    found = ".".join(token.__wrapped__(part) for part in of.split("."))
    if len(found) > LONGEST_KEY:
        found = "#" + hashlib.sha256(found.encode()).hexdigest()
    return f"{prefix}.{token(source)}.@message.{found}"


def key_token(values: Iterable[bytes | msgspec.Raw]) -> str:
    """A row's key as one subject token; different keys never give the same one.

    Args:
        values: the key's columns in the table's order, each as raw JSON.

    Texts stand without their quotes, those that would read like another value behind an apostrophe; columns are joined
    with a comma. Over 200 bytes it is `#` and the SHA-256 of that: no escaped text holds `,` or `#`.
    """
    found = ",".join([_key_part(bytes(value)) for value in values])
    if len(found) > LONGEST_KEY:
        return "#" + hashlib.sha256(found.encode()).hexdigest()
    return found


def _key_part(value: bytes) -> str:
    if value[:1] != b'"':
        text = value.decode()
    else:
        text = msgspec.json.decode(value, type=str)
        if _AMBIGUOUS.fullmatch(text):
            text = "'" + text
    # Not `token`: it remembers names, and keys would push them out.
    return text if _PLAIN.fullmatch(text) else token.__wrapped__(text)


def source_subjects(prefix: str, source: str) -> str:
    """The wildcard over everything that one source publishes."""
    return f"{prefix}.{token(source)}.>"


def request_subject(source: str, *words: str) -> str:
    """What a bridge answers to: `bridge.<source>.status`, say."""
    return ".".join(["bridge", token(source), *words])


def is_inbox(reply: str) -> bool:
    """Whether an answer may go there. The bridge may publish to its own stream, to the state bucket and to JetStream's
    API: a stranger's reply subject must lead to none of them."""
    first, *rest = reply.split(".")
    return first.startswith("_INBOX") and bool(rest) and all(part not in ("", "*", ">") for part in (first, *rest))


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


def shape_key(source: str, schema: str, table: str) -> str:
    """KV key of what tells that DDL has changed a table's rows."""
    return f"shape.{token(source)}.{token(schema)}.{token(table)}"


def index_key(source: str, name: str) -> str:
    """KV key of an index's generations."""
    return f"index.{token(source)}.{token(name)}"
