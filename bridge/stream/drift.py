"""How a stream's configuration differs from the one that the bridge made it with. Pure.

Somebody edited it. What would lose events, or let others write, is refused; everything else is said once, with the
command that sets it back.

Source: JetStream API, stream configuration; field names as in `$JS.API.STREAM.INFO`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bridge.config import Stream
from bridge.errors import OtherStream
from bridge.stream.definition import wanted

# Field → the value that keeps every event, what any other does, and the option of `nats stream edit` (empty: none).
KEEPS: dict[str, tuple[Any, str, str]] = {
    "retention": ("limits", "removes events once they are read, or while nobody reads them", ""),
    "storage": ("file", "loses every event with the server", ""),
    "sealed": (False, "takes no more events", ""),
    "no_ack": (False, "never says whether it has an event", "--ack"),
    "max_msgs_per_subject": (-1, "drops events of busy tables from the middle", "--max-msgs-per-subject=-1"),
    "sources": ([], "takes in what other streams hold", ""),
    "mirror": (None, "holds what another stream holds", ""),
    "subject_transform": (None, "stores events under other subjects", ""),
    "allow_msg_counter": (False, "takes counters only", ""),
    "allow_msg_schedules": (False, "lets messages appear by themselves", ""),
}
# Field → the option of `nats stream edit` that sets it back; what differs here changes how far back the log reaches, or
# what an operator may do.
TELLS: dict[str, str] = {
    "max_age": "--max-age={}",
    "max_bytes": "--max-bytes={}",
    "max_msgs": "--max-msgs={}",
    "max_consumers": "",
    "discard": "--discard={}",
    "num_replicas": "--replicas={}",
    "max_msg_size": "--max-msg-size={}",
    "deny_delete": "",
    "deny_purge": "",
    "allow_direct": "--allow-direct",
    # So long the server keeps the id of every message: some 200 bytes of its memory each.
    "duplicate_window": "--dupe-window={}",
}
ABSENT = {"max_msg_size": -1, "deny_delete": False, "deny_purge": False, "max_age": 0, "max_msgs_per_subject": -1}


class Drift(NamedTuple):
    """One field that differs: what the stream has, what the configuration asks for, and the command that sets it so."""

    field: str
    found: Any
    wanted: Any
    command: str


def drift(config: Stream, subjects: str, found: dict[str, Any]) -> list[Drift]:
    """The harmless differences.

    Args:
        found: the stream's configuration as its info tells it.

    Raises:
        OtherStream: one that would lose events or take others' in; every one of them is named.
    """
    asked = wanted(config, subjects)
    harmful, remedies = [], []
    for field, (keeps, does, option) in KEEPS.items():
        value = found.get(field)
        if value is None or value == asked.get(field, keeps) or (field == "max_msgs_per_subject" and value <= 0):
            continue
        harmful.append(f"{field} is {value if isinstance(value, (str, int)) else 'set'}, which {does}")
        remedies.append(f"nats stream edit {config.name} {option}" if option else "")
    if harmful:
        commands = ", ".join(remedy for remedy in remedies if remedy)
        rest = f"move away what it holds and choose another [stream] name, or remove it: nats stream rm {config.name}"
        raise OtherStream(
            f"the stream {config.name} was set up in a way that keeps no log: {'; '.join(harmful)}",
            commands if all(remedies) else f"{commands}, then: {rest}" if commands else rest,
        )
    harmless = []
    for field, option in TELLS.items():
        want, have = asked.get(field, ABSENT.get(field)), found.get(field, ABSENT.get(field))
        if want == have or (field in ("max_bytes", "max_msgs", "max_consumers") and max(want or 0, have or 0) <= 0):
            continue
        shown = f"{(want or 0) / 1e9:g}s" if field in ("max_age", "duplicate_window") else want
        command = f"nats stream edit {config.name} {option.format(shown)}" if option else "it cannot be set back"
        harmless.append(Drift(field, have, want, command))
    return harmless
