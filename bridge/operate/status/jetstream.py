"""What the state bucket and JetStream say: of the bridge, the stream, the tables and the indexes.

First the bucket, then the stream: each is written before the one that is asked before it. What does not depend on one
another is asked at once, so that a look takes a few round trips however many tables and indexes there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable
from typing import Any, TypeVar

import msgspec

from bridge import structured
from bridge.config import PAST, Config
from bridge.errors import ServerRefused
from bridge.index.generation import Generation, IndexRecord
from bridge.operate.status.parts import Stream
from bridge.stream import deadletters, server, subjects
from bridge.stream.lease import Lease, lease_key
from bridge.stream.mirror import Mirror
from bridge.stream.server import NOT_FOUND_CONSUMER, NOT_FOUND_STREAM, ApiError, Broker, Servers
from bridge.stream.standby import Waiting, standby_key
from bridge.stream.state import Checkpoint, SnapshotStatus, State, Writer

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Of a reader of more subjects than this it is not asked how old its next event is.
SUBJECTS = 8


class Consumer(msgspec.Struct, frozen=True):
    """Of a generation's consumer: `behind` events are not in the index yet, the oldest of them stored at `next_at`;
    `taken` were since it was made, the last of them at the sequence `floor`."""

    behind: int
    taken: int
    floor: int
    next_at: str = ""


class Log(msgspec.Struct):
    """What was read. Leases and who waits for them by their keys; consumers by physical index, None where one is gone;
    dead letters by index; `committed`: when the stream's last event was, at which LSN."""

    checkpoint: Checkpoint | None = None
    epoch: int = 0
    leases: dict[str, Lease | None] = {}
    waiting: dict[str, list[Waiting]] = {}
    stream: Stream | None = None
    tables: dict[str, SnapshotStatus] = {}
    records: dict[str, IndexRecord] = {}
    consumers: dict[str, Consumer | None] = {}
    dead: dict[str, int] = {}
    committed: str = ""
    committed_lsn: str = ""


@contextlib.asynccontextmanager
async def opened(config: Config, servers: Servers) -> AsyncIterator[Callable[[], Awaitable[Log]]]:
    """What to ask with, over a connection that is closed at the end.

    Raises:
        Unavailable: NATS is away. ServerRefused: a person must act.
    """
    async with server.connect(config.stream, servers, name=f"bridge {config.source.name} status") as broker:
        yield _Reader(config, broker).read


async def together(keys: Iterable[K], ask: Callable[[K], Awaitable[V]]) -> dict[K, V]:
    """The answer for each key, asked for at once."""
    found: dict[K, V] = {}

    async def one(key: K) -> None:
        found[key] = await ask(key)

    async with structured.group() as tasks:
        for key in keys:
            tasks.start_soon(one, key)
    return found


