"""`bridge check --fix`: runs what findings say would mend them. Nothing is restarted, and no data are dropped."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import psycopg

from bridge.config import Config
from bridge.errors import BridgeError
from bridge.operate.checks.finding import Finding, Fix
from bridge.source import connection
from bridge.stream import server
from bridge.stream.server import Servers

# A statement that waits for a table's lock makes everybody else wait behind it.
LOCK_TIMEOUT = "3s"


def fixable(findings: Iterable[Finding]) -> list[Finding]:
    """Those that can be mended from here."""
    return [one for one in findings if one.fix is not None]


async def apply(config: Config, servers: Servers, findings: list[Finding], say: Callable[[str], None]) -> None:
    """Run each fix, and say what became of it; one that fails does not keep the others.

    Args:
        say: told one line for each step.
    """
    fixes = [one.fix for one in findings if one.fix is not None]
    statements = [fix for fix in fixes if not fix.stream]
    edits = [fix for fix in fixes if fix.stream]
    if statements:
        await _tried(lambda: _run(config, statements, say), "PostgreSQL", say)
    if edits:
        await _tried(lambda: _edit(config, servers, edits, say), "NATS", say)


async def _tried(action: Callable[[], Awaitable[None]], where: str, say: Callable[[str], None]) -> None:
    try:
        await action()
    except BridgeError as error:
        say(f"failed: {where}: {error.what}")


async def _run(config: Config, fixes: list[Fix], say: Callable[[str], None]) -> None:
    async with connection.connect(config.source.dsn) as sql:
        await sql.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        for fix in fixes:
            for statement in fix.runs:
                try:
                    await sql.execute(statement.encode())
                except psycopg.errors.LockNotAvailable:
                    say(f"failed: {statement}: the table was in use for {LOCK_TIMEOUT}; try again at a quieter time")
                except psycopg.Error as error:
                    refused = connection.refusal(error, "that")
                    if sql.closed:
                        raise refused from None
                    say(f"failed: {statement}: {refused.what}")
                else:
                    say(f"done: {statement}")


async def _edit(config: Config, servers: Servers, fixes: list[Fix], say: Callable[[str], None]) -> None:
    async with server.connect(config.stream, servers, name=f"bridge {config.source.name} check") as broker:
        for fix in fixes:
            # As it is by now: fields that others have changed meanwhile stay as they are.
            now: dict[str, Any] = (await broker.look(f"STREAM.INFO.{fix.stream}"))["config"]
            try:
                await broker.api(f"STREAM.UPDATE.{fix.stream}", now | fix.fields, seconds=10)
            except server.ApiError as error:
                say(f"failed: {', '.join(fix.runs)}: {error.what}")
            else:
                say(f"done: {', '.join(fix.runs)}")
