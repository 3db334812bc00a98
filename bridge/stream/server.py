"""One connection to NATS and the JetStream API over it; the only module that connects, asks and translates its errors.

A connection lives until it breaks, and is never mended underneath its users: what sat in a client's buffer could go out
twice or out of order after a reconnect. Whoever holds a broken `Broker` gets `Unavailable`, reads the stream's state
again over a new one and goes on from there.

Of several servers any one will do that has a way to JetStream's leader: each is tried in turn, in an order of its own
for each connection. While servers elect a leader a request may get no answer at all: what changes nothing is asked
again, with time-outs that begin short.

Source: NATS client protocol; JetStream API subjects `$JS.API.>` (ADR-1, ADR-31), atomic batches (ADR-50).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import re
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio
import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from bridge import log
from bridge.config import Stream, hide
from bridge.errors import BridgeError, ServerRefused, Unavailable
from bridge.stream.answer import ApiError as ApiError
from bridge.stream.answer import Stored as Stored
from bridge.stream.answer import StreamState as StreamState
from bridge.stream.answer import decoded, stored, stream_state
from bridge.stream.intake import intake
from bridge.stream.login import login
from bridge.waiting import patiently

API = "$JS.API"
REQUEST_TIMEOUT = 3.0
FIRST_TIMEOUT = 1.0
PATIENCE = 10.0
SUBJECTS_PAGE = 100_000
CONNECT_TIMEOUT = 5
CLOSE_SECONDS = 3.0
OLDEST_SERVER = (2, 12)

NOT_FOUND_STREAM = 10059
NOT_FOUND_MESSAGE = 10037
NOT_FOUND_CONSUMER = 10014
IN_USE_BY_OTHER = (10058, 10065)


Servers = Sequence[str] | Callable[[], Sequence[str]]
"""URLs of NATS servers, or who tells them: an embedded server may come back at another port."""


class Broker:
    """A connected client. `closed` is set once the connection is gone; it does not come back."""

    def __init__(self, client: Client, where: str) -> None:
        self.nc = client
        self.where = where
        self.closed = asyncio.Event()
        self.violation = ""

    @property
    def max_payload(self) -> int:
        """The largest message, headers included, that the server takes, in bytes."""
        return self.nc.max_payload

    @property
    def version(self) -> tuple[int, int]:
        """The server's version, major and minor."""
        found = re.match(r"(\d+)\.(\d+)", str(self.nc._server_info.get("version", "")))
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def lost(self) -> Unavailable:
        """The error for a connection that is gone."""
        return Unavailable(f"the connection to NATS at {self.where} is lost", "waiting for it to come back")

    def refusal(self) -> ServerRefused:
        """The error for a subject that this user may not use."""
        return ServerRefused(
            f"NATS at {self.where} refuses: {self.violation}",
            "grant this user the permissions that nats-server.conf lists",
        )

    def write(self, commands: bytes) -> None:
        """Hand whole protocol commands to the connection; on one that is gone nothing happens but what `watch` says."""
        transport = self.nc._transport
        if transport is None or self.closed.is_set():
            return
        try:
            transport.write(commands)
        except (RuntimeError, OSError):
            # The transport is closed, and the client has not noticed yet.
            self.closed.set()

    async def watch(self) -> None:
        """Return only by raising `Unavailable` when the connection is gone."""
        await self.closed.wait()
        raise self.lost()

    async def request(
        self,
        subject: str,
        body: bytes = b"",
        *,
        seconds: float = REQUEST_TIMEOUT,
        headers: dict[str, str] | None = None,
    ) -> Msg:
        """The answer to a request.

        Raises:
            Unavailable: no answer within `seconds`, or the connection broke.
            ServerRefused: this user may not publish there.
        """
        if self.closed.is_set():
            raise self.lost()
        try:
            return await self.nc.request(subject, body, timeout=seconds, headers=headers)
        except nats.errors.NoRespondersError:
            if not self.nc._server_info.get("jetstream"):
                raise ServerRefused(
                    f"the NATS server at {self.where} runs without JetStream",
                    "start it with a jetstream block in its configuration, such as the shipped nats-server.conf",
                ) from None
            raise Unavailable(f"nobody answers {subject} at {self.where}", "waiting for JetStream") from None
        except (nats.errors.Error, TimeoutError, OSError, RuntimeError) as error:
            # RuntimeError: the transport is closed, and the client has not noticed yet.
            if self.violation:
                raise self.refusal() from None
            raise Unavailable(
                f"NATS at {self.where} does not answer {subject} ({_why(error)})", "waiting for it"
            ) from None

    async def api(self, verb: str, body: dict[str, Any] | None = None, *, seconds: float = REQUEST_TIMEOUT) -> Any:
        """The decoded answer of `$JS.API.{verb}`; ApiError where it is an error."""
        answer = await self.request(f"{API}.{verb}", msgspec.json.encode(body) if body else b"", seconds=seconds)
        return decoded(answer.data, verb, self.where)

    async def look(self, verb: str, body: dict[str, Any] | None = None) -> Any:
        """As `api`, for what changes nothing: asked again for `PATIENCE` seconds, as long as the connection stands."""
        seconds = FIRST_TIMEOUT

        async def ask() -> Any:
            nonlocal seconds
            timeout, seconds = seconds, min(seconds * 2, REQUEST_TIMEOUT)
            return await self.api(verb, body, seconds=timeout)

        return await patiently(ask, seconds=PATIENCE, hopeless=lambda _: self.closed.is_set())

    async def stream(self, name: str) -> StreamState | None:
        """The stream's state, None where there is no such stream."""
        try:
            found = await self.look(f"STREAM.INFO.{name}")
        except ApiError as error:
            if error.code == NOT_FOUND_STREAM:
                return None
            raise
        return stream_state(found, name, self.where)

    async def subjects(self, stream: str, matching: str) -> dict[str, int]:
        """How many messages the stream has on each of the subjects that match, all by its leader's own count."""
        found: dict[str, int] = {}
        while True:
            wanted = {"subjects_filter": matching, "offset": len(found)}
            page = (await self.look(f"STREAM.INFO.{stream}", wanted))["state"].get("subjects") or {}
            found |= page
            if len(page) < SUBJECTS_PAGE:
                return found

    async def message(self, stream: str, **which: Any) -> Stored | None:
        """One stored message: `seq=5`, `last_by_subj="cdc.>"`, or `next_by_subj=…` with `seq`; None if there is none.

        Asks the stream's leader, so that what it answers includes everything that was acked.
        """
        try:
            found = await self.look(f"STREAM.MSG.GET.{stream}", which)
        except ApiError as error:
            if error.code == NOT_FOUND_MESSAGE:
                return None
            raise
        return stored(found, self.where)


