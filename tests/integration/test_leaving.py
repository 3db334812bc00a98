"""What may not leave the database is nowhere: not in the stream, the state bucket, the objects, the log, a message."""

from __future__ import annotations

import base64
import hashlib
import hmac
import random
import secrets
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bridge.config import Config, Table
from bridge.embedded import NatsServer, until
from bridge.event import Event
from bridge.stream import asking
from bridge.stream.state import TableRecord
from bridge.stream.subjects import table_key
from tests.running import (
    MARK,
    Process,
    bridge,
    command,
    execute,
    failure,
    messages,
    settled,
    source,
    state_of,
    streaming,
    toml,
)  # fmt: skip

pytestmark = pytest.mark.anyio

KEY = "0123456789abcdef-of-this-test"
TABLE = (
    "CREATE TABLE {} (id int PRIMARY KEY, email text, card numeric, born timestamptz, seen inet[], photo bytea,"
    " phone text, note text, secret text, token bytea, n int)"
)
MASKS = {"email": "hash", "card": "hash", "born": "hash", "seen": "hash", "photo": "hash", "phone": "constant:***"}
CHOSEN = Table(exclude=["secret", "token"], mask=MASKS)
LISTED = Table(columns=["id", "n", "email"], mask={"email": "hash"})
# The way by which bytes that are no text get into a column of a UTF8 database.
UNCHECKED = "CREATE CAST (bytea AS text) WITHOUT FUNCTION"


# What begins every value that is to be found nowhere: a text, a number, a time, an address.
MARKS = [b"planted-value", b"314159265358979", b"7393-04-11", b"fd12:3456:789a:bcde:"]


class Planted:
    """Rows whose values all begin with a mark."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def word(self) -> str:
        return f"planted-value{self.random.getrandbits(96):024x}"

    def text(self) -> str:
        """A text, with what is escaped in one way or the other around the word."""
        return "E'" + self.random.choice(["", '"', "\\\\", "\\n", "ü", "\\v"]) + self.word() + "\\t'"

    def large(self) -> str:
        """A value that PostgreSQL stores on its own, TOASTed, and does not compress."""
        return f"(SELECT string_agg('{self.word()}' || md5(random()::text), '') FROM generate_series(1, 80))"

    def row(self, key: int) -> str:
        text = self.large if self.random.random() < 0.3 else self.text
        number = f"314159265358979{self.random.getrandbits(32)}"
        born = f"7393-04-11 01:02:03.{self.random.randrange(10**6):06}"
        seen = f"fd12:3456:789a:bcde::{self.random.getrandbits(15) | 1:x}"
        return (
            f"({key}, {text()}, {number}, '{born}', ARRAY['{seen}']::inet[], convert_to({self.text()}, 'UTF8'),"
            f" {text()}, 'note {key}', {text()}, convert_to({self.text()}, 'UTF8'), {key})"
        )


def found(data: bytes) -> list[bytes]:
    """The marks that some bytes have, as they are, in hexadecimal or in base64."""
    return [mark for mark in MARKS if any(form in data for form in forms(mark))]


def forms(mark: bytes) -> list[bytes]:
    """How bytes look where they are written in one of the usual ways, whatever stands around them."""
    # Of a text in base64 only what is made of whole groups of three bytes stands by itself.
    whole = [base64.b64encode(mark[skip : skip + (len(mark) - skip) // 3 * 3]) for skip in range(3)]
    return [mark, mark.hex().encode(), mark.hex().upper().encode(), *whole]


def stored(server: NatsServer) -> bytes:
    """All that a server has on its disk: messages with their headers, buckets, objects."""
    return b"".join(file.read_bytes() for file in sorted(server.store_dir.rglob("*")) if file.is_file())


def after(events: list[Event], key: int) -> list[dict[str, Any]]:
    return [
        msgspec.json.decode(event.after)
        for event in events
        if bytes(event.after) and msgspec.json.decode(event.key) == {"id": key}
    ]


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
async def test_what_may_not_leave_is_nowhere(pg_db: str, own_nats: NatsServer, tmp_path: Path, identity: str) -> None:
    plant = Planted(secrets.randbits(32))
    config = source(
        pg_db, own_nats.url, mask_key=KEY, table={"public.t": CHOSEN, "public.u": LISTED}, tables=["public.*"]
    )
    for name in ("t", "u"):
        await execute(pg_db, MARK, TABLE.format(name), f"ALTER TABLE {name} REPLICA IDENTITY {identity}")
        await execute(pg_db, f"INSERT INTO {name} VALUES {', '.join(plant.row(key) for key in range(1, 20))}")
    process = Process(tmp_path, toml(config))
    process.start("--verbose")
    await streaming(config)
    for name in ("t", "u"):
        columns = "email, card, born, seen, photo, phone, note, secret, token, n"
        for key in range(1, 20, 4):
            row = plant.row(key).partition(", ")[2]
            await execute(
                pg_db,
                f"UPDATE {name} SET ({columns}) = ({row} WHERE id = {key}",
                f"UPDATE {name} SET n = n + 1, id = id + 1000 WHERE id = {key + 1}",
                f"DELETE FROM {name} WHERE id = {key + 2}",
                f"INSERT INTO {name} VALUES {plant.row(key + 100)}",
            )
        # Larger than a message: the whole event is an object.
        await execute(pg_db, f"INSERT INTO {name} VALUES {plant.row(500)}")
        await execute(pg_db, f"UPDATE {name} SET note = repeat('long', 2300000) WHERE id = 500")
        await execute(pg_db, f"ALTER TABLE {name} ALTER card TYPE numeric(40), ADD COLUMN more int DEFAULT 3")
        await execute(pg_db, f"UPDATE {name} SET n = 0")
    await settled(config)
    await read_again(config)
    assert (await command("verify", config, tmp_path, "public.t", "public.u", "--values")).code == 0
    shown = [await command(name, config, tmp_path) for name in ("status", "check")]
    # A published column that cannot be read stops the bridge, and what it says names no value of the row.
    await execute(pg_db, UNCHECKED)
    bad = plant.row(600).replace("'note 600'", f"'\\x{plant.word().encode().hex()}ff'::bytea::text")
    await execute(pg_db, f"INSERT INTO t VALUES {bad[:-1]}, 4)")
    assert await process.wait() == 3
    said = [process.output.read_bytes(), *(one.out.encode() + one.err.encode() for one in shown)]
    assert b"note" in said[0]
    for text in (stored(own_nats), *said):
        assert found(text) == []
        assert KEY.encode() not in text
    assert b'"note":"note 101"' in stored(own_nats)


async def read_again(config: Config) -> None:
    async with state_of(config) as state:
        for table in ("t", "u"):
            await asking.ask(state, config.source.name, ("public", table))

        async def done() -> bool:
            found = await asking.tables(state, config.source.name)
            return all(one.state == "done" and one.again is None for one in found.values())

        await until(done, 40, "all is read")


def test_marks_are_found_in_whatever_form() -> None:
    for mark in MARKS:
        for shift in range(3):
            text = b"x" * shift + mark + b"yz"
            for written in (text, text.hex().encode(), base64.b64encode(text)):
                assert found(b"..." + written + b"...") == [mark]


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
        async with state_of(config) as state:
            await asking.ask(state, config.source.name, ("public", "t"))

            async def done() -> bool:
                found = (await asking.tables(state, config.source.name))["public", "t"]
                return found.state == "done" and found.again is None

            await until(done, 30, "it is read")
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
    assert "has the new column mail" in error.what
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
