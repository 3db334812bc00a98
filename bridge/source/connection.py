"""Connections to PostgreSQL, with the settings that make its text the same everywhere.

`connect` opens one, `query` runs a simple-protocol command, `CopyReader` reads what a COPY or a replication sends.
Every failure becomes `Unavailable` (wait for it) or `ServerRefused` (a person must act); nothing else leaves here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import psycopg
from psycopg import conninfo, pq

from bridge.errors import BridgeError, ServerRefused, Unavailable
from bridge.source.patience import Patient, readable

CONNECT_TIMEOUT = 10
# After this many takes of less than SMALL bytes, each within BUSY_WITHIN seconds of the last, a reader pauses before it
# looks again: a few changes in a row are passed on at once, a steady stream of small ones a millisecond later.
BUSY_AFTER = 8
BUSY_WITHIN = 0.002
BUSY_PAUSE = 0.001
SMALL = 64 << 10
WALSENDER_TIMEOUT = "10min"
# A host that is gone without a word is noticed within half a minute: by the first three on an idle connection, by the
# last where bytes are on their way, as feedback always is.
TCP = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4, "tcp_user_timeout": 30_000}

SETTINGS = {
    "timezone": "UTC",
    "datestyle": "ISO",
    "intervalstyle": "iso_8601",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "lc_monetary": "C",
    "xmloption": "content",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}
# Only newer servers know these; an older one would refuse the connection over the unknown name.
LATER_SETTINGS = {140000: "idle_session_timeout", 170000: "transaction_timeout"}
# A refusal with one of these is a matter of time; with any other FATAL a person must act.
_PASSING = re.compile(
    r"starting up|shutting down|not yet accepting|recovery|too many|remaining connection slots|terminating connection",
    re.IGNORECASE,
)
# How PgBouncer refuses the settings that a connection begins with.
POOLER = "unsupported startup parameter"
# What libpq says where TLS cannot be had, of either side's files, certificates and settings.
_TLS = re.compile(
    r"(SSL error: (?!.*(unexpected eof|connection reset))|server certificate|root certificate|certificate file|"
    r"private key file|server does not support SSL|could not load).*",
    re.IGNORECASE,
)
# What libpq says of an option that it cannot read.
_MISTYPED = re.compile(r"invalid (?:integer value|port number|\w+ value|connection option).*", re.IGNORECASE)
PASSING_STATES = ("08", "53", "57")
# What a session is told that somebody has ended, and each one where the server stops; its SQLSTATE.
_ENDED, _ENDED_STATE, _CANCELLED_STATE = "terminating connection due to administrator command", "57P01", "57014"


@contextlib.asynccontextmanager
async def connect(dsn: str, *, replication: bool = False) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection in autocommit mode, closed at the end; with `replication` one that speaks the replication protocol.

    Its settings win over what the role, the database or the server sets; what the dsn says of TCP wins over `TCP`.

    Raises:
        Unavailable: the server cannot be reached, or is starting or stopping.
        ServerRefused: wrong password, database, role or connection string.
    """
    try:
        given = parameters(dsn, replication=replication)
        _refuse_misread(given)
        connection = await Patient.connect(**given, autocommit=True)
    except psycopg.ProgrammingError:
        raise ServerRefused(
            "[source] dsn is not a connection string", "write it as postgresql://user@host:5432/database"
        ) from None
    except (psycopg.Error, OSError) as error:
        raise refusal(error, "connecting") from None
    try:
        await _pin_later_settings(connection.pgconn)
        yield connection
    except psycopg.Error as error:
        raise refusal(error, "a query") from None
    finally:
        with anyio.CancelScope(shield=True), contextlib.suppress(psycopg.Error, OSError):
            await connection.close()


def _refuse_misread(given: dict[str, Any]) -> None:
    """Return where no part of a password has been taken for a host or a database; what libpq says shows it.

    Raises:
        ServerRefused: one has.
    """
    if "@" in str(given.get("host", "")) or ("@" in str(given.get("dbname", "")) and "user" not in given):
        raise ServerRefused(
            "[source] dsn cannot be used: what stands before its host is not one user and password",
            "write @ : / # and % within user or password as %40 %3A %2F %23 and %25",
        )


async def _pin_later_settings(pgconn: pq.abc.PGconn) -> None:
    for version, name in LATER_SETTINGS.items():
        if pgconn.server_version >= version:
            try:
                await query(pgconn, f"SET {name} = 0")
            except CommandError as error:
                raise server_error(error.sqlstate, error.message, f"SET {name}") from None


