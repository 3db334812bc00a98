"""Events as they go over the wire: atomic batches, and chains of fenced messages. Pure.

A chain's messages name themselves (`Nats-Msg-Id`) and the one that must stand before them
(`Nats-Expected-Last-Msg-Id`). The sequence alone would not do: where another writer's message takes the place of one
of ours, ours is refused, but the next one finds the sequence that it expects, and nobody hears of the loss. The ids are
never used twice; the server forgets them after the stream's duplicate window, which is short.

Source: NATS client protocol (HPUB); ADR-50, "JetStream Batch Publishing"; JetStream publish headers (ADR-15).
"""

from __future__ import annotations

import msgspec

STATUS_LINE = b"NATS/1.0\r\n"
EXPECTED_SEQUENCE = b"Nats-Expected-Last-Sequence: %d\r\n"
# All ids of a writer are of one length, so that a message's length is a sum.
MESSAGE_ID = b"Nats-Msg-Id: %b%012d\r\n"
EXPECTED_ID = b"Nats-Expected-Last-Msg-Id: %b%012d\r\n"
_LAST = b"Bridge-Last: 1\r\n"
BLANK = b"\r\n"


class Item(msgspec.Struct, gc=False):
    """One event on its way.

    headers: its header lines, each with its line's end, without status line and blank line. `joined`: it must share a
    batch with the item before it. `end` is its transaction's commit end if this event is the last one, else 0;
    `committed_at` when that was, where it is known.
    """

    subject: bytes
    headers: bytes
    payload: bytes
    position: bytes
    joined: bool = False
    end: int = 0
    committed_at: str = ""

    @property
    def bytes(self) -> int:
        """What it counts in a window."""
        return len(self.headers) + len(self.payload)

    def close(self, end: int, committed_at: str = "") -> None:
        """Make it its transaction's last event."""
        self.headers += _LAST
        self.end = end
        self.committed_at = committed_at


class Link(msgspec.Struct, frozen=True):
    """Where a chain goes on: `name` begins all ids of one writer, `number` counts his messages; `follows`: the message
    before is the writer's own, number - 1."""

    name: bytes
    number: int
    follows: bool


def chain(items: list[Item], expected: int, link: Link, reply: bytes) -> bytes:
    """HPUB commands for messages that each follow the one before; the last one's answer stands for all of them.

    A message that is lost or refused makes every later one fail, whatever else gets in meanwhile.
    """
    name, number = link.name, link.number
    lines = MESSAGE_ID % (name, number)
    lines += EXPECTED_ID % (name, number - 1) if link.follows else EXPECTED_SEQUENCE % expected
    if len(items) == 1:
        return _command(items[0], lines, reply)
    out = [_command(items[0], lines)]
    fixed = len(STATUS_LINE) + len(MESSAGE_ID % (name, 0)) + len(EXPECTED_ID % (name, 0)) + len(BLANK)
    for found in items[1:-1]:
        headers, payload = found.headers, found.payload
        size = fixed + len(headers)
        out.append(
            b"HPUB %b %d %d\r\nNATS/1.0\r\nNats-Msg-Id: %b%012d\r\nNats-Expected-Last-Msg-Id: %b%012d\r\n%b\r\n%b\r\n"
            % (found.subject, size, size + len(payload), name, number + 1, name, number, headers, payload)
        )
        number += 1
    out.append(_command(items[-1], MESSAGE_ID % (name, number + 1) + EXPECTED_ID % (name, number), reply))
    return b"".join(out)


def _command(found: Item, lines: bytes, reply: bytes = b"") -> bytes:
    size = len(STATUS_LINE) + len(lines) + len(found.headers) + len(BLANK)
    return b"HPUB %b %b%d %d\r\n%b%b%b\r\n%b\r\n" % (
        found.subject, reply + b" " if reply else b"", size, size + len(found.payload),
        STATUS_LINE, lines, found.headers, found.payload,
    )  # fmt: skip


def batch(items: list[Item], name: bytes, expected: int, reply: bytes) -> bytes:
    """HPUB commands for an atomic batch of two or more events, called `name`.

    Only the first carries the expected sequence, only the last asks for an answer and commits (ADR-50).
    """
    member = b"Nats-Batch-Id: %b\r\nNats-Batch-Sequence: " % name
    fixed = len(STATUS_LINE) + len(member) + 2 * len(BLANK)
    out = [_command(items[0], b"%b1\r\n" % member + EXPECTED_SEQUENCE % expected)]
    for number, found in enumerate(items[1:-1], 2):
        headers, payload = found.headers, found.payload
        digits = b"%d" % number
        size = fixed + len(digits) + len(headers)
        out.append(
            b"HPUB %b %d %d\r\nNATS/1.0\r\n%b%b\r\n%b\r\n%b\r\n"
            % (found.subject, size, size + len(payload), member, digits, headers, payload)
        )
    out.append(_command(items[-1], b"%b%d\r\nNats-Batch-Commit: 1\r\n" % (member, len(items)), reply))
    return b"".join(out)
