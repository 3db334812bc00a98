"""Logical messages that an application emits, and transactions that were replicated into the database."""

from __future__ import annotations

from typing import Any

import msgspec
import psycopg
import pytest

from bridge import configfile
from bridge.config import Config
from bridge.embedded import NatsServer
from bridge.errors import BadRecord, ConfigError
from bridge.event import Event
from bridge.stream.reader import Message
from tests.oracle import agrees
from tests.running import Running, bridge, execute, failure, messages, settled, source, toml

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id int PRIMARY KEY, body text)"
SLOT = "SELECT pg_create_logical_replication_slot('oracle', 'wal2json')"
TEXTS = ["", "plain", '{"id": 1, "total": 1.10}', 'quo"te \\ \n\t\x01', "é\U0001f600", "x" * 5000]


def emit(prefix: str, text: str, *, transactional: bool = True) -> str:
    return f"SELECT pg_logical_emit_message({transactional}, '{prefix}', $text${text}$text$)"


async def emitted(config: Config) -> list[tuple[Message, Event]]:
    return [(message, one) for message, one in await messages(config) if one.op == "message"]


@pytest.mark.parametrize("transactional", [True, False])
async def test_a_message_is_in_the_log_as_it_was_emitted(pg_db: str, nats: NatsServer, transactional: bool) -> None:
    config = source(pg_db, nats.url, messages=["app.*", "!app.debug*"])
    await execute(pg_db, TABLE, SLOT)
    async with bridge(config):
        await settled(config)
        await execute(pg_db, *(emit("app.orders", text, transactional=transactional) for text in TEXTS))
        for other in ("app", "app.debugging", "other", "bridge"):
            await execute(pg_db, emit(other, "not to be published", transactional=transactional))
        await settled(config)
    found = await emitted(config)
    assert [one.content for _, one in found] == TEXTS
    assert {message.subject for message, _ in found} == {f"cdc.{config.source.name}.@message.app.orders"}
    for message, one in found:
        assert (one.prefix, one.transactional, one.source) == ("app.orders", transactional, config.source.name)
        assert (one.txid is not None, one.committed_at is not None) == (transactional, transactional)
        assert message.last
    await agrees(config, "oracle")


async def test_messages_stand_where_they_were_emitted(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, messages=["*"])
    await execute(pg_db, TABLE, SLOT)
    async with bridge(config):
        await settled(config)
        script = [
            "INSERT INTO t VALUES (1)", emit("in", "first"), emit("out", "second", transactional=False),
            "INSERT INTO t VALUES (2)", emit("in", "third"),
        ]  # fmt: skip
        await execute(pg_db, "BEGIN; " + "; ".join(script) + "; COMMIT")
        await execute(pg_db, f"BEGIN; {'; '.join(script[1:3])}; ROLLBACK")
        await settled(config)
    found = [(one.content or one.key, message.last) for message, one in await messages(config) if one.table != "mark"]
    told = [(bytes(what).decode() if isinstance(what, msgspec.Raw) else what, last) for what, last in found][2:]
    assert told == [
        ("second", True), ('{"id":1}', False), ("first", False), ('{"id":2}', False), ("third", True), ("second", True),
    ]  # fmt: skip
    await agrees(config, "oracle")


async def test_none_is_doubled_or_lost_by_stops(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, messages=["*"])
    await execute(pg_db, TABLE, SLOT)
    texts = []
    for number in range(4):
        async with bridge(config):
            await settled(config)
            await execute(pg_db, emit("a", f"{number} in"), emit("a", f"{number} out", transactional=False))
        await execute(pg_db, emit("a", f"{number} away", transactional=False), emit("a", f"{number} away, too"))
        texts += [f"{number} in", f"{number} out", f"{number} away", f"{number} away, too"]
    async with bridge(config):
        await settled(config)
    assert [one.content for _, one in await emitted(config)] == texts
    await agrees(config, "oracle")


async def test_one_that_is_larger_than_a_message_may_be_goes_by_claim_check(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, messages=["*"])
    await execute(pg_db, TABLE)
    text = "large " * 300_000
    async with bridge(config):
        await settled(config)
        for transactional in (True, False):
            await execute(pg_db, emit("a", text, transactional=transactional))
        await execute(pg_db, emit("a", "small"))
        await settled(config)
    found = await emitted(config)
    assert [one.content for _, one in found] == [text, text, "small"]
    assert [(one.prefix, one.transactional) for _, one in found] == [("a", True), ("a", False), ("a", True)]
    await agrees(config)


@pytest.mark.parametrize("transactional", [True, False])
async def test_one_that_is_no_text_stops_the_bridge_where_it_is_published(
    pg_db: str, nats: NatsServer, transactional: bool
) -> None:
    config = source(pg_db, nats.url, messages=["*"])
    await execute(pg_db, TABLE)
    running = Running(config)
    async with bridge(config):
        await settled(config)
    await execute(
        pg_db,
        f"SELECT pg_logical_emit_message({transactional}, 'bin.a', '\\x706c616e746564ff'::bytea)",
        emit("bin.b", "text"),
        "INSERT INTO t VALUES (1)",
    )
    error = await failure(running.config)
    assert isinstance(error, BadRecord)
    assert "bin.a" in str(error)
    assert "planted" not in str(error)
    mended = msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, messages=["*", "!bin.a"]))
    async with bridge(mended):
        await settled(mended)
    assert [one.content for _, one in await emitted(config)] == ["text"]
    await agrees(mended)


