"""The bridge's own commands as child processes, with a configuration file such as a user would write.

Each child has a keeper: it ends with this process, whatever ends that; one of them deletes the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NoReturn

import anyio

import bridge
from bridge.embedded import Keeper
from bridge.embedded.process import tail, throwaway_folder
from bridge.errors import ServerRefused

INDEX = "messages"
TABLE = "public.messages"
TABLES = ("lists", "messages")
STOP_WITHIN = 20.0
LAST_LINES = 8

_CONFIG = """\
[source]
dsn = {dsn}
tables = ["public.*"]

[stream]
servers = [{nats}]
sync = "always"  # as nats-server.conf has it

[index.{name}]
table = {table}
url = {engine}
"""
# The change that the rebuild is for: "connections" also finds "connect", "connected", "connecting".
_STEMMED = 'mapping = "mapping.json"\n'
_TEXT = {"type": "text", "analyzer": "english"}
_MAPPING = {
    "dynamic": "strict",
    "properties": {
        "id": {"type": "long"},
        "list_id": {"type": "integer"},
        "parent_id": {"type": "long"},
        "author": {"type": "keyword"},
        "subject": _TEXT,
        "body": _TEXT,
        "tags": {"type": "keyword"},
        "source": {"type": "object", "enabled": False},
        "score": {"type": "keyword", "fields": {"number": {"type": "double"}}},
        "pinned": {"type": "boolean"},
        "posted_at": {"type": "date", "format": "strict_date_optional_time"},
        "edited_at": {"type": "date", "format": "strict_date_optional_time"},
    },
}


class Site:
    """The folder with configuration and logs."""

    def __init__(self, folder: Path, dsn: str, nats: str, engine: str) -> None:
        self.folder = folder
        self.config = folder / "bridge.toml"
        # A TOML basic string and a JSON string are the same for what stands in these.
        self._values = {
            "dsn": json.dumps(dsn), "nats": json.dumps(nats), "engine": json.dumps(engine),
            "table": json.dumps(TABLE), "name": INDEX,
        }  # fmt: skip

    def configure(self, *, stemmed: bool) -> None:
        """Write bridge.toml, as it is at first or with the mapping that the rebuild is for."""
        if stemmed:
            (self.folder / "mapping.json").write_text(json.dumps(_MAPPING, indent=2), encoding="utf-8")
        draft = self.folder / "bridge.toml.new"
        draft.write_text(_CONFIG.format(**self._values) + (_STEMMED if stemmed else ""), encoding="utf-8")
        draft.replace(self.config)

    def command(self, *arguments: str) -> list[str]:
        """A command of the bridge with this configuration."""
        return [sys.executable, "-m", "bridge", "--config", str(self.config), *arguments]


class Child:
    """One command that runs."""

    def __init__(self, site: Site, arguments: tuple[str, ...], keeper: Keeper) -> None:
        self.name = "bridge " + " ".join(arguments)
        self.log = site.folder / f"{arguments[0]}.log"
        self._keeper = keeper
        self._stopping = False

    @property
    def pid(self) -> int:
        return self._keeper.pid or 0

    async def finished(self) -> None:
        """Wait for its end.

        Raises:
            ServerRefused: it did not end with 0; the message has the last lines of its log.
        """
        code = await self._keeper.wait()
        if code != 0:
            self._failed(code)

    async def stays(self) -> None:
        """Return once it was stopped.

        Raises:
            ServerRefused: it ended by itself.
        """
        code = await self._keeper.wait()
        if not self._stopping:
            self._failed(code)

    async def stop(self) -> None:
        """SIGTERM, as a service manager would, and wait for the end; a child that takes too long is left to its keeper.

        Raises:
            ServerRefused: it did not end with 0.
        """
        self._stopping = True
        self._keeper.signal(signal.SIGTERM)
        with anyio.move_on_after(STOP_WITHIN):
            await self.finished()

    def _failed(self, code: int) -> NoReturn:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        lines = tail(self.log).splitlines()[-LAST_LINES:]
        raise ServerRefused(
            f"`{self.name}` {how}; its last lines:\n" + "\n".join(f"    {line}" for line in lines),
            "see what they say; the servers of the demo are gone",
        )


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder, gone at the end."""
    path = throwaway_folder()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@asynccontextmanager
async def running(site: Site, *arguments: str, owner: bool = False) -> AsyncIterator[Child]:
    """A command of the bridge; ended with the block. The `owner`'s keeper deletes the folder, whatever ends us."""
    keeper = Keeper(site.folder if owner else None)
    try:
        child = Child(site, arguments, keeper)
        await keeper.spawn(
            site.command(*arguments), cwd=site.folder, log=child.log, env=_environment(), grace=STOP_WITHIN
        )
        yield child
    finally:
        await keeper.close()


def _environment() -> dict[str, str]:
    """Ours, without what would configure another bridge or another PostgreSQL."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("BRIDGE_") and not n.startswith("PG")}
    here = str(Path(bridge.__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [here, kept.get("PYTHONPATH", "")]))
    return kept
