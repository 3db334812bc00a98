"""`bridge status --watch` as a person runs it: on a terminal, on a small one, without one; and how it ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest

from bridge.config import Config
from bridge.embedded import NatsServer, until
from tests.running import bridge, execute, settled, source, toml

pytestmark = pytest.mark.anyio

TABLE = 'CREATE TABLE "größe" (id int PRIMARY KEY)'
CONTROL = re.compile(r"\x1b\[([?0-9;]*)([a-zA-Z])")
ENTERED, LEFT = "\x1b[?1049h", "\x1b[?1049l"


class Screen:
    """A terminal of a given size, and the command on it; `text` is everything that it was sent."""

    def __init__(self, config: Config, folder: Path, columns: int, rows: int, **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.set_blocking(self._master, False)
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            called(config, folder), stdin=slave, stdout=slave, stderr=slave, env=kept | {"TERM": "xterm"} | environment
        )
        os.close(slave)
        self.text = ""

    def shows(self, word: str, times: int) -> bool:
        found = self.reads(word, times)
        assert found or self.process.poll() is None, f"it has ended: {self.text}"
        return found

    def reads(self, word: str, times: int = 1) -> bool:
        while True:
            try:
                self.text += os.read(self._master, 65536).decode(errors="replace")
            except (BlockingIOError, OSError):
                return self.text.count(word) >= times

    async def until(self, word: str, times: int = 1) -> None:
        try:
            await until(partial(self.shows, word, times), 60, f"the terminal shows {word!r}")
        except TimeoutError:
            pytest.fail(self.text)

    async def end(self, number: int) -> int:
        self.process.send_signal(number)
        await until(lambda: self.process.poll() is not None, 30, "it has ended")
        self.reads("")
        assert self.process.returncode is not None
        return self.process.returncode

    @property
    def frames(self) -> list[list[str]]:
        """The lines of each page, without what controls the terminal."""
        return [CONTROL.sub("", page).replace("\r", "").split("\n") for page in self.text.split("\x1b[H")[1:]]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def called(config: Config, folder: Path, *more: str) -> list[str]:
    file = folder / "bridge.toml"
    file.write_text(toml(config))
    return [sys.executable, "-m", "bridge", "--config", str(file), "status", "--watch", *more]


@contextmanager
def screen(config: Config, folder: Path, columns: int, rows: int, **environment: str) -> Iterator[Screen]:
    found = Screen(config, folder, columns, rows, **environment)
    try:
        yield found
    finally:
        found.close()


async def test_a_terminal_of_40_columns_without_colour_or_utf_8_shows_each_look_and_gets_its_content_back(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, mode="never")
    await execute(pg_db, TABLE, 'INSERT INTO "größe" VALUES (1)')
    async with bridge(config):
        await settled(config)
        with screen(config, tmp_path, 40, 60, NO_COLOR="1", PYTHONIOENCODING="ascii") as terminal:
            await terminal.until("events/s")
            await terminal.until("\x1b[H", times=5)
            code = await terminal.end(signal.SIGINT)
    assert code == 130
    assert terminal.text.startswith(ENTERED) or ENTERED in terminal.text.split(config.source.name)[0]
    assert terminal.text.index(LEFT) > terminal.text.rindex("\x1b[H")
    assert "\x1b[?25h" in terminal.text, "the cursor is back"
    colours = {one for codes, kind in CONTROL.findall(terminal.text) if kind == "m" for one in codes.split(";")}
    assert not colours & {str(n) for n in range(30, 50)}
    assert terminal.text.isascii()
    assert r"public.gr\xf6\xdfe" in "".join(line.strip() for line in terminal.frames[-1])
    assert "Traceback" not in terminal.text
    page = terminal.frames[-1]
    assert page[0].rstrip() == f"bridge {config.source.name}: in step"
    assert max(len(line.rstrip()) for line in page) <= 40


async def test_a_terminal_that_is_too_small_says_how_much_it_lacks_and_shows_problems_first(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    with screen(config, tmp_path, 80, 8) as terminal:
        await terminal.until("more lines: make the terminal larger")
        code = await terminal.end(signal.SIGTERM)
    assert code == 130
    assert LEFT in terminal.text
    page = [line.rstrip() for line in terminal.frames[-1]]
    assert page[0] == f"bridge {config.source.name}: needs a look"
    assert page[1] == "lag unknown; 0 of 0 tables complete"
    assert page[2].startswith("✗ no bridge is running")
    assert len(page) == 8


async def test_on_40_columns_and_12_lines_stand_what_is_in_step_how_far_behind_and_what_has_failed(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    with screen(config, tmp_path, 40, 12) as terminal:
        await terminal.until("more lines", times=2)
        stopped = _last(terminal)
        async with bridge(config):
            await settled(config)
            await terminal.until(": in step")
            await until(lambda: "2 of 2 tables complete" in " ".join(_last(terminal)), 30, "the tables are shown")
            working = _last(terminal)
        await terminal.end(signal.SIGINT)
    assert stopped[0] == f"bridge {config.source.name}: needs a look"
    shown = " ".join(stopped)
    for word in ("lag unknown; 0 of 0 tables complete", "no bridge is running", "has no slot", "there is no stream"):
        assert word in shown, shown
    assert working[0] == f"bridge {config.source.name}: in step"
    assert working[1].startswith("lag ")
    assert all(len(page) == 12 and max(map(len, page)) <= 40 for page in (stopped, working))


def _last(terminal: Screen) -> list[str]:
    """The lines of the newest page that has come as a whole."""
    terminal.reads("")
    return [line.rstrip() for line in terminal.frames[-2]]


async def test_without_a_terminal_one_page_follows_another_and_json_is_one_object_a_line(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    with output(called(config, tmp_path, "--json")) as process:
        found = [json.loads(await line(process)) for _ in range(3)]
        # Whoever reads has had enough.
        assert process.stdout is not None
        process.stdout.close()
        assert await anyio.to_thread.run_sync(process.wait, 30) == 141
    seen = [(one["in_step"], one["number"], one["process"]["state"]) for one in found]
    assert seen == [(False, 1, "stopped"), (False, 2, "stopped"), (False, 3, "stopped")]
    with output(called(config, tmp_path)) as process:
        for _ in range(2):
            assert await line(process) == f"bridge {config.source.name}: needs a look"
            page = []
            while (text := await line(process)) != "-" * 40:
                page.append(text)
            assert f"{config.source.slot}: not there" in "\n".join(page)
            assert "\x1b" not in "".join(page)
        process.send_signal(signal.SIGINT)
        assert await anyio.to_thread.run_sync(process.wait, 30) == 130


@contextmanager
def output(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def line(process: subprocess.Popen[str]) -> str:
    """The next line of its output; it has ended where there is none."""
    assert process.stdout is not None
    with anyio.fail_after(60):
        text = await anyio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True)
    assert text
    return text.rstrip()
