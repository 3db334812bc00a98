"""The one tree of errors. Each says what happened, where, and what the operator does next.

    BridgeError                      exit code
    ├── UsageError                   2   a wrong command line
    ├── ConfigError                  2   a wrong or impossible configuration, every finding at once
    ├── Contradiction                3   what is stored disagrees: a person must decide
    │   ├── Gap                          changes are missing between slot and stream
    │   ├── SlotLost, SlotMissing        PostgreSQL no longer has (all of) the slot's changes
    │   ├── OtherDatabase                not the database of the checkpoint
    │   │   └── Rewound                  … or one that was set back to before the stream's end
    │   ├── OtherStream                  a stream that is set up for something else
    │   │   └── StreamGone               … or was deleted or made again
    │   ├── StreamHole                   messages are missing in the middle of the stream
    │   ├── EventLost                    something else has an event's place in the stream
    │   ├── Fenced, ForeignWriter        somebody else wrote to the stream
    │   ├── MissingIdentity              PostgreSQL does not log the key of a changed row
    │   ├── TooLarge, BadRecord          a change that cannot be published
    │   ├── BadState                     something else is where the bridge keeps what it remembers
    │   ├── ObjectMissing                a large row's object is gone or damaged
    │   ├── Overtaken                    retention has removed events that a reader had not read yet
    │   ├── NotCompactable               a table or change that a compacted log cannot hold
    │   └── IndexMismatch                an index that was not built from this stream
    ├── ServerRefused                4   a server answered and said no: credentials, privilege, plugin, setting
    │   └── ServerMissing            4   a program or server that is needed is not installed
    └── Unavailable                  -   a server is away: waited for and retried, never fatal by itself
        └── NotStarted               -   … which the bridge runs, that is not running itself

Messages carry names, LSNs and counts. They never carry row values or passwords.
"""

from __future__ import annotations

import traceback
from pathlib import Path

EXIT_DONE = 0
EXIT_FOUND = 1
EXIT_USAGE = 2
EXIT_CONTRADICTION = 3
EXIT_REFUSED = 4
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141


class BridgeError(Exception):
    """What went wrong, and the remedy: what the operator does next.

    Args:
        what: one sentence with names, LSNs and counts.
        remedy: the command, SQL or configuration line that mends it.
    """

    exit_code = EXIT_CONTRADICTION

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  → {self.remedy}"


class UsageError(BridgeError):
    """The command line is wrong; correct it."""

    exit_code = EXIT_USAGE


class ConfigError(BridgeError):
    """The configuration is wrong; every finding is named, correct them all."""

    exit_code = EXIT_USAGE


class Contradiction(BridgeError):
    """Two things that must agree do not; nothing goes on until a person has decided.

    heals: whether a new slot and a complete snapshot mend it, as they do with `[source] on_gap = "resnapshot"`.
    """

    heals = False


class Gap(Contradiction):
    """Changes between the stream's tail and the slot's position are gone from PostgreSQL."""

    heals = True


class SlotLost(Contradiction):
    """PostgreSQL removed WAL that the slot still needed (wal_status = lost)."""

    heals = True


class SlotMissing(Contradiction):
    """The slot was dropped while the stream still continues from it."""

    heals = True


class OtherDatabase(Contradiction):
    """The dsn leads to another cluster, database or timeline than the stream was written from."""


class OtherStream(Contradiction):
    """The stream is set up for something else, or in a way that would lose events; edit it, or choose another."""


class StreamGone(OtherStream):
    """The stream was deleted or made again since the last checkpoint; restore it, or begin a new log."""

    heals = True


class Rewound(OtherDatabase):
    """The database is older than what the stream holds, or branched off before it: restored from a backup."""

    heals = True


class StreamHole(Contradiction):
    """Messages are missing in the middle of the stream: a damaged block, or deleted by hand."""


class EventLost(Contradiction):
    """Something else has an event's place in the stream, and later events follow it: it is in no log any more."""

    heals = True


class Fenced(Contradiction):
    """A newer bridge has taken over; this one must not write any more."""


class ForeignWriter(Contradiction):
    """Something that is no bridge published to the stream's subjects."""


class MissingIdentity(Contradiction):
    """A table without replica identity was updated or deleted from; PostgreSQL does not log which row."""


class TooLarge(Contradiction):
    """An event is larger than the NATS server's max_payload even without its row: raise max_payload."""


class ObjectMissing(Contradiction):
    """The object that holds a large row is gone or damaged: read on behind that event, and write the row again."""


class Overtaken(Contradiction):
    """Retention has removed events that a reader had not read yet: build anew what it makes of them."""


class BadRecord(Contradiction):
    """wal2json sent something that cannot be understood; nothing after it was published."""


class BadState(Contradiction):
    """A key of the bridge's buckets holds what no bridge has written: put the value before back."""


class NotCompactable(Contradiction):
    """A compacted log keeps the last event of each row, so that one must say which row it is and hold all of it."""


class IndexMismatch(Contradiction):
    """A search index or its alias is not what this stream has built; a rebuild mends it."""


class ServerRefused(BridgeError):
    """A server answered and refused: wrong password, missing privilege, missing plugin, wrong setting."""

    exit_code = EXIT_REFUSED


class ServerMissing(ServerRefused):
    """A program that is needed is not installed on this machine."""


class Unavailable(BridgeError):
    """A server cannot be reached at the moment. Raised inside, answered with waiting and another try.

    pause: seconds that pass at least before the next try.
    """

    exit_code = EXIT_REFUSED
    pause = 0.0


class NotStarted(Unavailable):
    """Nobody runs that server until somebody starts the bridge."""


def unexpected(error: Exception) -> str:
    """What is said of an error that nobody expected: its kind and place alone, for its text may hold row values."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"unexpected {type(error).__name__} in {Path(at.filename).name}:{at.lineno}"
