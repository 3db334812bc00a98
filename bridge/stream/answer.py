"""What JetStream answers, as values: its API, its acks of a publish, what its KV buckets and object stores keep. Pure.

Anybody who may publish to an inbox or a bucket can put something else there. What is no answer is as good as none; what
is no value of a key that the bridge wrote stops whoever needs it.

Source: JetStream API subjects (ADR-1), PubAck, `$JS.API.STREAM.MSG.GET` (ADR-31).
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, TypeVar

import msgspec

from bridge.errors import BadState, BridgeError, ServerRefused, Unavailable
from bridge.stream.intake import parse_headers

T = TypeVar("T")

NOT_ENABLED = (10039, 10076)
UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


class ApiError(BridgeError):
    """JetStream answered with an error; `code` is its err_code, which the caller may know how to answer."""

    def __init__(self, code: int, description: str, subject: str) -> None:
        super().__init__(
            f"JetStream refused {subject}: {description} (code {code})", "see the server's log for the reason"
        )
        self.code = code
        self.description = description
        self.exit_code = ServerRefused.exit_code


class Stored(msgspec.Struct, frozen=True):
    """One message as the stream keeps it; `at` is when it was stored, as the server writes times."""

    seq: int
    subject: str
    headers: dict[str, str]
    data: bytes
    at: str = ""


class StreamState(msgspec.Struct, frozen=True):
    """The state part of a stream's info; `created` is the stream's identity."""

    name: str
    created: str
    messages: int
    first_seq: int
    last_seq: int
    config: dict[str, Any]

    @property
    def compacted(self) -> bool:
        """Whether it was made to keep one message a subject, and tombstones for a time."""
        return self.config.get("max_msgs_per_subject") == 1 and bool(self.config.get("allow_msg_ttl"))


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Failed(msgspec.Struct):
    error: _Error | None = None


class _Counts(msgspec.Struct):
    messages: int
    first_seq: int
    last_seq: int


class _Info(msgspec.Struct):
    created: str
    state: _Counts
    config: dict[str, Any]


class _Message(msgspec.Struct):
    seq: int
    subject: str
    hdrs: str = ""
    data: str = ""
    time: str = ""


class _Got(msgspec.Struct):
    message: _Message


class Ack(msgspec.Struct):
    """The answer to a publish; without a sequence it was not stored, as far as anybody knows."""

    seq: int = 0
    error: dict[str, object] | None = None


_failed = msgspec.json.Decoder(_Failed)
_ack = msgspec.json.Decoder(Ack)


def decoded(data: bytes, verb: str, where: str) -> dict[str, Any]:
    """The answer of `$JS.API.{verb}` from the server at `where`.

    Raises:
        ApiError: it is an error.
        ServerRefused: JetStream is not enabled for the account.
        Unavailable: it is an error that passes, or no answer of JetStream's.
    """
    try:
        found: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        error = _failed.decode(data).error
    except UNREADABLE:
        raise _none(verb, where) from None
    if error is None:
        return found
    code = error.err_code or error.code
    if code in NOT_ENABLED:
        raise ServerRefused(
            f"JetStream is not enabled for this account at {where}",
            "enable JetStream for the account in the server's configuration",
        )
    if error.code == 503:
        raise Unavailable(f"JetStream at {where}: {error.description}", "waiting for it")
    raise ApiError(code, error.description, verb)


def stream_state(found: dict[str, Any], name: str, where: str) -> StreamState:
    """The state in the answer of STREAM.INFO; Unavailable where it has none."""
    try:
        info = msgspec.convert(found, _Info)
    except UNREADABLE:
        raise _none("STREAM.INFO", where) from None
    counts = info.state
    return StreamState(name, info.created, counts.messages, counts.first_seq, counts.last_seq, info.config)


def stored(found: dict[str, Any], where: str) -> Stored:
    """The message in the answer of STREAM.MSG.GET; Unavailable where it has none."""
    try:
        message = msgspec.convert(found, _Got).message
        headers, data = (base64.b64decode(part, validate=True) for part in (message.hdrs, message.data))
    except (*UNREADABLE, binascii.Error):
        raise _none("STREAM.MSG.GET", where) from None
    return Stored(message.seq, message.subject, parse_headers(headers), data, message.time)


def ack(data: bytes) -> Ack:
    """The ack of a publish; an empty one for whatever is none."""
    try:
        return _ack.decode(data)
    except UNREADABLE:
        return Ack()


def value(data: bytes, kind: type[T], where: str) -> T:
    """What the bridge has stored at `where`, a key of a bucket, say.

    Raises:
        BadState: something else is there.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE:
        raise BadState(
            f"{where} holds {len(data)} bytes that no bridge has written there",
            "find out who wrote them, and put the value before back: nats kv history shows it; only the bridge's user "
            "may publish to the bridge's buckets",
        ) from None


def _none(verb: str, where: str) -> Unavailable:
    return Unavailable(
        f"NATS at {where} answers {verb} with what is no answer of JetStream's",
        "asking again; if it stays, find out who else answers on $JS.API",
    )
