"""What README.md and docs/ show of commands, where it is marked as runnable: each runs, and answers as the page shows.

The README's own bridge, index and servers are what the other pages' commands are run beside. How a block is marked is
in tests/transcript.py. A command is asked again for a moment where its answer is another one: what was written is on
its way. Progress bars are shown on terminals only.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from bridge.embedded import SearchEngine, until
from bridge.embedded.process import free_port
from bridge.errors import EXIT_DONE, EXIT_FOUND
from tests.running import emptied, execute
from tests.transcript import Block, alike, marked, shape

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LASTING = re.compile(r"(python -m )?bridge( index \w+)?( |$)*(#.*)?")
SECONDS = 20.0


class Shell:
    """Runs a page's commands in a folder, those that go on for ever until the end."""

    def __init__(self, folder: Path, dsn: str, engine: str, natscli: Path) -> None:
        self._folder = folder
        self._dsn = dsn
        self._stands = {
            "postgresql://postgres@127.0.0.1/app": dsn,
            "http://127.0.0.1:9200": engine,
            "127.0.0.1:9300": f"127.0.0.1:{free_port()}",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "BRIDGE_", "NATS"))}
        self._environment = kept | {
            "PATH": f"{Path(sys.executable).parent}:{natscli.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "BRIDGE_OPERATE__HTTP": self._stands["127.0.0.1:9300"],
        }
        self._lasting: list[subprocess.Popen[bytes]] = []

    async def do(self, block: Block) -> list[str]:
        """What of a block is not as the page shows it."""
        if block.what == "sql":
            await execute(self._dsn, block.text)
        elif block.what:
            (self._folder / block.what).write_text(self._here(block.text))
        else:
            return [wrong for command, shown in block.commands for wrong in await self._command(command, shown)]
        return []

    async def _command(self, command: str, shown: str) -> list[str]:
        lasting = LASTING.fullmatch(command) is not None
        output = self._folder / f"output-{len(self._lasting)}"
        if lasting:
            self._start(command, output)
        documented = re.sub(r"(?m)^( *#|.*━).*\n", "", shown)
        deadline = time.monotonic() + SECONDS
        while True:
            came = self._known(output.read_text()) if lasting else await self._run(command)
            if not documented.strip() or alike(_joined(documented), _joined(came)):
                return []
            if time.monotonic() > deadline or "reindex" in command:
                return [f"{command}\n  shown: {shape(_joined(documented))}\n  came:  {shape(_joined(came))}"]
            await anyio.sleep(0.2)

    def _start(self, command: str, output: Path) -> None:
        called = ["bash", "-c", f"exec {self._here(command)}"]
        with output.open("wb") as file:
            self._lasting.append(
                subprocess.Popen(called, cwd=self._folder, env=self._environment, stdout=file, stderr=file)
            )

    async def _run(self, command: str) -> str:
        url = self._folder / "bridge-data" / "url"
        environment = self._environment | ({"NATS_URL": url.read_text()} if url.exists() else {})
        with anyio.fail_after(60):
            done = await anyio.run_process(
                ["bash", "-c", self._here(command)],
                cwd=self._folder, env=environment, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        assert done.returncode in (EXIT_DONE, EXIT_FOUND), (command, done.stderr.decode())
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return self._known(done.stdout.decode())

    def _here(self, text: str) -> str:
        for name, stands in self._stands.items():
            text = text.replace(name, stands)
        return text

    def _known(self, text: str) -> str:
        database = self._dsn.rpartition("/")[2]
        for name, stands in ((socket.gethostname(), "this-host"), (database, "app")):
            text = re.sub(rf"\b{re.escape(name)}\b", stands, text)
        return text

    async def close(self) -> None:
        """Ends what goes on, in order."""
        for process in reversed(self._lasting):
            process.send_signal(signal.SIGTERM)
            await until(lambda: process.poll() is not None, 60, "it has ended")  # noqa: B023

    def kill(self) -> None:
        """Ends what is left."""
        for process in self._lasting:
            process.kill()
            process.wait()


def _joined(text: str) -> str:
    """JSON on one line, as it is where no page's width breaks it."""
    text = re.sub(r"\n +(?=\")", " ", text)
    return "\n".join(re.sub(r"([,:]) +", r"\1", line) if line.startswith("{") else line for line in text.splitlines())


@pytest.fixture
def shell(tmp_path: Path, pg_db: str, osmem: SearchEngine, natscli: Path) -> Iterator[Shell]:
    found = Shell(tmp_path, pg_db, osmem.url, natscli)
    yield found
    found.kill()


async def test_every_block_that_is_marked_runs_and_answers_as_the_page_shows(shell: Shell, osmem: SearchEngine) -> None:
    await emptied(osmem.url, "messages")
    wrong = [f"{page.name}: {one}" for page in PAGES for block in marked(page) for one in await shell.do(block)]
    await shell.close()
    assert not wrong, "\n".join(wrong)


def test_pages_have_blocks_that_are_marked() -> None:
    assert {page.name for page in PAGES if marked(page)} >= {"README.md", "indexes.md", "operations.md", "snapshots.md"}
