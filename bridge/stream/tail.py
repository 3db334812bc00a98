"""The stream's end: what it says of who wrote last and how far, and what that means for what is on its way.

Source: JetStream API, `$JS.API.STREAM.INFO` and `$JS.API.STREAM.MSG.GET`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from bridge import event
from bridge.errors import Fenced, ForeignWriter, StreamGone, Unavailable
from bridge.stream.batch import Item
from bridge.stream.server import Broker, Stored


class Tail(NamedTuple):
    """The stream's end: the last sequence given out, and what its last message says (empty and 0 where there is none).

    at: the last message's own sequence, where it is not `seq`: the messages after it were removed; whole: whether that
    message ends its transaction.
    """

    seq: int
    position: str
    epoch: int
    at: int | None = None
    whole: bool = True


def settle(acked: Tail, tail: Tail, items: list[Item], epoch: int, stream: str) -> list[Item]:
    """The items that the stream, ending at `tail`, does not have yet; it had `acked` and was sent `items` after it.

    Raises:
        Fenced: a newer epoch wrote there. ForeignWriter: something without an epoch did.
        StreamChanged: the stream is shorter than what was acked, or a predecessor's last messages came in late.
    """
    if tail.epoch > epoch:
        raise Fenced(
            f"a newer bridge (epoch {tail.epoch}) writes to the stream {stream}; this one has epoch {epoch}",
            "this one has stopped; run only one bridge per source",
        )
    if tail.seq == acked.seq:
        return items
    if tail.seq > acked.seq and not tail.position:
        raise ForeignWriter(
            f"something that is no bridge published to {stream} at sequence {tail.seq}",
            "find and stop it (`nats stream get`), and let only the bridge publish to the stream's subjects",
        )
    if tail.seq < acked.seq:
        raise StreamChanged(
            f"the stream {stream} ends at sequence {tail.seq}, the broker had acked {acked.seq}",
            "continuing from what is left",
        )
    position = tail.position.encode()
    rest = [item for item in items if item.position > position]
    if len(items) - len(rest) != tail.seq - acked.seq:
        # What a killed bridge, or this one's last connection, had sent was still on its way when the tail was read.
        raise StreamChanged(
            f"the stream {stream} ends at sequence {tail.seq} with position {tail.position}, which does not continue "
            f"sequence {acked.seq}",
            "reading its end again",
        )
    return rest


class StreamChanged(Unavailable):
    """The stream's end is not what the bridge has started from: recover as at a start, from what is there now."""


async def read_tail(broker: Broker, stream: str) -> Tail:
    """The stream's end now: the last sequence that was given out, and what the last message that is there says.

    Raises:
        Unavailable: no answer.
        StreamGone: there is no such stream any more.
    """
    state = await broker.stream(stream)
    if state is None:
        raise StreamGone(f"the stream {stream} is gone", "start the bridge again: it says what can be done")
    if state.last_seq == 0:
        return Tail(0, "", 0)
    found = await broker.message(stream, seq=state.last_seq)
    if found is None:
        # By the stream's own subjects: for a bare ">" the server finds nothing once the last message was removed.
        found = await broker.message(stream, last_by_subj=state.config["subjects"][0])
    return tail_of(found, state.last_seq)._replace(at=found.seq if found is not None else 0)


def tail_of(message: Stored | None, seq: int) -> Tail:
    """The tail that the last message stands for; without position and epoch if it was not written by a bridge."""
    if message is None:
        return Tail(seq, "", 0)
    epoch = message.headers.get(event.HEADER_EPOCH, "")
    position = message.headers.get(event.HEADER_POSITION, "")
    if re.fullmatch("[0-9]{1,18}", epoch) is None:
        return Tail(seq, "", 0)
    try:
        event.Position.parse(position)
        # What stands between transactions is in none.
        between = event.is_between(position)
    except ValueError:
        position, between = "", False
    return Tail(seq, position, int(epoch), whole=between or event.HEADER_LAST in message.headers)