def parameters(dsn: str, *, replication: bool = False) -> dict[str, Any]:
    """What libpq is given for a connection; psycopg.ProgrammingError where `dsn` is no connection string."""
    found: dict[str, Any] = TCP | {"connect_timeout": CONNECT_TIMEOUT, "application_name": "bridge"}
    found |= {name: value for name, value in conninfo.conninfo_to_dict(dsn).items() if value not in (None, "")}
    if _trusts(found):
        found["sslmode"] = "verify-full"
    settings = SETTINGS | ({"wal_sender_timeout": WALSENDER_TIMEOUT} if replication else {"row_security": "off"})
    pinned = (f"-c {name}={value}" for name, value in settings.items())
    found["options"] = " ".join([found.get("options", ""), *pinned]).strip()
    found["client_encoding"] = "UTF8"
    return found | ({"replication": "database"} if replication else {})


def _trusts(given: dict[str, Any]) -> bool:
    """Whether an authority is named and nothing says what for: libpq by itself would go on without TLS."""
    elsewhere = any(os.environ.get(name) for name in ("PGSSLMODE", "PGSERVICE")) or "service" in given
    authority = given.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
    return bool(authority) and "sslmode" not in given and not elsewhere


def refusal(error: Exception, doing: str) -> BridgeError:
    """What an error of libpq or of the server means: `Unavailable`, or `ServerRefused` with the remedy."""
    state = getattr(error, "sqlstate", None) or ""
    message = re.sub(r"\s+", " ", str(error)).strip()
    message = re.sub(r"password=\S+", "password=***", message)
    if not state:
        if (secure := _TLS.search(message)) is not None:
            remedy = (
                "check sslmode, sslrootcert, sslcert, sslkey and the host's name in [source] dsn, and ssl in "
                "postgresql.conf"
            )
            if "verify failed" in secure[0]:
                # libpq knows why, and does not say it.
                remedy = (
                    "the server's certificate has expired, or another authority than sslrootcert in [source] dsn has "
                    "signed it: `openssl s_client -starttls postgres -connect HOST:PORT` shows it"
                )
            return ServerRefused(f"TLS with PostgreSQL fails: {secure[0][:300]}", remedy)
        if (mistyped := _MISTYPED.search(message)) is not None:
            return ServerRefused(f"[source] dsn cannot be used: {mistyped[0][:200]}", "correct that option of the dsn")
        if "no password supplied" in message:
            return ServerRefused(
                "PostgreSQL asks for a password, and there is none",
                "give one: in [source] dsn, with dsn_file, in the variable PGPASSWORD, or in ~/.pgpass",
            )
        if _ENDED in message:
            return away(_ENDED_STATE, _ENDED, doing)
        fatal = re.search(r"FATAL:\s*(.*)", message)
        if fatal is None or _PASSING.search(fatal[1]):
            reason = fatal[1] if fatal else message.rsplit("failed: ", 1)[-1].split(" Is the server")[0]
            return Unavailable(f"PostgreSQL is away ({reason[:200]})", "waiting for it to come back")
        return ServerRefused(f"PostgreSQL refuses the connection: {fatal[1][:300]}", _admission(fatal[1]))
    if state.startswith(PASSING_STATES):
        return away(state, message, doing)
    return server_error(state, message.split(" DETAIL")[0], doing)


def away(state: str, message: str, doing: str) -> Unavailable:
    """A server's error that passes by itself: not each says that the server is away."""
    told = f"{message[:200]}, SQLSTATE {state}"
    if state == _ENDED_STATE:
        return Unavailable(
            f"PostgreSQL has ended a session of the bridge ({told})",
            "connecting again: somebody has ended that session (pg_terminate_backend), or the server stops",
        )
    if state == _CANCELLED_STATE:
        return Unavailable(
            f"PostgreSQL has cancelled {doing} ({told})",
            "trying again: somebody has cancelled it (pg_cancel_backend), or a time limit did",
        )
    return Unavailable(f"PostgreSQL is away ({told})", "waiting for it to come back")


