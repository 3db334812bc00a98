"""A NATS micro service: it is found, described and counted by `nats micro`, and answers requests to its endpoints.

Its own and not nats-py's, which answers to whatever reply subject a stranger names (the state bucket's, say), holds
128 MB of waiting requests for each subject, and tells callers the text of any exception. Here a request is refused
where it is too large, where too many wait, or where it has no inbox to be answered to; each has a deadline; and an
error answers with its text and remedy, or, where nobody expected it, with its kind and place alone.

Source: ADR-32, "Service API". A service's metadata never change: what has other ones is another service, with an id of
its own.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from nats.nuid import NUID

from bridge import log
from bridge.errors import EXIT_CONTRADICTION, EXIT_REFUSED, EXIT_USAGE, BridgeError, Unavailable, UsageError, unexpected
from bridge.stream.listening import Listener, Request, answer, listen
from bridge.stream.server import Broker
from bridge.structured import group

QUEUE = "q"
# The largest request in bytes, how many wait and how many are worked on at a time (of one endpoint), requests a second
# (of one subject), seconds until one is given up.
LARGEST = 64 << 10
WAITING = 16
AT_ONCE = 2
ALLOWED = 64
DEADLINE = 30.0
ERROR, CODE = "Nats-Service-Error", "Nats-Service-Error-Code"
LONGEST_ERROR = 1000

Handler = Callable[[bytes], Awaitable[bytes]]


class Endpoint(NamedTuple):
    """What answers to a subject: the request's body in, the answer's out; `about` says to people what it does."""

    name: str
    subject: str
    handler: Handler
    about: str = ""


class Identity(NamedTuple):
    """What discovery shows of the service."""

    name: str
    version: str
    description: str
    metadata: dict[str, str]


class Refused(BridgeError):
    """A request that is not taken, by a code of HTTP's."""

    def __init__(self, code: int, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.code = code


class _Stats(msgspec.Struct):
    """One endpoint's part of the answer to `$SRV.STATS`."""

    name: str
    subject: str
    queue_group: str = QUEUE
    num_requests: int = 0
    num_errors: int = 0
    last_error: str = ""
    processing_time: int = 0
    average_processing_time: int = 0


class _Served:
    """An endpoint with its queue and its figures."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.stats = _Stats(endpoint.name, endpoint.subject)
        streams = anyio.create_memory_object_stream[Request](WAITING)
        self.put: MemoryObjectSendStream[Request] = streams[0]
        self.get: MemoryObjectReceiveStream[Request] = streams[1]

    def failed(self, what: str) -> None:
        self.stats.num_errors += 1
        self.stats.last_error = what[:LONGEST_ERROR]


class Service:
    """Endpoints on one connection; `run` serves them."""

    def __init__(self, broker: Broker, identity: Identity, endpoints: Sequence[Endpoint]) -> None:
        self._broker = broker
        self._identity = identity
        self._served = [_Served(one) for one in endpoints]
        self.id = NUID().next().decode()
        self._started = datetime.now(UTC)

    async def run(self) -> None:
        """Serve until cancelled; what is being worked on then is answered with an error.

        Raises:
            ServerRefused: this user may not subscribe. Unavailable: the connection is lost.
        """
        listeners = [
            Listener(self._broker, one.endpoint.subject, self._taking(one), queue=QUEUE, allowed=ALLOWED)
            for one in self._served
        ]
        name = self._identity.name
        for verb, told in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            subjects = (f"$SRV.{verb}", f"$SRV.{verb}.{name}", f"$SRV.{verb}.{name}.{self.id}")
            listeners += [Listener(self._broker, one, self._telling(told), allowed=ALLOWED) for one in subjects]
        try:
            async with group() as tasks:
                tasks.start_soon(self._broker.watch)
                for one in self._served:
                    for _ in range(AT_ONCE):
                        tasks.start_soon(self._work, one)
                await listen(self._broker, listeners)
        finally:
            for one in self._served:
                one.put.close()
                one.get.close()

    # Discovery

    def _telling(self, told: Callable[[], dict[str, Any]]) -> Callable[[Request], None]:
        def take(request: Request) -> None:
            if request.reply:
                self._send(request.reply, msgspec.json.encode(told()))

        return take

    def _ping(self, kind: str = "ping") -> dict[str, Any]:
        about = self._identity
        return {
            "type": f"io.nats.micro.v1.{kind}_response", "name": about.name, "id": self.id, "version": about.version,
            "metadata": about.metadata,
        }  # fmt: skip

    def _info(self) -> dict[str, Any]:
        endpoints = [
            {"name": one.name, "subject": one.subject, "queue_group": QUEUE, "metadata": {"description": one.about}}
            for one in (served.endpoint for served in self._served)
        ]
        return {**self._ping("info"), "description": self._identity.description, "endpoints": endpoints}

    def _stats(self) -> dict[str, Any]:
        started = self._started.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {**self._ping("stats"), "started": started, "endpoints": [one.stats for one in self._served]}

    # Requests

    def _taking(self, served: _Served) -> Callable[[Request], None]:
        def take(request: Request) -> None:
            served.stats.num_requests += 1
            if not request.reply:
                served.failed("its reply subject is no inbox" if request.asked else "it has no reply subject")
            elif len(request.data) > LARGEST:
                what = f"the request has {len(request.data):,} bytes"
                self._refuse(served, request, Refused(413, what, f"{LARGEST:,} are taken at most"))
            else:
                try:
                    served.put.send_nowait(request)
                except anyio.WouldBlock:
                    error = Refused(429, f"{WAITING} requests wait for an answer already", "ask again later")
                    self._refuse(served, request, error)

        return take

    async def _work(self, served: _Served) -> None:
        async for request in served.get:
            began = time.perf_counter_ns()
            try:
                with anyio.fail_after(DEADLINE):
                    body = await served.endpoint.handler(request.data)
                self._send(request.reply, body)
            except BridgeError as error:
                self._refuse(served, request, error)
            except TimeoutError:
                self._refuse(served, request, Refused(504, f"no answer within {DEADLINE:g} s", "see `bridge status`"))
            except anyio.get_cancelled_exc_class():
                self._refuse(served, request, Refused(503, "the bridge stops, or changes its role", "ask again"))
                raise
            except Exception as error:  # noqa: BLE001 - whoever asks is told, and the next is served
                self._refuse(served, request, self._unexpected(served, error))
            finally:
                stats = served.stats
                stats.processing_time += time.perf_counter_ns() - began
                stats.average_processing_time = stats.processing_time // max(stats.num_requests, 1)

    def _unexpected(self, served: _Served, error: Exception) -> Refused:
        what = unexpected(error)
        log.get().error("request failed", endpoint=served.endpoint.name, why=what)
        return Refused(500, what, "this is a defect of bridge: report it with what was asked")

    def _refuse(self, served: _Served, request: Request, error: BridgeError) -> None:
        served.failed(error.what)
        text = f"{error.what} → {error.remedy}"[:LONGEST_ERROR]
        body = {"error": error.what, "next": error.remedy}
        self._send(request.reply, msgspec.json.encode(body), {ERROR: text, CODE: str(code_of(error))})

    def _send(self, reply: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        try:
            answer(self._broker, reply, body, headers)
        except ValueError:
            text = f"the answer has {len(body):,} bytes → raise the NATS server's max_payload"
            answer(self._broker, reply, b"", {ERROR: text, CODE: "507"})
        except Unavailable:
            pass  # `run` ends by the same


def code_of(error: BridgeError) -> int:
    """What `Nats-Service-Error-Code` says of an error, by the codes of HTTP."""
    if isinstance(error, Refused):
        return error.code
    if isinstance(error, Unavailable):
        return 503
    return {EXIT_USAGE: 400, EXIT_CONTRADICTION: 409, EXIT_REFUSED: 502}.get(error.exit_code, 500)


def decoded(kind: type[Any], data: bytes) -> Any:
    """A request's body as a struct of `kind`; nothing at all stands for `{}`.

    Raises:
        UsageError: it is no JSON, or has other fields.
    """
    try:
        return msgspec.json.decode(data if data.strip() else b"{}", type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        why = str(error)[:200] if isinstance(error, msgspec.MsgspecError) else "it is no JSON"
        known = ", ".join(field.name for field in msgspec.structs.fields(kind)) or "nothing"
        raise UsageError(f"the request cannot be read: {why}", f"send a JSON object; it may have: {known}") from None
