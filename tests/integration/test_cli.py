"""The command line against real servers: what is printed where, and with which exit code."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from array import array
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from bridge import cli
from bridge.config import Config, Secret
from bridge.configfile import load
from bridge.embedded import NatsServer, Postgres, SearchEngine, free_port, supervised, until
from bridge.errors import Unavailable
from bridge.operate.status.collect import collect
from bridge.stream.reader import consumers
from bridge.waiting import until as waited
from tests.proxy import Proxy
from tests.running import (
    Process,
    bridge,
    broker_of,
    checkpoint,
    execute,
    messages,
    settled,
    source,
    state_of,
    streaming,
    toml,
)

pytestmark = pytest.mark.anyio


async def call(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs one command in `folder`, where a bridge.toml may be."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "BRIDGE_"))}
    with anyio.fail_after(30):
        return await anyio.run_process(
            [sys.executable, "-m", "bridge", *arguments],
            cwd=folder,
            env={**clean, "PYTHONPATH": str(Path(__file__).parents[2]), **(env or {})},
            check=False,
            input=b"",
        )


@pytest.fixture
async def written(pg_db: str, nats: NatsServer, tmp_path: Path) -> Config:
    """A stream of a table with two snapshot rows and three inserts; bridge.toml is in tmp_path."""
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, j json)", "INSERT INTO t VALUES (1, NULL), (2, NULL)")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO t VALUES (3, E'{\"a\":\\n1}')", "INSERT INTO t VALUES (4, NULL), (5, NULL)")
        await settled(config)
    (tmp_path / "bridge.toml").write_text(toml(config))
    return config


async def test_replay_prints_each_event_on_a_line(written: Config, tmp_path: Path) -> None:
    done = await call(tmp_path, "replay")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    stored = await messages(written)
    assert [line["seq"] for line in lines] == [message.seq for message, _ in stored]
    assert [line["position"] for line in lines] == [message.position for message, _ in stored]
    assert [line["key"] for line in lines if line["op"] == "insert" and line["table"] == "t"] == [
        {"id": 3},
        {"id": 4},
        {"id": 5},
    ]
    assert done.stderr == b""


async def test_replay_chooses_subjects_starts_and_limits(written: Config, tmp_path: Path) -> None:
    subject = f"cdc.{written.source.name}.public.t"
    only = await call(tmp_path, "replay", "--subject", subject, "--from", "4")
    lines = [json.loads(line) for line in only.stdout.splitlines()]
    assert {line["table"] for line in lines} == {"t"}
    assert lines[0]["seq"] >= 4
    few = await call(tmp_path, "replay", "--limit", "2")
    assert len(few.stdout.splitlines()) == 2
    later = await call(tmp_path, "replay", "--from", datetime.now(UTC).isoformat())
    assert (later.returncode, later.stdout) == (0, b"")
    earlier = await call(tmp_path, "replay", "--from", "2020-01-01T00:00:00Z")
    assert len(earlier.stdout.splitlines()) == len(await messages(written))
    wrong = await call(tmp_path, "replay", "--from", "yesterday")
    assert wrong.returncode == 2
    assert b"--from" in wrong.stderr


async def test_replay_follows_what_comes(written: Config, tmp_path: Path) -> None:
    count = len(await messages(written))
    follower = Process(tmp_path, toml(written))
    follower.start("replay", "--follow")
    try:
        await until(lambda: len(follower.text.splitlines()) == count, 20, "everything so far is printed")
        async with bridge(written):
            await execute(str(written.source.dsn), "INSERT INTO t VALUES (6, NULL)")
            await until(lambda: '"key":{"id":6}' in follower.text, 20, "the new event is printed")
        assert await follower.end(2) == 130
    finally:
        follower.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_replay_that_ends_leaves_no_consumer(written: Config, tmp_path: Path, number: int) -> None:
    async with broker_of(written) as broker:
        for options in ([], ["--limit", "1"], ["--subject", "cdc.*.public.t"]):
            assert (await call(tmp_path, "replay", *options)).returncode == 0
            assert await consumers(broker, written.stream.name) == []
        following = Process(tmp_path, toml(written))
        following.start("replay", "--follow")
        try:
            await until(lambda: '"id":5' in following.text, 20, "everything is printed")
            assert len(await consumers(broker, written.stream.name)) == 1
            assert await following.end(number) == 130
            assert "Traceback" not in following.text
        finally:
            following.close()
        assert await consumers(broker, written.stream.name) == []


@contextmanager
def unread(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`replay` into a pipe that nobody reads."""
    command = [sys.executable, "-m", "bridge", "--config", str(folder / "bridge.toml"), "replay"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_replay_whose_reader_takes_nothing_is_ended_by_a_signal(
    written: Config, tmp_path: Path, number: int
) -> None:
    async with bridge(written):
        rows = "SELECT g, to_json(repeat('x', 500)) FROM generate_series(10, 999) g"
        await execute(str(written.source.dsn), f"INSERT INTO t {rows}")
        await settled(written)
    with unread(tmp_path) as process:
        assert process.stdout is not None
        size = fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ)
        pipe = process.stdout

        def full() -> bool:
            found = array("i", [0])
            fcntl.ioctl(pipe, termios.FIONREAD, found)
            return found[0] == size

        await until(full, 30, "the pipe is full")
        process.send_signal(number)
        await until(lambda: process.poll() is not None, 20, "it has ended")
    assert process.returncode == 130
    async with broker_of(written) as broker:
        assert await consumers(broker, written.stream.name) == []