@contextlib.asynccontextmanager
async def connect(config: Stream, servers: Servers, *, name: str = "bridge") -> AsyncIterator[Broker]:
    """A connection to one of `servers`, closed at the end; who does not know them yet is asked at each connection.

    Raises:
        Unavailable: none can be reached now, or none has a way to JetStream's leader.
        ServerRefused: wrong credentials, a certificate that does not fit, or a server older than 2.12.
    """
    urls = list(servers() if callable(servers) else servers)
    broker = await _first(config, urls, name)
    try:
        yield broker
    finally:
        await _close(broker.nc)


async def _first(config: Stream, urls: list[str], name: str) -> Broker:
    """A connection to the first server that answers, and behind which JetStream answers."""
    failed: dict[str, Unavailable] = {}
    for url in random.sample(urls, len(urls)):
        try:
            broker = await _attach(config, url, name)
        except Unavailable as error:
            failed[url] = error
            continue
        try:
            if len(urls) > 1:
                # One that is cut off from the others takes connections all the same.
                await broker.api("INFO")
            return broker
        except BaseException as error:
            await _close(broker.nc)
            if not isinstance(error, Unavailable):
                raise
            failed[url] = error
    # Always the same one's, so that the same outage is not announced again in other words.
    first = failed[urls[0]]
    if len(failed) > 1:
        where = ", ".join(hide(url) for url in urls)
        raise Unavailable(f"none of the NATS servers {where} can be used: {first.what}", first.remedy)
    raise first


OPTIONS: dict[str, Any] = {
    "allow_reconnect": False,
    # Without these two the client's own first connect tries 60 times, for two minutes, without a word.
    "max_reconnect_attempts": 1,
    "reconnect_time_wait": 0,
    "connect_timeout": CONNECT_TIMEOUT,
    "ping_interval": 10,
    "max_outstanding_pings": 2,
    "pending_size": 64 << 20,
}