class _Reader:
    """Reads again and again over one connection."""

    def __init__(self, config: Config, broker: Broker) -> None:
        self._config = config
        self._broker = broker
        self._state: State | None = None
        source, bucket = subjects.token(config.source.name), config.state.bucket
        self._tables = Mirror(broker, bucket, f"snapshot.{source}.", SnapshotStatus)
        self._records = Mirror(broker, bucket, f"index.{source}.", IndexRecord)
        self._roles = [lease_key("bridge", config.source.name)]
        self._roles += [lease_key(r, config.source.name, n) for n in config.index for r in ("index", "reindex")]

    async def read(self) -> Log:
        found = Log()
        try:
            await self._bucket(found)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ServerRefused(
                f"the KV bucket {self._config.state.bucket} holds values that this version cannot read",
                "see it with `nats kv ls`; run the version that wrote it, or a newer one",
            ) from None
        await self._log(found)
        return found

    async def _bucket(self, found: Log) -> None:
        name, bucket = self._config.source.name, self._config.state.bucket
        info = await self._broker.stream(f"KV_{bucket}")
        if info is None:
            self._state = None
            return
        if self._state is None:
            self._state = await State.open(self._broker, bucket, self._config.stream.replicas)
        state = self._state

        async def checkpoint() -> None:
            found.checkpoint = await _value(state, subjects.checkpoint_key(name), Checkpoint)

        async def writers() -> None:
            listed = await _value(state, subjects.epochs_key(name), list[Writer])
            found.epoch = max((writer.epoch for writer in listed or []), default=0)

        async def tables() -> None:
            found.tables = await self._tables.values(state, info)

        async def records() -> None:
            kept = await self._records.values(state, info)
            found.records = {subjects.untoken(key.split(".")[2]): record for key, record in kept.items()}

        async def leases() -> None:
            found.leases = await together(self._roles, lambda key: _value(state, key, Lease))

        async def standbys() -> None:
            keys = [key for key in self._roles if not key.startswith("lease.reindex.")]
            listed = await together(keys, lambda key: _value(state, standby_key(key), list[Waiting]))
            found.waiting = {key: value or [] for key, value in listed.items()}

        await together([checkpoint, writers, tables, records, leases, standbys], lambda part: part())

    async def _log(self, found: Log) -> None:
        config = self._config

        async def log() -> None:
            found.stream = await _stream(self._broker, config.stream.name)
            if found.stream.last_seq:
                await self._last(found, found.stream.last_seq)

        async def dead() -> None:
            counts = await deadletters.counts(self._broker, config.stream, config.source.name)
            mine = {n: deadletters.dead_subject(config.stream.prefix, config.source.name, n) for n in config.index}
            found.dead = {name: counts.get(subject, 0) for name, subject in mine.items()}

        async def consumers() -> None:
            fed = [
                one
                for name, record in found.records.items()
                if name in config.index
                for one in record.generations
                if one.state != "retired"
            ]
            asked = await together(range(len(fed)), lambda number: self._consumer(fed[number]))
            found.consumers = {fed[number].physical: one for number, one in asked.items()}

        await together([log, dead, consumers], lambda part: part())

    async def _last(self, found: Log, seq: int) -> None:
        """When the last event was. What is no event of ours says nothing."""
        last = await self._broker.message(self._config.stream.name, seq=seq)
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            event = msgspec.json.decode(last.data, type=dict[str, Any]) if last is not None else {}
            found.committed, found.committed_lsn = event.get("committed_at") or "", event.get("commit_lsn") or ""

    async def _consumer(self, one: Generation) -> Consumer | None:
        try:
            info = await self._broker.look(f"CONSUMER.INFO.{one.stream}.{one.consumer}")
        except ApiError as error:
            if error.code in (NOT_FOUND_CONSUMER, NOT_FOUND_STREAM):
                return None
            raise
        floor, behind = info["ack_floor"], int(info["num_pending"] + info["num_ack_pending"])
        read, taken = int(floor["stream_seq"]), int(floor["consumer_seq"])
        following = await self._next(one.stream, info["config"], read) if behind else ""
        return Consumer(behind, taken, read, following)

    async def _next(self, stream: str, config: dict[str, Any], after: int) -> str:
        """When the first event after a sequence was stored that a consumer is to get; empty where nobody can tell."""
        one = config.get("filter_subject")
        wanted = config.get("filter_subjects") or [one or ">"]
        if len(wanted) > SUBJECTS:
            return ""
        asked = await together(wanted, lambda s: self._broker.message(stream, next_by_subj=s, seq=after + 1))
        found = [message for message in asked.values() if message is not None]
        return min(found, key=lambda message: message.seq).at if found else ""


async def _value(state: State, key: str, kind: type[V]) -> V | None:
    found = await state.get(key, kind)
    return found[0] if found is not None else None


async def _stream(broker: Broker, name: str) -> Stream:
    try:
        info = await broker.look(f"STREAM.INFO.{name}")
    except ApiError as error:
        if error.code == NOT_FOUND_STREAM:
            return Stream(name, exists=False, where=broker.where)
        raise
    account = await broker.look("INFO")
    config, state, cluster = info["config"], info["state"], info.get("cluster") or {}
    others = cluster.get("replicas") or []
    return Stream(
        name,
        exists=True,
        created=info["created"],
        messages=state["messages"],
        bytes=state["bytes"],
        first_seq=state["first_seq"],
        compacted=config.get("max_msgs_per_subject") == 1,
        first_at=state["first_ts"] if state["messages"] else "",
        last_seq=state["last_seq"],
        last_at=state["last_ts"] if state["messages"] else "",
        replicas=config["num_replicas"],
        leader=cluster.get("leader") or "",
        behind=[other["name"] for other in others if other.get("offline") or not other.get("current")],
        discard=config["discard"],
        max_bytes=max(config["max_bytes"], 0),
        max_msgs=max(config["max_msgs"], 0),
        max_age=config["max_age"] / 1e9,
        atomic=bool(config.get("allow_atomic")),
        used=account.get("storage", 0),
        allowed=max(account.get("limits", {}).get("max_storage", 0), 0),
        where=broker.where,
    )


def past(records: Iterable[str]) -> list[str]:
    """Those of the indexes that were built for a point of the log."""
    return [name for name in records if PAST.fullmatch(name)]