async def test_drop_asks_and_takes_away_what_it_says(written: Config, tmp_path: Path) -> None:
    refused = await call(tmp_path, "drop")
    assert refused.returncode == 2
    assert b"--yes" in refused.stderr
    parent, child = pty.openpty()
    os.write(parent, b"n\n")
    asked = await anyio.run_process(
        [sys.executable, "-m", "bridge", "--config", str(tmp_path / "bridge.toml"), "drop"], stdin=child, check=False
    )
    os.close(parent)
    os.close(child)
    assert asked.returncode == 0
    assert b"nothing was dropped" in asked.stdout
    assert await slots(written) == 1
    async with state_of(written) as state:
        known = len(await state.keys(""))
    done = await call(tmp_path, "drop", "--stream", "--state", "--yes")
    assert done.returncode == 0, done.stderr
    assert await slots(written) == 0
    async with broker_of(written) as broker:
        assert await broker.stream(written.stream.name) is None
    assert await checkpoint(written) is None
    again = await call(tmp_path, "drop", "--stream", "--state", "--yes")
    assert (again.returncode, again.stdout.count(b"there was none")) == (0, 2)
    assert f"there was nothing of source {written.source.name}" in again.stdout.decode()
    [said] = [line for line in done.stdout.decode().splitlines() if line.startswith("state ")]
    assert f": {known} keys of source " in said
    async with bridge(written):  # and a new start is a fresh one
        await settled(written)
    assert [m.op for m, e in await messages(written) if e.table == "t"].count("read") == 5


async def slots(config: Config) -> int:
    query = f"SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'"
    return int((await execute(str(config.source.dsn), query))[0][0])


async def test_a_slot_in_use_is_not_dropped(written: Config, tmp_path: Path) -> None:
    async with bridge(written):
        await streaming(written)
        done = await call(tmp_path, "drop", "--yes")
        assert done.returncode == 4
        assert b"in use" in done.stderr
        assert b"Traceback" not in done.stderr


async def test_a_drop_looks_for_a_bridge_before_it_asks_and_takes_nothing_from_one(
    written: Config, tmp_path: Path
) -> None:
    before = len(await messages(written))
    async with bridge(written):
        await streaming(written)
        for options in ([], ["--stream", "--state"]):
            code, said = await at_terminal(tmp_path, "drop", *options)
            assert (code, "[y/N]" in said) == (4, False), said
            assert f"the slot {written.source.slot} is in use" in said
        sure = await call(tmp_path, "drop", "--stream", "--state", "--yes")
        assert (sure.returncode, sure.stdout) == (4, b"")
    assert await slots(written) == 1
    assert len(await messages(written)) >= before > 0
    assert await checkpoint(written) is not None


async def test_a_bridge_that_begins_while_drop_asks_keeps_its_stream(written: Config, tmp_path: Path) -> None:
    async def answer(parent: int) -> None:
        async with bridge(written):
            await streaming(written)
            os.write(parent, b"y\n")
            await ended.wait()

    ended = anyio.Event()
    code, said = await at_terminal(tmp_path, "drop", "--stream", "--state", asked=answer, ended=ended)
    assert (code, "is in use" in said, "deleted" in said) == (4, True, False), said
    assert await checkpoint(written) is not None


