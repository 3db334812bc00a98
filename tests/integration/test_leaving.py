"""What of a table is in the log where the configuration chooses: columns, masks, operations."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import anyio
import msgspec
import pytest
from msgspec.structs import replace

from bridge.config import Config, Table
from bridge.embedded import NatsServer
from bridge.errors import BridgeError, Contradiction
from bridge.event import Event
from bridge.operate.check import check
from bridge.stream.state import TableRecord
from bridge.stream.subjects import table_key
from tests.reading.steps import ask, read_again
from tests.running import MARK, bridge, broker_of, execute, failure, messages, settled, source, state_of, streaming

pytestmark = pytest.mark.anyio

KEY = "0123456789abcdef-of-this-test"
TABLE = (
    "CREATE TABLE {} (id int PRIMARY KEY, email text, card numeric, born timestamptz, seen inet[], photo bytea,"
    " phone text, note text, secret text, token bytea, n int)"
)
MASKS = {"email": "hash", "card": "hash", "born": "hash", "seen": "hash", "photo": "hash", "phone": "constant:***"}
CHOSEN = Table(exclude=["secret", "token"], mask=MASKS)
LISTED = Table(columns=["id", "n", "email"], mask={"email": "hash"})


def after(events: list[Event], key: int) -> list[dict[str, Any]]:
    return [
        msgspec.json.decode(event.after)
        for event in events
        if bytes(event.after) and msgspec.json.decode(event.key) == {"id": key}
    ]


async def test_stream_and_snapshots_mask_alike_and_a_hash_is_what_anybody_with_the_key_makes(
    pg_db: str, nats: NatsServer
) -> None:
    config = source(pg_db, nats.url, mask_key=KEY, table={"public.t": CHOSEN})
    rows = [
        "(1, 'a@b', 1.50, '2020-01-01 00:00:00+00', '{1.2.3.4}', '\\x00ff', '555', 'note', 's', '\\x01', 1)",
        "(2, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)",
        "(3, '', 0, '-infinity', '{}', '', '', '', '', '', 0)",
    ]
    await execute(pg_db, MARK, TABLE.format("t"), f"INSERT INTO t VALUES {', '.join(rows)}")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "DELETE FROM t", f"INSERT INTO t VALUES {', '.join(rows)}")
        await settled(config)
        await ask(config)
        await read_again(config)
        async with state_of(config) as state:
            record = await state.get(table_key(config.source.name, "public", "t"), TableRecord)
    events = [event for _, event in await messages(config) if event.table == "t"]
    assert [event.op for event in events if event.op in ("read", "insert")] == [
        *["read"] * 3, *["insert"] * 3, *["read"] * 3,
    ]  # fmt: skip

    def of(text: str) -> str:
        return hmac.new(KEY.encode(), text.encode(), hashlib.sha256).hexdigest()

    wanted = {
        1: {
            "id": 1, "email": of("a@b"), "card": of("1.50"), "born": of("2020-01-01T00:00:00Z"),
            "seen": of('["1.2.3.4"]'), "photo": of("AP8="), "phone": "***", "note": "note", "n": 1,
        },
        2: {"id": 2, **dict.fromkeys(MASKS), "note": None, "n": None},
        3: {
            "id": 3, "email": of(""), "card": of("0"), "born": of("-infinity"), "seen": of("[]"), "photo": of(""),
            "phone": "***", "note": "", "n": 0,
        },
    }  # fmt: skip
    for key, row in wanted.items():
        assert after(events, key) == [row] * 3
    assert record is not None
    assert {column.name: column.type for column in record[0].columns} == {
        "id": "integer", "n": "integer", "note": "text", **dict.fromkeys(MASKS, "text"),
    }  # fmt: skip


async def test_a_masked_column_that_is_renamed_does_not_leave_under_its_new_name(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, mask_key=KEY, on_rewrite="warn", table={"public.t": CHOSEN, "public.u": LISTED})
    await execute(pg_db, MARK, TABLE.format("t"), TABLE.format("u"))
    async with bridge(config):
        await settled(config)
    await execute(pg_db, "INSERT INTO u (id, email) VALUES (1, 'plain')", "ALTER TABLE u RENAME email TO mail")
    await execute(pg_db, "INSERT INTO u (id, mail) VALUES (2, 'plain')", "ALTER TABLE u ADD COLUMN other text")
    await execute(pg_db, "INSERT INTO u (id, mail, other) VALUES (3, 'plain', 'plain')")
    async with bridge(config):
        await settled(config)
    events = [event for _, event in await messages(config) if event.table == "u" and event.op == "insert"]
    assert [set(msgspec.json.decode(event.after)) for event in events] == [{"id", "n", "email"}, *[{"id", "n"}] * 2]
    await execute(pg_db, "ALTER TABLE t RENAME email TO mail", "INSERT INTO t (id, mail) VALUES (1, 'plain')")
    error = await failure(config)
    assert error.exit_code == 3
    assert "which is excluded or masked, is called mail now" in error.what
    assert not [message for message, _ in await messages(config) if b"plain" in message.data]


async def test_operations_that_are_not_chosen_are_not_in_the_log(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, table={"public.t": Table(operations=["insert", "update"])})
    await execute(pg_db, MARK, "CREATE TABLE t (id int PRIMARY KEY, n int)", "CREATE TABLE u (id int PRIMARY KEY)")
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "BEGIN; INSERT INTO u VALUES (1); INSERT INTO t VALUES (1, 1), (2, 2); UPDATE t SET n = 3;"
            " DELETE FROM t WHERE id = 1; COMMIT",
            "TRUNCATE t, u", "INSERT INTO t SELECT g, g FROM generate_series(1, 1200) g", "DELETE FROM t",
        )  # fmt: skip
        await settled(config)
    found = await messages(config)
    ops = [event.op for _, event in found if event.table == "t" and event.op != "snapshot"]
    assert ops == [*["insert"] * 2, *["update"] * 2, *["insert"] * 1200]
    assert [event.op for _, event in found if event.table == "u" and event.op != "snapshot"] == ["insert", "truncate"]
    # The last event that is there ends its transaction.
    first = [message.last for message, event in found if event.txid and event.table in ("t", "u")][:5]
    assert first == [False, False, False, False, True]


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize(
    "steps",
    [
        ["ALTER TABLE t RENAME secret TO x", "ALTER TABLE t RENAME note TO secret", "ALTER TABLE t RENAME x TO note"],
        ["ALTER TABLE t RENAME email TO mail", "ALTER TABLE t ADD COLUMN email text"],
    ],
)
@pytest.mark.parametrize("running", [False, True])
async def test_a_name_that_is_taken_again_does_not_let_another_column_out(
    pg_db: str, nats: NatsServer, steps: list[str], running: bool, parted: bool
) -> None:
    config = source(
        pg_db, nats.url, mask_key=KEY, table={"public.t": Table(exclude=["secret"], mask={"email": "hash"})}
    )
    columns = "id int PRIMARY KEY, secret text, note text, email text"
    made = [f"CREATE TABLE t ({columns})"]
    if parted:
        made = [f"CREATE TABLE t ({columns}) PARTITION BY RANGE (id)", "CREATE TABLE t1 PARTITION OF t DEFAULT"]
    await execute(pg_db, MARK, *made, "INSERT INTO t VALUES (1, 'planted', 'open', 'planted')")
    steps = [*steps, "UPDATE t SET id = 2", "UPDATE t SET id = 3"]
    if running:
        error: BridgeError = await stopped_by(config, steps)
    else:
        async with bridge(config):
            await settled(config)
        await execute(pg_db, *steps)
        error = await failure(config)
    assert error.exit_code == 3
    assert "which is excluded or masked, is called" in error.what
    assert not [message for message, _ in await messages(config) if b"planted" in message.data]


@pytest.mark.parametrize("running", [False, True])
async def test_a_column_that_comes_where_an_excluded_one_goes_is_another(
    pg_db: str, nats: NatsServer, running: bool
) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn", table={"public.t": Table(exclude=["secret"])})
    steps = [
        "ALTER TABLE t DROP secret", "ALTER TABLE t ADD open text", "INSERT INTO t VALUES (2, 'open')",
        "ALTER TABLE t ADD secret text", "INSERT INTO t VALUES (3, 'open', 'planted')",
    ]  # fmt: skip
    await execute(
        pg_db, MARK, "CREATE TABLE t (id int PRIMARY KEY, secret text)", "INSERT INTO t VALUES (1, 'planted')"
    )
    async with bridge(config):
        await settled(config)
        if running:
            await execute(pg_db, *steps)
            await settled(config)
    if not running:
        # For a time the secret has another name, and the log has rows with it.
        away = ["ALTER TABLE t RENAME secret TO away", "INSERT INTO t VALUES (9, 'planted')"]
        await execute(pg_db, *away, steps[0].replace("secret", "away"), *steps[1:])
        async with bridge(config):
            await settled(config)
    events = [event for _, event in await messages(config) if event.table == "t" and event.op == "insert"]
    rows = [msgspec.json.decode(event.after) for event in events]
    assert rows == [*([] if running else [{"id": 9}]), {"id": 2, "open": "open"}, {"id": 3, "open": "open"}]
    assert not [message for message, _ in await messages(config) if b"planted" in message.data]


EXCHANGED = "ALTER TABLE t RENAME note TO x; ALTER TABLE t RENAME secret TO note; ALTER TABLE t RENAME x TO secret"
GIVEN = "INSERT INTO t (id, note, secret) VALUES ({}, 'open', 'planted')"
TAKEN = "INSERT INTO t (id, secret, note) VALUES (2, 'open', 'planted')"
BORROWED = {
    "exchanged": ([GIVEN.format(1), EXCHANGED, TAKEN, "UPDATE t SET note = 'planted2'", EXCHANGED], {"id"}),
    "in one transaction": (
        [f"BEGIN; {GIVEN.format(1)}; {EXCHANGED}; {TAKEN}; UPDATE t SET note = 'planted2'; {EXCHANGED}; COMMIT"], {"id"}
    ),
    "that of one that went": (
        [
            "ALTER TABLE t DROP note", "ALTER TABLE t RENAME secret TO note",
            "INSERT INTO t (id, note) VALUES (2, 'planted')", "ALTER TABLE t RENAME note TO secret",
            "ALTER TABLE t ADD note text",
        ],
        {"id"},
    ),
    "the key renamed": (
        [
            "ALTER TABLE t RENAME id TO i", "INSERT INTO t (i, note, secret) VALUES (2, 'open', 'planted')",
            "ALTER TABLE t RENAME i TO id",
        ],
        {"i", "note"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize("option", ["exclude", "mask"])
@pytest.mark.parametrize("how", BORROWED)
async def test_a_name_that_was_another_columns_for_a_time_lets_nothing_out(
    pg_db: str, nats: NatsServer, how: str, option: str, parted: bool
) -> None:
    chosen = Table(exclude=["secret"]) if option == "exclude" else Table(mask={"secret": "constant:***"})
    config = source(pg_db, nats.url, on_rewrite="warn", table={"public.t": chosen})
    made = ["CREATE TABLE t (id int PRIMARY KEY, note text, secret text)"]
    if parted:
        made = [
            "CREATE TABLE t (id int PRIMARY KEY, note text, secret text) PARTITION BY RANGE (id)",
            "CREATE TABLE part (secret text, gone int, note text, id int NOT NULL)", "ALTER TABLE part DROP gone",
            "ALTER TABLE t ATTACH PARTITION part DEFAULT",
        ]  # fmt: skip
    await execute(pg_db, MARK, *made, GIVEN.format(0))
    async with bridge(config):
        await settled(config)
    steps, shown = BORROWED[how]
    await execute(pg_db, *steps, GIVEN.format(3))
    async with bridge(config):
        await settled(config)
        await execute(pg_db, GIVEN.format(4))
        await settled(config)
    found = await messages(config)
    assert not [message for message, _ in found if b"planted" in message.data]
    rows = [msgspec.json.decode(event.after) for _, event in found if event.table == "t" and event.op == "insert"]
    masked = {"secret": "***"} if option == "mask" else {}
    assert set(next(row for row in rows if 2 in row.values())) - {"secret"} == shown
    # What may leave does so again as soon as the names are in their places.
    assert rows[-1] == {"id": 4, "note": "open", **masked}


PARTED = [
    "CREATE TABLE t (id int PRIMARY KEY, note text, secret text) PARTITION BY RANGE (id)",
    "CREATE TABLE part PARTITION OF t DEFAULT",
]
LEFT = {
    "renamed": ("ALTER TABLE t RENAME TO u", "public.u"),
    "detached": ("ALTER TABLE t DETACH PARTITION part", "public.part"),
    "parted and renamed": ("ALTER TABLE t RENAME TO u", "public.u"),
}


@pytest.mark.parametrize("away", [True, False], ids=["away", "live"])
@pytest.mark.parametrize("option", ["exclude", "columns"])
@pytest.mark.parametrize("how", LEFT)
async def test_a_table_that_had_a_choice_is_not_published_without_one_under_another_name(
    pg_db: str, nats: NatsServer, how: str, option: str, away: bool
) -> None:
    chosen = Table(exclude=["secret"]) if option == "exclude" else Table(columns=["id", "note"])
    config = source(pg_db, nats.url, table={"public.t": chosen})
    made = ["CREATE TABLE t (id int PRIMARY KEY, note text, secret text)"] if how == "renamed" else PARTED
    await execute(pg_db, MARK, *made, GIVEN.format(0))
    statement, now = LEFT[how]
    steps = [statement, f"INSERT INTO {now} VALUES (7, 'open', 'planted')"]
    if away:
        async with bridge(config):
            await settled(config)
        await execute(pg_db, *steps)
        error: BridgeError = await failure(config)
    else:
        error = await stopped_by(config, steps)
    assert isinstance(error, Contradiction), error
    assert ("belonged to public.t" in error.what, now in error.what, now in error.remedy) == (True, True, True)
    assert not [message for message, _ in await messages(config) if b"planted" in message.data]
    # Whoever says what of it may leave goes on, and it does.
    config = replace(config, source=replace(config.source, table={"public.t": chosen, now: Table()}))
    async with bridge(config):
        await settled(config)
    assert [message for message, _ in await messages(config) if b"planted" in message.data]


@pytest.mark.parametrize("option", ["exclude", "mask"])
async def test_a_row_that_only_a_hidden_column_names_stops_the_bridge_with_the_way_out(
    pg_db: str, nats: NatsServer, option: str
) -> None:
    chosen = Table(exclude=["secret"]) if option == "exclude" else Table(mask={"secret": "constant:***"})
    config = source(pg_db, nats.url, table={"public.t": chosen})
    config = replace(config, source=replace(config.source, on_gap="resnapshot"))
    made = "CREATE TABLE t (id int PRIMARY KEY, note text, secret text NOT NULL UNIQUE)"
    await execute(pg_db, MARK, made, GIVEN.format(0))
    async with bridge(config):
        await settled(config)
    await execute(
        pg_db,
        "ALTER TABLE t REPLICA IDENTITY USING INDEX t_secret_key",
        "UPDATE t SET note = 'closed'",
        "ALTER TABLE t REPLICA IDENTITY DEFAULT",
    )
    error = await failure(config)
    assert isinstance(error, Contradiction), error
    assert ("tells its row by secret" in error.what, "bridge drop --yes" in error.remedy) == (True, True)
    await execute(pg_db, f"SELECT pg_drop_replication_slot('{config.source.slot}')")
    async with bridge(config):
        await settled(config)
    found = await messages(config)
    assert (
        msgspec.json.decode(next(e.after for _, e in reversed(found) if e.table == "t" and e.after))["note"] == "closed"
    )
    assert not [message for message, _ in found if b"planted" in message.data]


async def test_a_partitioned_table_without_partitions_has_its_section(
    pg_db: str, nats: NatsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    made = "CREATE TABLE t (id int, secret text, PRIMARY KEY (id, secret)) PARTITION BY RANGE (id)"
    await execute(pg_db, MARK, made)
    config = source(pg_db, nats.url, table={"public.t": Table(exclude=["secret"])})
    assert "exclude names secret, part of its key" in (await failure(config)).what
    async with broker_of(config) as broker:
        assert await broker.stream(config.stream.name) is None
    await execute(pg_db, "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (id)")
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "CREATE TABLE part PARTITION OF t DEFAULT", "INSERT INTO t VALUES (1, 'planted')")
        await settled(config)
    assert "no such table" not in capsys.readouterr().out
    assert not [
        one.what for one in (await check(config, list(config.stream.servers))).found if "of no published" in one.what
    ]
    assert not [message for message, _ in await messages(config) if b"planted" in message.data]


async def stopped_by(config: Config, steps: list[str]) -> Contradiction:
    """What a running bridge ends with where these are done."""
    try:
        async with bridge(config):
            await settled(config)
            await execute(str(config.source.dsn), *steps)
            with anyio.fail_after(30):
                await anyio.sleep_forever()
    except Contradiction as error:
        return error
    raise AssertionError("it has not ended")


async def test_a_section_of_no_table_is_named(pg_db: str, nats: NatsServer, capsys: pytest.CaptureFixture[str]) -> None:
    config = source(pg_db, nats.url, table={"public.T": Table(exclude=["secret"]), "public.t": Table(exclude=["n"])})
    await execute(pg_db, MARK, "CREATE TABLE t (id int PRIMARY KEY, n int)")
    async with bridge(config):
        await settled(config)
    assert capsys.readouterr().out.count("no such table") == 1
    found = [one for one in (await check(config, [nats.url])).found if one.id.startswith("tables.")]
    assert [(one.id, one.about, one.level) for one in found] == [("tables.section", "public.T", "warning")]
