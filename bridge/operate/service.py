"""What a bridge answers to requests over NATS: its micro service `bridge`, with the endpoints

    bridge.<source>.status          what `bridge status --json` prints
    bridge.<source>.check           what `bridge check --json` prints
    bridge.<source>.snapshot        read tables again, pause, resume or cancel that, as `bridge snapshot` does
    bridge.<source>.snapshot.where  … only the rows that an SQL condition chooses
    bridge.<source>.reindex         rebuild an index, or cancel that, as `bridge reindex` does

Each running bridge is one instance; one that stands by answers to the first two alone. Who may ask is decided by the
NATS server, subject by subject; `snapshot.where` has one of its own because a condition is SQL with the bridge's
privileges.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable
from typing import Literal

import anyio
import msgspec

from bridge import __version__, log
from bridge.config import Config, join_name
from bridge.errors import UsageError
from bridge.operate import snapshot as snapshots
from bridge.operate.check import check
from bridge.operate.micro import Endpoint, Identity, Service, decoded
from bridge.operate.rebuilds import Asked, Rebuilds
from bridge.operate.show import check as show_check
from bridge.operate.show import status as show
from bridge.operate.status.live import Live
from bridge.stream import server
from bridge.stream.lease import Lease, alive, lease_key, mine
from bridge.stream.server import Broker, Servers
from bridge.stream.state import SnapshotStatus, State
from bridge.stream.subjects import request_subject
from bridge.structured import group
from bridge.waiting import until

NAME = "bridge"
LOOK_EVERY = 1.0
# How long an answer serves those who ask for the same.
CHECK_FOR = 5.0
MOST_TABLES, LONGEST_NAME, MOST_WILDCARDS, LONGEST_CONDITION = 100, 300, 4, 8000

Role = tuple[str, int]


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """A request that says nothing."""


class Snapshot(msgspec.Struct, forbid_unknown_fields=True):
    """tables: names or patterns, or all of them; without an action they are to be read."""

    tables: list[str] | Literal["all"]
    pause: bool = False
    resume: bool = False
    cancel: bool = False
    status: bool = False


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """Tables of which the rows are to be read that `where` chooses."""

    tables: list[str] | Literal["all"]
    where: str


async def answering(config: Config, servers: Servers, endpoints: Endpoints) -> None:
    """Answer requests until something breaks: over one connection, one service after another, for each role and epoch
    is an instance of its own."""
    name = f"bridge {config.source.name} requests"
    async with server.connect(config.stream, servers, name=name) as broker:
        role = await _role(config, broker)
        while True:
            service = Service(broker, _identity(config, role), endpoints.of(role))
            async with group() as tasks:
                tasks.start_soon(service.run)
                log.get().debug("answering requests", id=service.id, role=role[0], epoch=role[1])
                role = await _other(config, broker, role)
                tasks.cancel_scope.cancel()


async def _other(config: Config, broker: Broker, role: Role) -> Role:
    """The next role that is another one."""
    now = role

    async def changed() -> bool:
        nonlocal now
        now = await _role(config, broker)
        return now != role

    await until(changed, seconds=math.inf, every=LOOK_EVERY)
    return now


async def _role(config: Config, broker: Broker) -> Role:
    """ "active" under the lease, "standby" while somebody else has it, "starting" before; and the epoch."""
    if await broker.stream(f"KV_{config.state.bucket}") is None:
        return "starting", 0
    state = await State.open(broker, config.state.bucket, config.stream.replicas)
    found = await state.get(lease_key("bridge", config.source.name), Lease)
    if found is None or not alive(found[0]):
        return "starting", 0
    return ("active", found[0].epoch) if mine(found[0]) else ("standby", 0)


def _identity(config: Config, role: Role) -> Identity:
    found = {"source": config.source.name, "role": role[0], "host": socket.gethostname()}
    if role[1]:
        found["epoch"] = str(role[1])
    return Identity(NAME, __version__, "PostgreSQL changes as a JetStream log", found)


class _Cached:
    """One answer for all who ask while it is new, and while it is made."""

    def __init__(self, make: Callable[[], Awaitable[str]], seconds: float) -> None:
        self._make = make
        self._seconds = seconds
        self._lock = anyio.Lock()
        self._made = -seconds
        self._answer = b""

    async def get(self, data: bytes) -> bytes:
        """The answer to a request that says nothing."""
        decoded(Nothing, data)
        async with self._lock:
            if anyio.current_time() - self._made >= self._seconds:
                self._answer = (await self._make()).encode()
                self._made = anyio.current_time()
            return self._answer


class Endpoints:
    """What is answered; it outlives connections."""

    def __init__(self, config: Config, servers: Servers, live: Live, rebuilds: Rebuilds) -> None:
        self._config = config
        self._servers = servers
        self._live = live
        self._rebuilds = rebuilds
        self._check = _Cached(self._checked, CHECK_FOR)

    def of(self, role: Role) -> list[Endpoint]:
        """The endpoints of a bridge in this role."""
        source = self._config.source.name
        looking = [
            Endpoint("status", request_subject(source, "status"), self._status, "what `bridge status --json` prints"),
            Endpoint("check", request_subject(source, "check"), self._check.get, "what `bridge check --json` prints"),
        ]
        acting = [
            Endpoint("snapshot", request_subject(source, "snapshot"), self._snapshot, "reads tables again"),
            Endpoint(
                "snapshot-where", request_subject(source, "snapshot", "where"), self._part,
                "reads again the rows that an SQL condition chooses",
            ),
            Endpoint("reindex", request_subject(source, "reindex"), self._reindex, "rebuilds an index"),
        ]  # fmt: skip
        return looking + acting if role[0] == "active" else looking

    async def _status(self, data: bytes) -> bytes:
        decoded(Nothing, data)
        await self._live.fresh()
        await self._live.next(0)
        assert self._live.latest is not None
        return show.as_json(self._live.latest).encode()

    async def _checked(self) -> str:
        return show_check.as_json(await check(self._config, self._servers))

    async def _snapshot(self, data: bytes) -> bytes:
        if b'"where"' in data:
            subject = request_subject(self._config.source.name, "snapshot", "where")
            raise UsageError("a condition is SQL, and not taken here", f"send it to {subject}")
        asked: Snapshot = decoded(Snapshot, data)
        chosen: list[snapshots.Action] = [
            action for action in ("pause", "resume", "cancel", "status") if getattr(asked, action)
        ]
        if len(chosen) > 1:
            raise UsageError(f"{chosen[0]} and {chosen[1]} exclude each other", "send one of them")
        action: snapshots.Action = chosen[0] if chosen else "ask"
        return await self._told(snapshots.Asked(_tables(asked.tables), action))

    async def _part(self, data: bytes) -> bytes:
        asked: Part = decoded(Part, data)
        if not 0 < len(asked.where.strip()) <= LONGEST_CONDITION:
            raise UsageError(
                "where is empty or too long", f"send a condition of at most {LONGEST_CONDITION:,} characters"
            )
        return await self._told(snapshots.Asked(_tables(asked.tables), "ask", asked.where))

    async def _told(self, asked: snapshots.Asked) -> bytes:
        told = await snapshots.snapshot(self._config, self._servers, asked)
        if asked.action != "status" and len(told.idle) < len(told.tables):
            tables = list(asked.tables) or "all"
            log.get().info("snapshot requested", action=asked.action, tables=tables, part=bool(asked.where))
        known = {join_name(*root): _table(status) for root, status in sorted(told.tables.items())}
        found = {"running": told.running, "tables": known, "idle": [join_name(*root) for root in told.idle]}
        return msgspec.json.encode(found)

    async def _reindex(self, data: bytes) -> bytes:
        asked: Asked = decoded(Asked, data)
        return msgspec.json.encode(await self._rebuilds.asked(asked))


def _tables(asked: list[str] | Literal["all"]) -> list[str]:
    """Names and patterns as `snapshot` takes them; what would take long to compare with every table is refused."""
    if asked == "all":
        return []
    if not asked:
        raise UsageError("tables is empty", 'name tables as schema.table, or write "tables": "all"')
    if len(asked) > MOST_TABLES:
        raise UsageError(f"{len(asked):,} tables are named", f"name {MOST_TABLES} at most, patterns, or all of them")
    if any(len(name) > LONGEST_NAME or name.count("*") > MOST_WILDCARDS for name in asked):
        raise UsageError(
            f"a name has more than {LONGEST_NAME} characters, or more than {MOST_WILDCARDS} *", "write schema.table"
        )
    return list(asked)


def _table(status: SnapshotStatus) -> dict[str, object]:
    """How far a table is; never the keys up to which it was read, nor the condition."""
    again = status.again
    now, why = (status, status.error) if again is None else (again, again.why or status.error)
    found = {"state": now.state, "rows": now.rows, "estimate": now.estimate, "eta": now.eta}
    return {**found, "complete_from": status.complete_from, "why": why}