async def test_a_bridge_that_waits_for_postgresql_keeps_its_stream(
    written: Config, tmp_path: Path, pg: Postgres, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(pg.port)
    dsn = str(written.source.dsn).replace(f":{pg.port}/", f":{proxy.port}/")
    cut = replace(written, source=replace(written.source, dsn=Secret(dsn)))
    async with bridge(cut):
        await streaming(cut)
        await proxy.refuse()

        async def let_go() -> bool:
            query = f"SELECT active FROM pg_replication_slots WHERE slot_name = '{written.source.slot}'"
            return not (await execute(str(written.source.dsn), query))[0][0]

        assert await waited(let_go, seconds=20)
        done = await call(tmp_path, "drop", "--stream", "--yes")
        assert (done.returncode, done.stdout) == (4, b"")
        assert b"is a bridge that runs" in done.stderr
    assert len(await messages(written)) > 0


async def at_terminal(
    folder: Path,
    *arguments: str,
    asked: Callable[[int], Coroutine[Any, Any, None]] | None = None,
    ended: anyio.Event | None = None,
) -> tuple[int, str]:
    """Runs a command at a terminal; its exit code and all that it said. `asked` begins once it has asked, and gets the
    terminal; `ended` is set once it has ended."""
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "bridge", "--config", str(folder / "bridge.toml"), *arguments]
    said = b""
    process = await anyio.open_process(command, stdin=child, stdout=child, stderr=child)
    os.close(child)
    try:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                while True:
                    await anyio.wait_readable(parent)
                    try:
                        said += os.read(parent, 4096)
                    except OSError:  # nobody has the terminal's other side any more
                        break
                    if asked is not None and b"[y/N]" in said:
                        tasks.start_soon(asked, parent)
                        asked = None
                code = await process.wait()
                if ended is not None:
                    ended.set()
    finally:
        if process.returncode is None:
            process.kill()
        await process.aclose()
        os.close(parent)
    return code, said.decode()


async def test_all_configuration_errors_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "bridge.toml").write_text(
        '[source]\nslot = "Not A Slot"\ntables = 5\nnonsense = 1\n[stream]\nreplicas = "x"\nsync = "soon"\n[bogus]\n'
    )
    done = await call(tmp_path)
    assert done.returncode == 2
    for word in (b"source.tables", b"source.nonsense", b"stream.replicas", b"bogus"):
        assert word in done.stderr
    assert b"Traceback" not in done.stderr
    (tmp_path / "bridge.toml").write_text('[source]\nslot = "Not A Slot"\n[stream]\nsync = "soon"\n')
    done = await call(tmp_path)
    assert b"source.slot" in done.stderr
    assert b"stream.sync" in done.stderr


async def test_the_environment_alone_will_do(written: Config, tmp_path: Path) -> None:
    (tmp_path / "bridge.toml").unlink()
    environment = {
        "BRIDGE_SOURCE__NAME": written.source.name,
        "BRIDGE_SOURCE__DSN": str(written.source.dsn),
        "BRIDGE_STREAM__SERVERS": str(written.stream.servers[0]),
    }
    done = await call(tmp_path, "replay", "--limit", "1", env=environment)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done.stderr
    wrong = await call(tmp_path, "replay", env={**environment, "BRIDGE_SOURCE__NONSENSE": "1"})
    assert wrong.returncode == 2
    assert b"BRIDGE_SOURCE__NONSENSE" in wrong.stderr


