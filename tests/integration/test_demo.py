"""The demo runs to its end, says truly whether index and table agree, and leaves nothing behind however it ends."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import psycopg
import pytest
from rich.console import Console

from bridge.config import Index
from bridge.demo import archive, demo, searcher
from bridge.demo.board import Board, Lag, Searches
from bridge.demo.compare import compare
from bridge.demo.screen import summary
from bridge.demo.writer import Writer
from bridge.embedded import SearchEngine, until
from bridge.errors import UsageError
from bridge.index.engine import Engine, opened
from bridge.structured import group

pytestmark = pytest.mark.anyio

MOMENTS = frozenset({"posted_at", "edited_at"})


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for temporary files that the PostgreSQL user may enter, too (pytest's own are closed to it)."""
    path = Path(tempfile.mkdtemp(prefix="demo-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`bridge demo` as a process, its temporary files in `folder`; stderr after stdout."""
    command = [sys.executable, "-m", "bridge", "demo", *arguments]
    environment = {**os.environ, "TMPDIR": str(folder), "NO_COLOR": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_to(process: subprocess.Popen[str], word: str) -> list[str]:
    """The lines up to the one with `word`."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError("".join(lines))


def below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process that the demo has started."""
    return psutil.Process(process.pid).children(recursive=True)


def nothing_left(children: list[psutil.Process], folder: Path) -> bool:
    """Whether the demo's processes end, and its files are gone with them."""
    _, alive = psutil.wait_procs(children, timeout=30)
    return not alive and not list(folder.iterdir())


async def test_it_runs_to_its_end_and_index_and_table_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert await demo(seconds=6, keep=False) is True
    shown = capsys.readouterr().out
    assert "agree: every id and every value of" in shown
    assert "alias now on messages-000002, messages-000001 deleted" in shown
    assert "0 failed, 0 empty" in shown
    assert re.search(
        r"^lag +from commit to search hit, \d+ posts: p50 .*, max .*\n +in the rebuild, \d+ posts: ",
        shown,
        re.MULTILINE,
    )


def test_the_lag_that_is_told_first_has_the_rebuild_in_it() -> None:
    board = Board(5, [], lags=[Lag(5.0, 0.04), Lag(6.0, 0.05), Lag(15.0, 2.0)], rebuilding=(10.0, 20.0), unfound=1)
    board.during = Searches(times=[0.01, 3.0])
    out = io.StringIO()
    summary(board, "", True, Console(file=out, width=100))
    shown = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "lag from commit to search hit, 3 posts: p50 50 ms, max 2.0 s" in shown
    assert "in the rebuild, 1 post: p50 2.0 s, max 2.0 s" in shown
    assert "before and after, 2 posts: p50 45 ms, max 50 ms" in shown
    assert "1 more were not found in time" in shown
    assert "in the rebuild 2 answers, 0 failed, 0 empty: p50 1.5 s, max 3.0 s" in shown


async def test_a_standstill_counts_for_every_post_that_it_holds_up(osmem: SearchEngine) -> None:
    board = Board(5, [])
    writer = Writer("", archive.gather(60, 5), board.writes)
    async with opened(Index(table="public.messages", url=[osmem.url])) as engine, group() as tasks:
        await engine.create("held", {"mappings": {"properties": {"id": {"type": "long"}}}})
        tasks.start_soon(searcher.probe, engine, "held", writer, board)
        begun = time.monotonic()
        for number in (1, 2, 3):
            writer.newest = number, time.monotonic()
            await anyio.sleep(1.2 * searcher.PROBE_PAUSE)  # the writer's pace
        held = time.monotonic() - begun
        for number in (1, 2, 3):
            await engine.ask("PUT", f"/held/_doc/{number}", {"id": number})
        await until(lambda: len(board.lags) == 3, 20, "each post has been found")
        tasks.cancel_scope.cancel()
    async with opened(Index(table="public.messages", url=[osmem.url])) as engine:
        await engine.delete("held")
    assert max(lag.seconds for lag in board.lags) >= held
    assert min(lag.seconds for lag in board.lags) >= held / 3 * 0.9


def test_kept_it_prints_commands_that_work(folder: Path) -> None:
    with running(folder, "--seconds", "6", "--keep") as process:
        lines = read_to(process, "tail -f")
        commands = [line.strip() for line in lines]
        replay = shlex.split(next(line for line in commands if line.endswith("replay --limit 3")))
        replayed = subprocess.run(replay, capture_output=True, text=True, check=True).stdout.splitlines()
        assert [json.loads(line)["seq"] for line in replayed] == [1, 2, 3]
        update = shlex.split(next(line for line in commands if "UPDATE" in line))
        assert subprocess.run(update, capture_output=True, text=True, check=True).stdout.startswith("UPDATE")
        children = below(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert nothing_left(children, folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_interrupted_it_leaves_no_process_and_no_folder(folder: Path, number: int, code: int) -> None:
    with running(folder, "--seconds", "12") as process:
        read_to(process, " index ")
        children = below(process)
        # Three servers and two commands of the bridge, each with its keeper.
        assert len(children) >= 10
        process.send_signal(number)
        assert process.wait(30) == code
    assert nothing_left(children, folder)


def test_a_command_that_dies_ends_it_with_the_last_lines_of_its_log(folder: Path) -> None:
    with running(folder, "--seconds", "12") as process:
        read_to(process, " index ")
        children = below(process)
        victim = next(p for p in children if p.cmdline()[-1:] == ["run"])
        victim.kill()
        shown = "".join(read_to(process, "→"))
        assert process.wait(30) == 4
        assert "`bridge run` was ended by signal 9" in shown
        assert "streaming" in shown
    assert nothing_left(children, folder)


async def test_too_few_seconds_are_refused() -> None:
    with pytest.raises(UsageError):
        await demo(seconds=1, keep=False)


# The comparison


async def put(engine: Engine, documents: dict[int, dict[str, Any]]) -> None:
    for number, document in documents.items():
        await engine.ask("PUT", f"/found/_doc/{number}", document)


async def test_the_comparison_names_what_is_missing_extra_and_different(pg_db: str, osmem: SearchEngine) -> None:
    texts = archive.gather(60, 5)
    await archive.load(pg_db, texts)
    async with await psycopg.AsyncConnection.connect(pg_db, options="-c timezone=UTC") as connection:
        cursor = await connection.execute("SELECT id, row_to_json(messages) FROM messages")
        rows: dict[int, dict[str, Any]] = dict(await cursor.fetchall())
    scores = {number: row["score"] for number, row in rows.items()}
    async with opened(Index(table="public.messages", url=[osmem.url])) as engine:
        await engine.create("found", {"mappings": {"properties": {"id": {"type": "long"}}}})
        await put(engine, rows)
        assert not (await compare(pg_db, engine, "found", MOMENTS)).missing
        await put(engine, {7: {**rows[7], "body": None}, 8: {**rows[8], "score": scores[8] + 0.001}})
        await put(engine, {99: {**rows[9], "id": 99}})
        await engine.ask("DELETE", "/found/_doc/10")
        found = await compare(pg_db, engine, "found", MOMENTS)
        await engine.delete("found")
    assert not found.agrees
    assert (found.missing, found.extra) == ([10], [99])
    assert {7, 8} <= set(found.different)
    assert "1 missing in the index (id 10)" in str(found)


def test_threads_of_the_archive_answer_earlier_posts() -> None:
    texts = archive.gather(400, 5)
    assert len(texts.posts) == 400
    assert [post.id for post in texts.posts] == list(range(1, 401))
    assert all(post.parent_id is None or post.parent_id < post.id for post in texts.posts)
    assert all(1 <= post.list_id <= len(texts.lists) for post in texts.posts)
    assert any(post.digest and len(post.body) > 8_000 for post in texts.posts)
