"""Named lines at which a test may kill, stop or cut the bridge.

`BRIDGE_FAILPOINT=name:action[:nth]` arms one of them: at the nth time that it is reached (the first by default) the
process does `action`, once. Without the variable `reach` does nothing, and it stands only where something happens per
connection, checkpoint, batch or transaction, never per row.

    kill    SIGKILL to itself: nothing is cleaned up
    stop    SIGSTOP to itself, until somebody sends SIGCONT
    cut     every TCP connection of the process breaks, and it goes on
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping

from bridge.errors import ConfigError

VARIABLE = "BRIDGE_FAILPOINT"

POINTS: Mapping[str, str] = {
    "start.decided": "recovery knows where to go on; nothing is written yet",
    "epoch.taken": "the new epoch is in the state bucket",
    "snapshot.marked": "the checkpoint says that a snapshot is under way; there is no new slot yet",
    "slot.dropped": "the slot of an attempt that did not finish is gone",
    "slot.created": "the new slot is there, no row has been read",
    "snapshot.prepared": "every table is noted as one that waits, the checkpoint has the slot's consistent point",
    "table.began": "a table's begin marker is at the publisher",
    "table.rows": "some rows of a table are at the publisher",
    "table.read": "all rows of a table, or of a range of it, are at the publisher, its transaction is open",
    "table.done": "a table is in the stream as a whole and noted as done",
    "snapshot.read": "all tables have been read, the publisher still has events on their way",
    "snapshot.drained": "the stream has every row, the last tables are not noted as done",
    "snapshot.noted": "every table is noted as done, the checkpoint is not written",
    "snapshot.done": "the checkpoint says that the snapshot is in the stream",
    "reading.began": "a table's begin marker is in the stream, nothing of it is read",
    "reading.read": "a chunk is read, the stream has not passed its end",
    "reading.published": "the chunk's rows are in the stream, that is not noted",
    "reading.noted": "it is noted",
    "reading.moved": "rows that moved are in the stream as they are now, that is not noted",
    "reading.ended": "the end marker is in the stream, the table is not noted as done",
    "rewrite.asked": "a table whose rows DDL has changed is asked for to be read, its new shape is not kept",
    "schema.recorded": "a table's other columns are recorded, the event that tells of them is not published",
    "replication.started": "PostgreSQL has accepted START_REPLICATION",
    "transaction.began": "a transaction's begin has been decoded",
    "transaction.ended": "a transaction's last event is at the publisher",
    "batch.closed": "events have their sequences, nothing of them is written to the broker",
    "batch.written": "their bytes are at the connection",
    "batch.acked": "the broker has acked them, nobody here knows it",
    "doubt.begun": "what is on its way is in doubt, the stream's tail is not read",
    "doubt.read": "the tail is read, nothing follows from it yet",
    "checkpoint.due": "the stream has what the checkpoint will say",
    "checkpoint.written": "the state bucket has the checkpoint, PostgreSQL is not told",
    "checkpoint.confirmed": "PostgreSQL has been told what it may forget",
    "purge.due": "a compacted stream has a truncate or a read's end, what it leaves behind is not purged",
    "purge.done": "that is purged, nobody here knows it",
    "index.leased": "an index's lease is taken, nothing has been done under it",
    "index.named": "the record has the names of a generation's next consumer and write alias, neither is there",
    "index.admitted": "its index has the write alias, and none for a reader before it",
    "index.opened": "a generation's consumer stands where it is to go on, nothing is pulled",
    "index.sending": "a bulk is complete, nothing of it is sent",
    "index.sent": "a part of a bulk is answered, its other parts and the ack are still to come",
    "index.moving": "rows with another key are there under the new one, their old documents are, too",
    "index.reserved": "a delete has taken the version of an update that must ask the log for its unchanged columns",
    "index.sweeping": "a page of what a truncate or a complete read leaves behind is removed",
    "index.begun": "the record has the begin of a complete read",
    "index.grown": "the engine has new columns, the record has not",
    "index.buried": "a dead letter is stored, its event is not acked",
    "index.reached": "everything up to a place is answered, it is not acked",
    "index.acked": "it is acked, the record does not say so",
    "index.stored": "the record says how far all is done",
    "rebuild.recorded": "the record has a generation to build, there is no index yet",
    "rebuild.made": "its index is there, empty",
    "rebuild.replaying": "a batch of the log is on its way into it",
    "rebuild.restoring": "the replay is nearly done, the settings are still those of a replay",
    "rebuild.restored": "the settings are as configured",
    "rebuild.counted": "the documents are counted, nothing is switched",
    "switch.recorded": "the record says that the alias moves",
    "switch.due": "who holds the alias is read, nobody is told to move it",
    "switch.moved": "the alias is on the new generation, the record does not say so",
    "switch.finished": "the record says so, the old generation is still there",
    "switch.consumer": "the consumer of a retired generation is gone, its index is not",
    "switch.index": "its index is gone, too, the record still has it",
    "switch.forgotten": "the record has forgotten it",
    "back.chosen": "what to go back to is chosen, nothing is done for it",
    "back.feeding": "no reader runs, its lease is taken to bring the kept generation up to date",
    "back.level": "the kept generation is up to date, the record does not say that the alias moves",
    "back.recorded": "the record says so",
    "drain.done": "a stop has been asked for, everything is in the stream, the last checkpoint is not written",
}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _cut() -> None:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                one.shutdown(socket.SHUT_RDWR)


ACTIONS: Mapping[str, Callable[[], None]] = {"kill": _kill, "stop": _stop, "cut": _cut}


def armed(setting: str) -> Callable[[str], None]:
    """What `reach` is with this setting.

    Raises:
        ConfigError: it is not of the form name:action[:nth], or there is no such point or action.
    """
    if not setting:
        return _pass
    name, action, nth = (*setting.split(":"), "1")[:3] if setting.count(":") in (1, 2) else (setting, "", "1")
    if name not in POINTS or action not in ACTIONS or not nth.isdecimal() or nth == "0":
        raise ConfigError(
            f"{VARIABLE}={setting} names no failpoint",
            f"write name:action[:nth] with one of {', '.join(ACTIONS)} and one of {', '.join(POINTS)}; or unset it",
        )
    left = int(nth)

    def reach(reached: str) -> None:
        nonlocal left
        if reached != name or not left:
            return
        left -= 1
        if not left:
            os.write(2, f"failpoint {name}: {action}\n".encode())
            ACTIONS[action]()

    return reach


def _pass(_: str) -> None:
    """The process goes on; `reach` wherever no test asks for anything."""


reach: Callable[[str], None] = armed(os.environ.get(VARIABLE, ""))
