"""Deliveries read from the connection in one go: nats-py's own way costs more than everything that is made of them.

The library reads a message with a regular expression for each kind of frame, a dictionary of headers, a queue and a
task; that is right for requests, and too much for a hundred thousand deliveries. `Intake` stands in the place of a
client's parser: frames of the subscriptions that it was told of become `Message` objects at once and go to their taker,
in the order of the wire; all others are passed on to the library's parser, each whole, so that it never sees a part of
a frame of ours.

Source: NATS client protocol, `HMSG <subject> <sid> [reply-to] <#header bytes> <#total bytes>`; JetStream's reply
subjects `$JS.ACK.…` (ADR-15), with nine fields or, with a domain, eleven and more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.errors import ProtocolError
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

from bridge.event import HEADER_EPOCH, HEADER_LAST, HEADER_OP, HEADER_POSITION

# Where there is no reply, a server may leave two spaces in its place.
_HMSG = re.compile(rb"HMSG[ \t]+(\S+)[ \t]+(\d+)[ \t]+(?:(\S+)[ \t]+)?(\d+)[ \t]+(\d+)\r\n")
_MSG = re.compile(rb"MSG[ \t]+(\S+)[ \t]+(\d+)[ \t]+(?:(\S+)[ \t]+)?()(\d+)\r\n")
_BLOCK = re.compile(
    rb"\r\n%s: ?(\w+)\r\n%s: ?([0-9a-f-]+)\r\n%s: ?(\d{1,18})\r\n"
    % (HEADER_OP.encode(), HEADER_POSITION.encode(), HEADER_EPOCH.encode())
)
_LAST = b"\r\n%s:" % HEADER_LAST.encode()
_ACK = b"$JS.ACK."
_PLAIN_FIELDS = 9
LONGEST_NUMBER = 18


class Message(msgspec.Struct, gc=False):
    """One stored event as a reader sees it.

    `at` is the stream's time in nanoseconds since 1970, `pending` how many messages the consumer still had after this
    one, `delivery` the consumer's own count, which goes up by one from message to message.
    """

    seq: int
    subject: str
    op: str
    epoch: int
    position: str
    last: bool
    data: bytes
    at: int
    pending: int
    delivery: int
    reply: str


class Status(msgspec.Struct):
    """What a server says of a pull request instead of a message."""

    headers: dict[str, str]


class Plain(msgspec.Struct, frozen=True):
    """A message that is no delivery, of whoever may publish: its header block is left alone."""

    subject: bytes
    reply: bytes
    data: bytes


Taker = Callable[[Message | Status], None]


def parse_headers(block: bytes) -> dict[str, str]:
    """Header names and values of a raw `NATS/1.0` block; an empty block has none. What is no UTF-8 is replaced.

    The description of a status stands behind it in the first line.
    """
    found = {}
    first, *lines = block.split(b"\r\n")
    status, _, description = first.partition(b" ")[2].strip().partition(b" ")
    if status:
        found["Status"] = status.decode(errors="replace")
        found["Description"] = description.strip().decode(errors="replace")
    for line in lines:
        name, colon, value = line.partition(b":")
        if colon:
            found[name.decode(errors="replace")] = value.strip().decode(errors="replace")
    return found


def message(subject: str, reply: str, block: bytes, data: bytes) -> Message | Status:
    """A delivery, or the server's word on a request.

    Args:
        block: the raw header block, empty where the message has none.
    """
    if not reply.startswith("$JS.ACK."):
        return Status(parse_headers(block))
    fields = reply.split(".")
    shift = 0 if len(fields) == _PLAIN_FIELDS else 2
    try:
        seq, delivery, at, pending = map(int, fields[shift + 5 : shift + 9])
    except ValueError:
        # No server's: somebody who may publish to this inbox has made it up.
        return Status({})
    found = _BLOCK.search(block)
    if found is not None:
        op, position, epoch = found[1].decode(), found[2].decode(), int(found[3])
        last = _LAST in block
    else:
        headers = parse_headers(block)
        op, position = headers.get(HEADER_OP, ""), headers.get(HEADER_POSITION, "")
        epoch, last = number(headers.get(HEADER_EPOCH, "")), HEADER_LAST in headers
    return Message(seq, subject, op, epoch, position, last, data, at, pending, delivery, reply)


def number(text: str) -> int:
    """The number that a header says, 0 where a stranger has put something else there."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER else 0


class Intake(Parser):
    """A client's parser that knows takers."""

    def __init__(self, client: Client) -> None:
        self._takers: dict[bytes, Taker] = {}
        self._plain: dict[bytes, Callable[[Plain], None]] = {}
        self._rest = bytearray()
        self._need = 0
        super().__init__(client)

    def reset(self) -> None:
        """Forget what was read of a connection that is gone."""
        super().reset()
        self._rest, self._need = bytearray(), 0

    def hand(self, sid: int, taker: Taker) -> None:
        """Give the frames of a subscription to `taker`."""
        self._takers[b"%d" % sid] = taker

    def hand_plain(self, sid: int, taker: Callable[[Plain], None]) -> None:
        """Give the frames of a subscription to `taker` as they are: strangers' headers break the library's reading."""
        self._plain[b"%d" % sid] = taker

    def keep(self, sid: int) -> None:
        """Give the frames of a subscription to the library again."""
        self._takers.pop(b"%d" % sid, None)
        self._plain.pop(b"%d" % sid, None)

    async def parse(self, data: bytes = b"") -> None:
        """Take what has arrived: any number of frames, the last of them perhaps not whole yet."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._need:
                return
            data, self._rest, self._need = bytes(self._rest), bytearray(), 0
        elif self.buf:
            data, self.buf = bytes(self.buf) + data, bytearray()
        at, end = 0, len(data)
        while at < end:
            frame = _HMSG.match(data, at) or _MSG.match(data, at)
            if frame is None:
                line = data.find(b"\r\n", at)
                if line < 0:
                    break
                after = line + 2
                await self._pass(data[at:after])
            else:
                after = frame.end() + int(frame[5]) + 2
                if after > end:
                    self._need = after - at
                    break
                taker = self._takers.get(frame[2])
                if taker is None:
                    plain = self._plain.get(frame[2])
                    if plain is None:
                        await self._pass(data[at:after])
                    else:
                        body = frame.end() + int(frame[4] or 0)
                        plain(Plain(frame[1], frame[3] or b"", data[body : after - 2]))
                else:
                    block = frame.end() + int(frame[4] or 0)
                    if block > after - 2:
                        raise ProtocolError(f"nats: a frame of {after - at} bytes has a longer header")
                    taker(
                        message(
                            frame[1].decode(errors="replace"),
                            (frame[3] or b"").decode(errors="replace"),
                            data[frame.end() : block],
                            data[block : after - 2],
                        )
                    )
            at = after
        if at < end:
            self._rest += data[at:]

    async def _pass(self, frame: bytes) -> None:
        """One whole frame to the library; what it cannot understand it says in its own way.

        Raises:
            ProtocolError: the library has read the frame in another way than we have. That ends the connection: going
                on would give a taker's frames to somebody else.
        """
        try:
            await super().parse(frame)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"nats: a frame of {len(frame)} bytes cannot be read") from error
        if self.state != AWAITING_CONTROL_LINE or self.buf:
            raise ProtocolError(f"nats: a frame of {len(frame)} bytes is not whole")


def intake(client: Client) -> Intake:
    """The intake of a connection; it is put there when it is first asked for, while nothing waits in the parser."""
    holder: Any = client
    if not isinstance(holder._ps, Intake):
        holder._ps = Intake(client)
    found: Intake = holder._ps
    return found
