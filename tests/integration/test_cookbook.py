"""docs/nats-cli.md: every command runs, with the permissions that the page names, and answers as the page shows.

With BRIDGE_UPDATE_DOCS=1 the page gets what came back, but for outputs that are shortened there with a line `…`.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from bridge.embedded import NatsServer, Postgres, SearchEngine, until
from bridge.errors import EXIT_CONTRADICTION
from tests.databases import database
from tests.integration.test_permissions import World, shipped
from tests.running import emptied, execute
from tests.transcript import alike, shape

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs" / "nats-cli.md"
WRITES = bool(os.environ.get("BRIDGE_UPDATE_DOCS"))
BLOCK = re.compile(r"```console( admin)?\n(.*?)```", re.DOTALL)
LASTING = re.compile(r"nats (sub|kv watch) ")
LINES = 3  # of a command that goes on for ever, until the page says otherwise


class Shell:
    """Runs the page's commands in a folder."""

    def __init__(self, program: Path, world: World) -> None:
        self._program = program
        self._world = world
        self._environment = {**os.environ, "NATS_URL": world.nats.url, "HOME": str(world.folder)}

    async def run(self, command: str, user: str, lines: int) -> str:
        """What a command says; of one that goes on for ever the first lines."""
        words = [str(self._program), *shlex.split(command)[1:]]
        environment = self._environment | {"NATS_USER": user, "NATS_PASSWORD": user}
        lasting, said = LASTING.match(command) is not None, b""
        with anyio.fail_after(90):
            process = await anyio.open_process(words, stderr=-2, env=environment, cwd=self._world.folder)
            async with process, anyio.create_task_group() as tasks:
                if lasting:
                    tasks.start_soon(self._write)
                assert process.stdout is not None
                async for data in process.stdout:
                    said += data
                    if lasting and len([line for line in said.splitlines() if line.strip()]) >= lines:
                        process.terminate()
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    code = await process.wait()
        assert lasting or code == 0, (command, said.decode())
        database = self._world.dsn.rpartition("/")[2].partition("?")[0]
        for name, stands in ((socket.gethostname(), "this-host"), (database, "app")):
            said = re.sub(rf"\b{re.escape(name)}\b".encode(), stands.encode(), said)
        text = "\n".join(line.rstrip() for line in said.decode().splitlines()).strip("\n")
        return "\n".join([one for one in text.splitlines() if one][:lines]) if lasting else text

    async def _write(self) -> None:
        """Something that changes, for those who follow; until cancelled."""
        while True:
            await execute(self._world.dsn, "UPDATE messages SET body = 'changed' WHERE id = 1")
            await anyio.sleep(0.3)


@pytest.fixture
async def world(pg: Postgres, osmem: SearchEngine, tmp_path: Path) -> AsyncIterator[World]:
    users = shipped("authorization").replace("users = [", "users = [ { user: admin, password: admin }", 1)
    async with database(pg) as dsn, NatsServer.throwaway(settings={"authorization": users}) as nats:
        await execute(
            dsn,
            "CREATE TABLE messages (id int PRIMARY KEY, author text, body text)",
            "INSERT INTO messages SELECT n, 'Ada', 'text ' || n FROM generate_series(1, 3) n",
        )
        await emptied(osmem.url, "messages")
        yield World(tmp_path, dsn, nats, osmem)


async def test_every_command_answers_as_the_page_shows(world: World, natscli: Path) -> None:
    text, shell = PAGE.read_text(), Shell(natscli, world)
    bridge, index = world.process("bridge"), world.process("index")
    wrong, ended = [], False
    try:
        bridge.start()
        await bridge.said("streaming", 60)
        index.start("index")
        await index.said("following", 60)
        await execute(world.dsn, "UPDATE messages SET body = 'changed' WHERE id = 1")
        for found in list(BLOCK.finditer(text)):
            user, written = "admin" if found[1] else "operator", ""
            for part in re.findall(r"\$ (nats .*)\n((?:(?!\$ nats ).*\n)*)", found[2]):
                command, shown = part
                if "stream rm cdc_main" in command:
                    ended = await index.end() == 0 and await bridge.end() == 0
                came = await shell.run(command, user, len(shape(shown)) or LINES)
                if not alike(shown, came):
                    wrong.append((command, shape(shown), shape(came)))
                    shown = shown if re.search(r"(?m)^\s*…$", shown) else f"{came}\n"
                written += f"$ {command}\n{shown}"
            text = text.replace(found[0], f"```console{found[1] or ''}\n{written}```")
        if WRITES:
            PAGE.write_text(text)
        else:
            assert wrong == [], "\n".join(map(repr, wrong))
        assert ended
        # What the page says of a restored stream.
        bridge.start()
        await until(lambda: "was made again" in bridge.text, 60, "the bridge says that it is another stream")
        assert await bridge.wait() == EXIT_CONTRADICTION
        index.start("index")
        await index.said("built from another stream", 60)
    finally:
        for one in (index, bridge):
            one.close()