async def test_a_compacted_log_has_none(nats: NatsServer, tmp_path: Any) -> None:
    config = source("", nats.url, messages=["*"], stream={"mode": "compact"})
    file = tmp_path / "bridge.toml"
    file.write_text(toml(config))
    with pytest.raises(ConfigError, match="a compacted log keeps one message a subject"):
        configfile.load(file, {})


# Origins


async def replicated(dsn: str, origin: str, *statements: str) -> None:
    """Write as a subscription does that applies another server's transactions."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as sql:
        await sql.execute("SELECT pg_replication_origin_session_setup(%s)", [origin])
        for statement in statements:
            await sql.execute(statement)


@pytest.fixture
async def origins(pg_db: str) -> list[str]:
    """Two origins; they belong to the server, not to the database."""
    names = [f"{pg_db.rpartition('/')[2]} {which}" for which in ("one", "two")]
    for name in names:
        await execute(pg_db, f"SELECT pg_replication_origin_create('{name}')")
    return names


async def test_an_event_says_where_its_transaction_was_replicated_from(
    pg_db: str, nats: NatsServer, origins: list[str]
) -> None:
    one, two = origins
    config = source(pg_db, nats.url, messages=["*"])
    await execute(pg_db, TABLE, SLOT)
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "INSERT INTO t VALUES (1)")
        await replicated(pg_db, one, "INSERT INTO t VALUES (2)", emit("a", "said"))
        await replicated(pg_db, two, "INSERT INTO t VALUES (3)", "UPDATE t SET body = 'x'")
        await execute(pg_db, "DELETE FROM t WHERE id = 1")
        await settled(config)
    found = [event.origin for _, event in await messages(config) if event.table == "t" or event.op == "message"][2:]
    assert found == [None, one, one, two, two, two, two, None]
    await agrees(config, "oracle")


async def test_an_origin_that_is_gone_is_told_by_its_number_and_one_made_since_by_its_name(
    pg_db: str, nats: NatsServer, origins: list[str]
) -> None:
    one, two = origins
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
        await replicated(pg_db, one, "INSERT INTO t VALUES (1)")
        await settled(config)
        # The number of one that is dropped is the next one's.
        await execute(
            pg_db, f"SELECT pg_replication_origin_drop('{one}')", f"SELECT pg_replication_origin_create('{one} again')"
        )
        await replicated(pg_db, f"{one} again", "INSERT INTO t VALUES (2)")
        await settled(config)
    await replicated(pg_db, two, "INSERT INTO t VALUES (3)")
    [(number,)] = await execute(pg_db, f"SELECT pg_replication_origin_oid('{two}')")
    await execute(pg_db, f"SELECT pg_replication_origin_drop('{two}')")
    async with bridge(config):
        await settled(config)
    found = [event.origin for _, event in await messages(config) if event.op == "insert" and event.table == "t"]
    assert found == [one, f"{one} again", f"#{number}"]


async def test_what_was_replicated_is_left_out_where_that_is_wanted(
    pg_db: str, nats: NatsServer, origins: list[str]
) -> None:
    config = source(pg_db, nats.url, only_local=True, messages=["*"], on_missing_identity="stop")
    await execute(pg_db, TABLE, "CREATE TABLE nokey (v int)")
    large = "repeat(md5(random()::text), 60000)"
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "INSERT INTO t VALUES (1), (2)")
        await replicated(
            pg_db, origins[0], "INSERT INTO t VALUES (3)", f"UPDATE t SET body = {large} WHERE id = 2",
            "DELETE FROM t WHERE id = 1", emit("a", "not ours"), "INSERT INTO nokey VALUES (1)", "DELETE FROM nokey",
            "CREATE TABLE made (id int PRIMARY KEY)", "INSERT INTO made VALUES (1)",
            "ALTER TABLE t ADD COLUMN more int",
        )  # fmt: skip
        await execute(pg_db, "UPDATE t SET more = 5 WHERE id = 3", emit("a", "ours"))
        await settled(config)
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "INSERT INTO t VALUES (4)")
        await settled(config)
    found = [
        one
        for _, one in await messages(config)
        if one.table not in ("", "mark") and one.op not in ("schema", "snapshot")
    ]
    assert [(one.op, one.table, bytes(one.key)) for one in found] == [
        ("insert", "t", b'{"id":1}'), ("insert", "t", b'{"id":2}'),
        ("update", "t", b'{"id":3}'), ("insert", "t", b'{"id":4}'),
    ]  # fmt: skip
    assert [one.content for _, one in await emitted(config)] == ["ours"]
