"""A database of a test's own on a server that tests share."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import sql

from bridge.embedded import Postgres, until


@asynccontextmanager
async def database(server: Postgres) -> AsyncIterator[str]:
    """The dsn of a fresh database; it goes at the end with all of its slots, whoever reads them."""
    name = f"test_{secrets.token_hex(4)}"
    async with await psycopg.AsyncConnection.connect(server.dsn(), autocommit=True) as admin:
        # The other way, by WAL, takes three times as long; older servers know only this one.
        way = "STRATEGY FILE_COPY" if admin.info.server_version >= 150000 else ""
        await admin.execute(sql.SQL(f"CREATE DATABASE {{}} {way}").format(sql.Identifier(name)))
    yield server.dsn(name)
    async with await psycopg.AsyncConnection.connect(server.dsn(), autocommit=True) as admin:
        await _drop_slots(admin, name)
        await admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


async def _drop_slots(admin: psycopg.AsyncConnection[Any], name: str) -> None:
    """A database with slots cannot be dropped, nor a slot while a walsender reads it."""

    async def free() -> bool:
        active = await admin.execute(
            "SELECT count(pg_terminate_backend(active_pid)) FROM pg_replication_slots"
            " WHERE database = %s AND active_pid IS NOT NULL",
            [name],
        )
        return await active.fetchone() == (0,)

    await until(free, 20, f"no slot of {name} is in use")
    await admin.execute(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [name]
    )
