"""What docs/consumers.md shows does what it says."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import bridge.stream
from bridge.config import Secret, Source, State, Stream
from bridge.embedded import NatsServer, until
from tests.running import bridge as running
from tests.running import execute, settled, source, streaming

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
LARGE = 400_000
TABLE = "CREATE TABLE users (id int PRIMARY KEY, name text, balance numeric, bio text)"


class Example:
    """The consumer of the documentation, as a process."""

    def __init__(self, folder: Path, url: str) -> None:
        [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/consumers.md").read_text(), re.DOTALL)
        self.file = folder / "consumer.py"
        self.file.write_text(code)
        self.copy = folder / "copy.db"
        self.environment = {"COPY": str(self.copy), "NATS_URL": url, "PYTHONPATH": str(ROOT)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(self.file)], env=self.environment)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def rows(self) -> list[tuple[object, ...]]:
        if not self.copy.exists():
            return []
        db = sqlite3.connect(self.copy)
        try:
            found = db.execute(
                "SELECT id, name, balance, md5 FROM (SELECT *, length(bio) AS md5 FROM users) ORDER BY id"
            )
            return found.fetchall()
        except sqlite3.OperationalError:
            return []  # it is only being made
        finally:
            db.close()


async def test_the_documented_consumer_keeps_a_copy_whatever_kills_it(pg_db: str, tmp_path: Path) -> None:
    async with NatsServer.throwaway(settings={"max_payload": "256KB"}) as nats:
        config = msgspec.structs.replace(
            source(pg_db, nats.url),
            source=Source(name="main", dsn=Secret(pg_db), slot="bridge_documented", tables=["public.*"]),
            stream=Stream(servers=[nats.url], name="cdc_main", sync="always"),
            state=State(bucket="bridge"),
        )
        example = Example(tmp_path, nats.url)

        async def same() -> bool:
            rows = await execute(pg_db, "SELECT id, name, balance::text, length(bio) FROM users ORDER BY id")
            return example.rows() == rows

        await execute(
            pg_db, TABLE, "INSERT INTO users SELECT n, 'name ' || n, n * 1.10, '' FROM generate_series(1, 99) n"
        )
        await execute(pg_db, f"INSERT INTO users VALUES (100, 'large', 0, repeat('x', {LARGE}))")
        async with running(config):
            await streaming(config)
            example.start()
            try:
                await until(same, 30, "the copy has the snapshot")
                await execute(
                    pg_db,
                    "UPDATE users SET balance = 123456789012345678901234567890.10 WHERE id = 100",
                    "UPDATE users SET id = 200 WHERE id = 100",
                    "DELETE FROM users WHERE id BETWEEN 10 AND 20",
                )
                await until(same, 30, "the copy has the changes")
                example.kill()
                await execute(
                    pg_db,
                    f"UPDATE users SET bio = repeat('y', {LARGE} + id) WHERE id < 3",
                    "INSERT INTO users VALUES (300, NULL, NULL, NULL)",
                )
                example.start()
                await until(same, 30, "the copy has what was written while it was away")
                await execute(pg_db, "TRUNCATE users", "INSERT INTO users VALUES (1, 'one', 1, 'x')")
                await until(same, 30, "the copy is as short as the table")
                await settled(config)
            finally:
                example.kill()


def test_the_public_names_are_these() -> None:
    names = ["Event", "Item", "Log", "Position", "Ref", "Transaction", "events"]
    assert sorted(bridge.stream.__all__) == names
    assert all(getattr(bridge.stream, name).__doc__ for name in names)
