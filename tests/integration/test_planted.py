"""What may not leave the database is nowhere that the bridge writes to: planted values, looked for in every byte.

Random rows go through all kinds of changes and both kinds of snapshot with values of their own in each column that is
excluded, masked or not listed. Afterwards every message of every stream (events, objects of claim checks, the state
bucket), the files of the NATS server, all log lines, what commands say and the error of a stop are searched for them,
in the forms in which text hides in text.
"""

from __future__ import annotations

import base64
import json
import random
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog

from bridge import log
from bridge.config import Config, Table
from bridge.embedded import NatsServer
from bridge.errors import BadRecord
from bridge.stream.objects import stream_of
from tests.reading.steps import ask, chunks_of, read_again
from tests.running import bridge, broker_of, command, execute, failure, messages, settled, source

pytestmark = pytest.mark.anyio

KEY = secrets.token_hex(16)
LARGE = 1_200_000
FILLER = f"repeat('_', {LARGE})"
TABLES = {
    "plain": Table(
        exclude=["excluded", "bin", "large"], mask={"hashed": "hash", "constant": "constant:***", "n": "hash"}
    ),
    "whole": Table(
        columns=["id", "shown", "filler", "hashed", "n", "large"],
        mask={"hashed": "hash", "n": "constant:", "large": "hash"},
    ),
    "silent": Table(operations=["update", "delete", "truncate"], columns=["id", "shown"]),
}
COLUMNS = "excluded text, hashed text, constant text, n numeric, bin bytea, doc jsonb, many text[], large text"
KEPT_BACK = ["excluded", "hashed", "constant", "n", "bin", "doc", "many", "large"]
# What of it each table may show: the rest holds planted values.
OPEN = {"plain": {"doc", "many"}, "whole": set[str](), "silent": set[str]()}
# What all planted values begin with: a log of megabytes is not to be looked through a thousand times.
MARKS = ["zqjxvkwyzqjxvkwy", "77733399911144455"]
UNCHECKED = "CREATE CAST (bytea AS text) WITHOUT FUNCTION"


class Planter:
    """Values that nothing else has, as SQL, and all forms of those that were made."""

    def __init__(self, table: str, chance: random.Random) -> None:
        self._table = table
        self._chance = chance
        self.tokens: list[str] = []

    def token(self) -> str:
        """Letters and digits alone: what surrounds them may be escaped, they may not."""
        made = MARKS[0] + "".join(self._chance.choices("ghjkmnpqrstvwxyz23456789", k=12))
        self.tokens.append(made)
        return made

    def value(self, column: str) -> str:
        if column in OPEN[self._table]:
            return "NULL"
        if column == "n":
            digits = MARKS[1] + "".join(self._chance.choices("123456789", k=8))
            self.tokens.append(digits)
            return digits
        made = self.token()
        return {
            "bin": f"convert_to('{made}', 'UTF8')",
            "doc": f"""'{{"a": ["{made}", "\\"{made}"]}}'""",
            "many": f"ARRAY['{made}', '\"{made}', NULL]",
            # Compressed or not, it is stored out of line.
            "large": f"repeat('{made}-', {self._chance.choice([1, 400, LARGE // 25])})",
        }.get(column, f"E'é\"\\\\\\n{made}\\t'")

    def row(self) -> dict[str, str]:
        return {column: self.value(column) for column in KEPT_BACK}


def forms(token: str) -> Iterator[bytes]:
    """A token as it is, and as hexadecimal digits and base64 have it, wherever it begins there."""
    raw = token.encode()
    yield raw
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    yield base64.b64encode(raw)[:-4]
    for before in (1, 2):
        yield base64.b64encode(b"\0" * before + raw)[4:-4]


def found_in(data: bytes) -> list[str]:
    """The marks of which some form is in the data."""
    return [mark for mark in MARKS if any(form in data for form in forms(mark))]


@pytest.mark.parametrize("hide", [bytes.hex, lambda raw: base64.b64encode(b"ab" + raw).decode(), bytes.decode])
def test_the_search_finds_what_is_there(hide: Any) -> None:
    token = Planter("plain", random.Random(1)).token()
    assert found_in(b'{"x":"' + hide(token.encode() + b"more").encode() + b'"}') == MARKS[:1]


@pytest.fixture
async def small() -> AsyncIterator[NatsServer]:
    async with NatsServer.throwaway(settings={"max_payload": "1MB"}) as server:
        yield server


@contextmanager
def logged(form: log.Format) -> Iterator[None]:
    """Logs of this form, at debug level."""
    log.configure(form, verbose=True)
    try:
        yield
    finally:
        structlog.reset_defaults()


def steps(planters: dict[str, Planter], chance: random.Random, count: int, first: int) -> Iterator[str]:
    """Changes of all kinds; rows have the ids 1 to 20, others were moved, to ids from `first` on."""
    for number in range(count):
        table = chance.choice(list(planters))
        planter, id = planters[table], chance.randint(1, 20)
        row = planter.row()
        kind = chance.choice(["insert", "insert", "update", "one", "shown", "key", "delete", "filler"])
        if kind == "insert":
            values = ", ".join([str(id), "'s'", "'f'", *row.values()])
            names = ", ".join(["id", "shown", "filler", *row])
            yield f"INSERT INTO {table} ({names}) VALUES ({values}) ON CONFLICT (id) DO NOTHING"
        elif kind == "update":
            yield f"UPDATE {table} SET {', '.join(f'{n} = {v}' for n, v in row.items())} WHERE id = {id}"
        elif kind == "one":
            name = chance.choice(list(row))
            yield f"UPDATE {table} SET {name} = {row[name]} WHERE id = {id}"
        elif kind == "shown":
            yield f"UPDATE {table} SET shown = shown || 's' WHERE id = {id}"
        elif kind == "key":
            yield f"UPDATE {table} SET id = {first + number} WHERE id = {id}"
        elif kind == "delete":
            yield f"DELETE FROM {table} WHERE id = {id}"
        else:
            # Larger than a message: by claim check, with the whole old row where the identity is FULL.
            yield f"UPDATE {table} SET filler = {FILLER}, hashed = {row['hashed']} WHERE id = {id}"