def _admission(message: str) -> str:
    """What lets the bridge in, where a server says why it does not."""
    if POOLER in message:
        return (
            "a pooler answers there, and the bridge needs the server itself: give its own host and port in [source] dsn"
        )
    if "not permitted to log in" in message:
        return "as a superuser: ALTER ROLE … LOGIN for the role in [source] dsn"
    if "permission denied for database" in message:
        return "as its owner: GRANT CONNECT ON DATABASE … TO the role in [source] dsn"
    return "check user, password and database in [source] dsn, and pg_hba.conf on the server"


def server_error(state: str, message: str, doing: str) -> BridgeError:
    """A server's error with the remedy for the ones that are known; `Unavailable` where the server is stopping."""
    if state.startswith(("08", "57")):
        return away(state, message, doing)
    remedy = "read the server's log for the reason"
    if "may not be used as an output plugin" in message:
        remedy = (
            "allow the plugin: ALTER SYSTEM SET output_plugin_libraries = pgoutput, test_decoding, wal2json; "
            "SELECT pg_reload_conf()"
        )
    elif state == "58P01":
        remedy = "install wal2json on the database server: apt-get install postgresql-NN-wal2json (NN: its version)"
    elif "row-level security" in message:
        remedy = "let the role read every row: ALTER ROLE … BYPASSRLS, or leave the table out of [source] tables"
    elif state == "42501":
        remedy = "grant what is missing: ALTER ROLE … REPLICATION, GRANT SELECT ON ALL TABLES IN SCHEMA … TO …"
    elif state in ("53400", "53300"):
        remedy = "raise max_replication_slots and max_wal_senders, or drop an unused slot (pg_replication_slots)"
    elif state == "55000" and "wal_level" in message:
        remedy = "ALTER SYSTEM SET wal_level = logical; then restart PostgreSQL"
    return ServerRefused(f"PostgreSQL refuses {doing}: {message[:300]} (SQLSTATE {state})", remedy)


