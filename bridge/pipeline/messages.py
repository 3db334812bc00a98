"""Logical messages (pg_logical_emit_message) as events: which are published, where to, and how. Pure.

    {"op":"message","source":"main","prefix":"app.orders","transactional":true,"content":"…","lsn":…,"commit_lsn":…,…}

A transactional one is in its transaction, at its place among the changes. Any other is in the log at once, whatever
becomes of the transaction that emitted it: it has no `txid` and `committed_at`, and `commit_lsn` is its own LSN.
`content` is a JSON string of the text; wal2json ends it at the first zero byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bridge import event
from bridge.errors import BadRecord
from bridge.source.wal2json import Record
from bridge.stream import subjects

OURS = "bridge"  # what wakes an idle server up (`bridge.source.chunks.nudge`)


class Messages:
    """The messages of the prefixes that one of the patterns matches, and none with ! does; * and ? are wildcards."""

    def __init__(self, prefix: str, source: str, patterns: Sequence[str]) -> None:
        self._prefix = prefix
        self._source = source
        self._yes = [_pattern(one) for one in patterns if not one.startswith("!")]
        self._no = [_pattern(one[1:]) for one in patterns if one.startswith("!")]
        self._subjects: dict[str, bytes] = {}

    def subject(self, prefix: str) -> bytes:
        """Where messages of this prefix go; empty where they are not published."""
        found = self._subjects.get(prefix)
        if found is None:
            published = self._published(prefix)
            found = subjects.message_subject(self._prefix, self._source, prefix).encode() if published else b""
            if len(self._subjects) < 1_000:  # prefixes may be made up without end
                self._subjects[prefix] = found
        return found

    def _published(self, prefix: str) -> bool:
        chosen = any(one.fullmatch(prefix) for one in self._yes) and not any(one.fullmatch(prefix) for one in self._no)
        return chosen and prefix != OURS

    def payload(self, record: Record, closing: bytes) -> bytes:
        """The event of a message; `closing` is its transaction's."""
        opening = event.message_head(self._source, record.prefix, transactional=record.transactional)
        return b'%b,"content":%b,"lsn":"%b"%b' % (opening, bytes(record.content), record.lsn.encode(), closing)


def unreadable(record: Record, position: str) -> BadRecord:
    """The error for a message whose content is no valid text."""
    return BadRecord(
        f"the logical message with the prefix {record.prefix} at {position} is no valid text",
        "emit text in the database's encoding; to go on without messages of that prefix, exclude it: "
        f'[source] messages = [..., "!{record.prefix}"]',
    )


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)