async def _attach(config: Stream, url: str, name: str) -> Broker:
    secure = bool(config.tls.ca or config.tls.cert) or url.startswith("tls://")
    where, client = hide(url), _Secure() if secure else _Plain()
    broker = Broker(client, where)

    async def closed() -> None:
        broker.closed.set()

    async def failed(error: Exception) -> None:
        if "permissions violation" in str(error).lower():
            broker.violation = str(error).removeprefix("nats: ")
        if isinstance(error, (ssl.SSLError, _NoTls)):
            final.append(error)
            connecting.cancel()
        if not isinstance(error, nats.errors.NoServersError):
            seen.append(error)
        log.get().debug("nats", error=type(error).__name__, where=where)

    # What the client ends with says only that it has tried enough.
    seen: deque[Exception] = deque(maxlen=1)
    # The client would try again, or wait for ever for a socket to close that TLS has given up.
    final: list[Exception] = []
    try:
        with anyio.CancelScope() as connecting:
            await client.connect([url], name=name, closed_cb=closed, error_cb=failed, **OPTIONS, **login(config))
        if final:
            raise final[0]
        _tell_end(client, broker)
        # Here nothing of a frame waits in the client's own parser yet.
        intake(client)
        if broker.version < OLDEST_SERVER:
            raise ServerRefused(
                f"the NATS server at {where} is version {'.'.join(map(str, broker.version))}; 2.12 or newer is needed",
                "upgrade nats-server (atomic batches came with 2.12)",
            )
    except BaseException as error:
        # Also where it is cancelled: the client leaves a connection that was not ready yet open.
        await _close(client)
        # RuntimeError: the transport was closed while the client wrote to it.
        if not isinstance(error, (nats.errors.Error, TimeoutError, OSError, EOFError, RuntimeError)):
            raise
        # A server that does not like a certificate says so on a connection that may be reset before.
        told = seen[0] if seen and isinstance(error, nats.errors.NoServersError) else error
        raise _refusal(final[0] if final else error, where, _why(told)) from None
    return broker


class _NoTls(nats.errors.Error):
    """The server asks for no TLS."""


class _Plain(Client):
    """A client that outlives the answer to a flush that was given up: the library gives that to whoever waited, and
    ends the connection where nobody does."""

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()


class _Secure(_Plain):
    """A client that says nothing without TLS: the library's logs in without, where a server, or who stands between,
    does not ask for it."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if info.get("tls_available"):
            info["tls_required"] = True
        await super()._process_info(info, initial_connection=initial_connection)

    def _connect_command(self) -> bytes:
        if not self._server_info.get("tls_required"):
            raise _NoTls
        return super()._connect_command()


def _tell_end(client: Client, broker: Broker) -> None:
    """Have the broker closed as soon as one of the client's own tasks ends: the connection is dead without any of them.

    The client's way of closing writes what it still has pending first; where the socket is closed already that fails,
    and nobody is told.
    """

    def ended(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.get().debug("nats", error=type(error).__name__, where=broker.where)
        broker.closed.set()

    for task in (client._reading_task, client._flusher_task, client._ping_interval_task):
        if task is not None:
            task.add_done_callback(ended)


async def _close(client: Client) -> None:
    # After a failed TLS handshake the client would wait for ever for its socket to be closed.
    with anyio.move_on_after(CLOSE_SECONDS, shield=True), contextlib.suppress(Exception):
        await client.close()
    # Left where the client gave up half-way.
    for subscription in client._subs.values():
        if subscription._wait_for_msgs_task is not None:
            subscription._wait_for_msgs_task.cancel()
    transport: Any = client._transport
    if transport is not None:
        transport.close()


def _refusal(error: BaseException, where: str, why: str) -> BridgeError:
    text = str(error).lower()
    if isinstance(error, _NoTls):
        return ServerRefused(
            f"NATS at {where} asks for no TLS, so that nothing shows who it is; nothing was sent to it",
            "give the server a tls block, or remove tls from [stream] and write nats:// in servers",
        )
    if isinstance(error, nats.errors.AuthorizationError) or "authorization" in text or "authentication" in text:
        return ServerRefused(
            f"NATS at {where} refuses the login", "check user, password, token or credentials in [stream]"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        # X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED
        late = error.verify_code in (9, 10)
        return ServerRefused(
            f"TLS with NATS at {where} fails: the server's certificate is refused ({error.verify_message})",
            "give the server a new certificate, or set this machine's clock"
            if late
            else "check ca in [stream] tls and the server's name",
        )
    if isinstance(error, ssl.SSLError):
        return ServerRefused(
            f"TLS with NATS at {where} fails: {error.reason}", "check [stream] tls and the server's name"
        )
    return Unavailable(f"NATS at {where} cannot be reached ({why})", "waiting for it to come up")


def _why(error: BaseException) -> str:
    """What has happened to a connection, in a few words that say nothing of what was on it."""
    match error:
        # Where a name has several addresses one error stands for all, and has no number.
        case OSError() if error.errno == errno.ECONNREFUSED or f"[Errno {errno.ECONNREFUSED}]" in str(error):
            return "connection refused"
        case TimeoutError():
            return "no answer in time"
        case socket.gaierror():
            return "there is no such host"
        case EOFError() | ConnectionResetError() | BrokenPipeError() | nats.errors.UnexpectedEOF():
            return "the connection was closed"
        case OSError() if error.errno is not None:
            return os.strerror(error.errno).lower()
        case nats.errors.Error() if "info message" in str(error).lower():
            return "who answers there does not speak NATS"
    return type(error).__name__