class CommandError(Exception):
    """The server answered a replication command with an error; `sqlstate` tells which."""

    def __init__(self, sqlstate: str, message: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.message = message


async def query(pgconn: pq.abc.PGconn, sql: str) -> list[dict[str, str | None]]:
    """The rows of a simple-protocol command, the only kind that a replication connection takes.

    Raises:
        CommandError: the server answered with an error.
        Unavailable: the connection is gone.
    """
    results = await command(pgconn, sql.encode())
    for result in results:
        check(pgconn, result)
    last = results[-1]
    names = [(last.fname(i) or b"").decode() for i in range(last.nfields)]
    return [
        {name: (None if (v := last.get_value(row, i)) is None else v.decode()) for i, name in enumerate(names)}
        for row in range(last.ntuples)
    ]


def check(pgconn: pq.abc.PGconn, result: pq.abc.PGresult) -> None:
    """Raise what a result says: CommandError for the server's error, Unavailable for a connection that is gone."""
    if result.status in (pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.BAD_RESPONSE):
        state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        message = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode(errors="replace")
        if state == _ENDED_STATE:
            raise away(state, message, "a command")
        if not state or pgconn.status != pq.ConnStatus.OK:
            raise Unavailable(f"PostgreSQL closed the connection ({message or 'no reason given'})", "waiting for it")
        raise CommandError(state, message)


async def command(pgconn: pq.abc.PGconn, sql: bytes, *, single: bool = False) -> list[pq.abc.PGresult]:
    """Send a command and return its results; one that begins a COPY ends the list.

    single: where it holds more than one statement, the server refuses it as a whole.
    """
    try:
        if single:
            pgconn.send_query_params(sql, None)
        else:
            pgconn.send_query(sql)
        await flush(pgconn)
        found: list[pq.abc.PGresult] = []
        while True:
            while pgconn.is_busy():
                await readable(pgconn, "a command")
                pgconn.consume_input()
            result = pgconn.get_result()
            if result is None:
                return found
            found.append(result)
            if result.status in (pq.ExecStatus.COPY_BOTH, pq.ExecStatus.COPY_OUT):
                return found
    except (psycopg.Error, OSError) as error:
        raise refusal(error, "a command") from None


async def flush(pgconn: pq.abc.PGconn) -> None:
    """Send what libpq still holds; reads meanwhile, or both sides could wait for each other."""
    while pgconn.flush():
        async with anyio.create_task_group() as both:

            async def ready(wait: Callable[[int], Any]) -> None:
                await wait(pgconn.socket)
                both.cancel_scope.cancel()

            both.start_soon(ready, anyio.wait_writable)
            both.start_soon(ready, anyio.wait_readable)
        pgconn.consume_input()


class Notice(str):
    """A notice or warning of the server, at its place between a COPY's messages."""

    __slots__ = ()


class CopyReader:
    """Everything that a COPY sends, in order, taken from the socket as it comes and bounded in bytes.

    The socket is registered with the event loop once: adding and removing it around each wait costs more than decoding
    a row. It is taken out only while more than `limit` bytes wait to be taken, and for a moment when many small
    messages come one by one: a server that writes each on its own would wake us for each.
    """

    def __init__(
        self,
        pgconn: pq.abc.PGconn,
        *,
        limit: int = 1 << 20,
        notices: Callable[[Callable[[Any], None]], None] | None = None,
    ) -> None:
        """`notices` registers a handler for the server's notices; those of the first bytes are already in the order."""
        self._pgconn = pgconn
        # libpq closes the socket as soon as it fails and then does not tell its number any more.
        self._socket = pgconn.socket
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._frames: list[memoryview | Notice] = []
        self._bytes = 0
        self._heard = self._loop.time()
        self._ready = asyncio.Event()
        self._reading = False
        self._error: BridgeError | None = None
        self._taken = 0.0
        self._small = 0
        self.ended = False
        if notices is not None:
            notices(lambda diagnostic: self._note(diagnostic.message_primary or ""))
        self._resume()
        # What came with the COPY's first answer is taken before more is read: libpq doubles its buffer whenever it is
        # asked to read into one that is full, and never makes it smaller.
        self._readable(behind=True)

    def _resume(self) -> None:
        if not self._reading and not self.ended:
            self._heard = self._loop.time()
            self._loop.add_reader(self._socket, self._readable)
            self._reading = True

    def _pause(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._socket)
            self._reading = False

    def _readable(self, *, behind: bool = False) -> None:
        """Take what has come; `behind`: libpq may hold something already."""
        self._heard = self._loop.time()
        try:
            if behind:
                self._drain()
            # Until nothing is left: libpq takes little at a time, and of a TLS record the rest waits in its buffer
            # while the socket shows nothing.
            while not self.ended and self._bytes <= self._limit:
                self._pgconn.consume_input()
                if not self._drain():
                    break
        except (psycopg.Error, OSError) as error:
            self._error = refusal(error, "reading")
            self.ended = True
            self._pause()
        if self._bytes > self._limit:
            self._pause()
        if self._frames or self.ended:
            self._ready.set()

    def _drain(self) -> bool:
        got = False
        while True:
            size, data = self._pgconn.get_copy_data(1)
            if size > 0:
                assert data is not None
                self._frames.append(data)
                self._bytes += size
                got = True
            elif size == 0:
                return got
            else:
                self.ended = True
                self._pause()
                return False

    @property
    def silent_for(self) -> float:
        """Seconds for which nothing has come though it would have been taken; 0 while enough waits to be taken."""
        return self._loop.time() - self._heard if self._reading else 0.0

    @property
    def waiting(self) -> bool:
        """Whether something is there to be taken without waiting."""
        return bool(self._frames)

    async def take(self) -> list[memoryview | Notice]:
        """All messages that have come, waiting for the first; an empty list at the end of the COPY.

        Raises:
            Unavailable: the connection broke, or the server is stopping.
        """
        if self._small > BUSY_AFTER and not self._frames and not self.ended:
            self._pause()
            await anyio.sleep(BUSY_PAUSE)
            self._readable()
            self._resume()
        await self._ready.wait()
        if not self._frames and self._error is not None:
            raise self._error
        now = self._loop.time()
        self._small = self._small + 1 if self._bytes < SMALL and now - self._taken < BUSY_WITHIN else 0
        self._taken = now
        frames, self._frames, self._bytes = self._frames, [], 0
        if not self.ended:
            self._ready.clear()
            self._resume()
        return frames

    def _note(self, text: str) -> None:
        """Put a server's notice between the messages; libpq hands it over while it drains them."""
        self._frames.append(Notice(text))

    def close(self) -> None:
        """Stop watching the socket."""
        self._pause()
        self.ended = True
        self._ready.set()


async def finish(pgconn: pq.abc.PGconn) -> None:
    """Take the results that follow a COPY's end; CommandError where the server ended it with an error."""
    error: CommandError | None = None
    while True:
        while pgconn.is_busy():
            await readable(pgconn, "the end of a COPY")
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            break
        try:
            check(pgconn, result)
        except CommandError as found:
            error = found
    if error is not None:
        raise error