def fixed(planters: dict[str, Planter]) -> Iterator[str]:
    """One row of each table through everything that chance may leave out."""
    for table, planter in planters.items():
        row = planter.row()
        yield f"INSERT INTO {table} (id, shown, {', '.join(row)}) VALUES (50, 's', {', '.join(row.values())})"
        yield f"UPDATE {table} SET filler = {FILLER} WHERE id = 50"
        yield f"UPDATE {table} SET shown = 't' WHERE id = 50"
        yield f"UPDATE {table} SET id = 51 WHERE id = 50"
        yield f"DELETE FROM {table} WHERE id = 51"


async def stored(config: Config, server: NatsServer) -> bytes:
    """Everything that the bridge has stored, with the subjects and headers; objects of several pieces in one."""
    names = [config.stream.name, f"KV_{config.state.bucket}", stream_of(f"{config.stream.name}_large")]
    whole = bytearray()
    async with broker_of(config) as broker:
        for name in names:
            state = await broker.stream(name)
            assert state is not None
            assert state.messages, name
            for seq in range(state.first_seq, state.last_seq + 1):
                # Of a bucket all but the last value of each key may be gone.
                if await broker.message(name, seq=seq) is not None:
                    message = (await broker.look(f"STREAM.MSG.GET.{name}", {"seq": seq}))["message"]
                    whole += message["subject"].encode() + b"\n" + base64.b64decode(message.get("hdrs", ""))
                    whole += base64.b64decode(message.get("data", ""))
    for file in sorted(server.store_dir.rglob("*")):
        if file.is_file():
            whole += str(file).encode() + b"\n" + file.read_bytes()
    return bytes(whole)


@pytest.mark.parametrize("form", ["text", "json"])
async def test_nothing_that_was_planted_is_anywhere(
    pg_db: str, small: NatsServer, form: log.Format, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chunks_of(monkeypatch, 4)
    seed = secrets.randbelow(1 << 32)
    print(f"seed {seed}")  # noqa: T201
    chance = random.Random(seed)
    planters = {name: Planter(name, chance) for name in TABLES}
    config = source(
        pg_db, small.url, mask_key=KEY, table={f"public.{name}": table for name, table in TABLES.items()}
    )  # fmt: skip
    made = [f"CREATE TABLE {name} (id int PRIMARY KEY, shown text, filler text, {COLUMNS})" for name in TABLES]
    await execute(
        pg_db, UNCHECKED, *made, "ALTER TABLE whole REPLICA IDENTITY FULL",
        "ALTER TABLE plain ALTER hashed SET STORAGE EXTERNAL, ALTER large SET STORAGE EXTERNAL",
        *steps(planters, chance, 40, 100),
    )  # fmt: skip
    said = []
    with logged(form):
        async with bridge(config):
            await settled(config)
            await execute(pg_db, *steps(planters, chance, 60, 200), *fixed(planters))
            for name in TABLES:
                await ask(config, name)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(execute, pg_db, *steps(planters, chance, 40, 300))
                for name in TABLES:
                    await read_again(config, name, seconds=60)
            await execute(
                pg_db, "ALTER TABLE whole ADD more text", f"UPDATE whole SET more = '{planters['whole'].token()}'"
            )
            await settled(config)
            for arguments in (
                ["status"],
                ["status", "--json"],
                ["snapshot"],
                ["verify", "--values"],
                ["replay"],
                ["check"],
            ):
                done = await command(arguments[0], config, tmp_path, *arguments[1:])
                said.append(f"{done.code}{done.out}{done.err}")
    # A row that stops the bridge: its values are in no error.
    garbage = planters["plain"].token().encode().hex() + "ff"
    values = ", ".join({**planters["plain"].row(), "hashed": f"'\\x{garbage}'::bytea::text"}.values())
    await execute(
        pg_db, f"INSERT INTO plain (id, shown, {', '.join(KEPT_BACK)}) VALUES (9999, 's', {values})"
    )  # fmt: skip
    with logged(form):
        error = await failure(config)
    assert isinstance(error, BadRecord)
    said.append(f"{error}{error.what}{error.remedy}{error!r}")
    done = await command("status", config, tmp_path)
    said += [done.out, done.err, *capfd.readouterr()]
    tokens = [token for planter in planters.values() for token in planter.tokens]
    everything = await stored(config, small)
    ops = {(m.op, e.table) for m, e in await messages(config)}
    every = {(op, table) for op in ("read", "insert", "update", "delete") for table in TABLES}
    assert every - ops == {("insert", "silent")}
    words = "\n".join(said)
    assert "streaming" in words
    assert len(tokens) > 500
    assert found_in(everything) == []
    assert found_in(words.encode()) == []
    assert found_in(json.dumps(words).encode()) == []
    assert KEY not in words
    assert KEY.encode() not in everything