async def test_help_and_version(tmp_path: Path) -> None:
    helped = await call(tmp_path, "--help")
    assert helped.returncode == 0
    for word in (b"replay", b"reindex", b"drop", b"Exit codes"):
        assert word in helped.stdout
    one = await call(tmp_path, "dlq", "--help")
    assert b"NAME [ACTION] [LETTERS...]" in one.stdout
    assert b"[default: 100]" in one.stdout
    assert not [word for word in (b"False", b"None", b'""') if word in one.stdout], "what is not given needs no words"
    version = await call(tmp_path, "--version")
    assert version.returncode == 0
    assert version.stdout.strip()
    unknown = await call(tmp_path, "no-such-command")
    assert unknown.returncode == 2
    assert b"Traceback" not in unknown.stderr


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("--follow | head -1", 141, ""),
        ("> /dev/full", 4, "standard output takes no more"),
        (">&-", 0, ""),
        ("2>&- | cat", 0, ""),
    ],
)
async def test_an_output_that_closes_or_is_full_ends_replay_quietly(
    tmp_path: Path, redirection: str, code: int, said: str
) -> None:
    with anyio.fail_after(30):
        done = await anyio.run_process(
            ["bash", "-c", f"set -o pipefail; {sys.executable} -m bridge replay {redirection}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            check=False,
        )
    assert done.returncode == code
    assert said in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert bool(done.stderr) == bool(said)


COMMANDS = [
    "replay", "status", "status --json", "status --watch", "status --watch --json", "check", "check --json",
    "snapshot --status", "drop --state --yes", "completion bash", "--help", "run --help", "--version",
]  # fmt: skip


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("words", COMMANDS)
async def test_where_nobody_reads_any_more_every_command_ends_as_sigpipe_would_end_it(
    tmp_path: Path, words: str
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        with anyio.fail_after(60):
            done = await anyio.run_process(
                [sys.executable, "-m", "bridge", *words.split()],
                cwd=tmp_path,
                stdout=writes,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                check=False,
            )
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr.decode()) == (141, "")


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("words", COMMANDS)
async def test_a_full_disk_is_said_by_every_command(tmp_path: Path, words: str) -> None:
    with anyio.fail_after(60):
        done = await anyio.run_process(
            ["bash", "-c", f"{sys.executable} -m bridge {words} > /dev/full"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            check=False,
        )
    said = done.stderr.decode()
    assert done.returncode == 4, said
    assert said.count("standard output takes no more: No space left on device\n  → make room") == 1
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert ("--from" in said) == (words == "replay")


@pytest.mark.parametrize("options", [["--limit", "0"], ["--limit", "-5"], ["--subject", ""], ["--subject", "a b"]])
async def test_replay_refuses_options_that_mean_nothing(tmp_path: Path, options: list[str]) -> None:
    done = await call(tmp_path, "replay", *options)
    assert done.returncode == 2
    assert options[0] in done.stderr.decode()
    assert done.stdout == b""


async def test_an_embedded_server_is_found_where_it_is_now(tmp_path: Path) -> None:
    settings = load(None, {"BRIDGE_STREAM__SERVERS": "embedded", "BRIDGE_STREAM__STORE_DIR": str(tmp_path)})
    where = cli._running(settings)
    assert callable(where)
    said = {one.what: one.next for one in (await collect(settings, where)).findings}
    assert (
        said[f"NATS cannot be asked: no bridge runs its nats-server on {tmp_path}"] == "start the bridge: `bridge run`"
    )
    for _ in range(2):
        with pytest.raises(Unavailable):
            where()
        async with supervised(tmp_path, port=free_port()) as server:
            assert where() == [server.url]


async def test_the_mapping_of_an_index_is_shown(written: Config, osmem: SearchEngine, tmp_path: Path) -> None:
    file = tmp_path / "bridge.toml"
    section = f'\n[index.t]\ntable = "public.t"\nurl = "{osmem.url}"\n'
    file.write_text(f'{file.read_text()}{section}json = "flat"\n')
    done = await call(tmp_path, "index", "t", "--show-mapping")
    assert done.returncode == 0, done.stderr
    mappings = json.loads(done.stdout)["mappings"]
    assert mappings["_meta"]["source"] == written.source.name
    properties = mappings["properties"]
    assert {name: properties[name]["type"] for name in ("id", "j")} == {"id": "integer", "j": "flat_object"}
    assert b"for OpenSearch" in done.stderr
    missing = await call(tmp_path, "index", "other", "--show-mapping")
    assert missing.returncode == 2


@pytest.mark.parametrize(
    "words", [["run"], ["status"], ["check"], ["replay"], ["index"], ["drop"], ["snapshot", "a.b"]]
)
async def test_no_command_begins_without_any_configuration(tmp_path: Path, words: list[str]) -> None:
    done = await call(tmp_path, *words)
    assert done.returncode == 2
    assert done.stdout == b""
    assert f"there is no bridge.toml in {tmp_path}".encode() in done.stderr
    assert b"--config FILE" in done.stderr
