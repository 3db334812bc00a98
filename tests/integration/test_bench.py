"""The benchmark as a program: what it writes, and that nothing of it is left, whatever ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from bench import documents
from bench.result import Result
from bench.rows import choose, measurements
from bridge.embedded import until
from tests import servers
from tests.running import emptied

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "bench", *arguments], cwd=ROOT, stdout=output, stderr=output)
    try:
        yield process, folder / "output"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def command(process: psutil.Process) -> str:
    """Its command line; empty where it has ended, whether or not anybody has reaped it."""
    try:
        return " ".join(process.cmdline()) if process.is_running() else ""
    except psutil.Error:
        return ""


def connected(process: psutil.Process) -> bool:
    """Whether it has connections to both servers."""
    try:
        found = process.net_connections("tcp")
    except psutil.Error:
        return False
    return len({one.raddr for one in found if one.status == psutil.CONN_ESTABLISHED}) == 2


async def test_rows_are_written_as_they_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["--only", "stream.chain.tx20,latency.batch.100", "--scale", "0.02", "--runs", "1", "--json", str(file)]
    with running(tmp_path, *arguments) as (process, output):
        await until(lambda: process.poll() is not None, 200, "the benchmark has ended")
        text = output.read_text()
        assert process.returncode == 0, text
    found = {one.row: one for one in msgspec.json.decode(file.read_bytes(), type=list[Result])}
    costs = [f"stream.chain.tx20.cpu.{name}" for name in ("walsender", "nats", "bridge")]
    delays = ["latency.batch.100.p50", "latency.batch.100.p99"]
    assert list(found) == [
        "stream.chain.tx20", *costs, "stream.chain.tx20.bound", "stream.chain.tx20.rss", "rss.stream", *delays,
    ]  # fmt: skip
    rate = found["stream.chain.tx20"]
    assert rate.value > 0
    assert rate.yardstick > 0
    assert rate.ratio == pytest.approx(rate.value / rate.yardstick, rel=0.01)
    assert 0 < found[delays[0]].value <= found[delays[1]].value
    assert found["rss.stream"].value == found["stream.chain.tx20.rss"].value > 10
    assert all(row in text for row in found)


async def test_rows_of_snapshots_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["--only", "snapshot", "--scale", "0.001", "--runs", "1", "--json", str(file)]
    with running(tmp_path, *arguments) as (process, output):
        await until(lambda: process.poll() is not None, 200, "the benchmark has ended")
        assert process.returncode == 0, output.read_text()
    found = {one.row: one for one in msgspec.json.decode(file.read_bytes(), type=list[Result])}
    costs = ["", ".cpu.postgres", ".cpu.nats", ".cpu.bridge", ".bound"]
    assert list(found) == [
        *(f"snapshot.initial{part}" for part in costs),
        *(f"snapshot.limit{part}" for part in ("", ".cpu.nats", ".cpu.publisher")),
        *(f"snapshot.incremental{part}" for part in costs),
        "rss.snapshot", "rss.snapshot.incremental",
        *(f"latency.snapshot.200{part}" for part in (".p50", ".p99", ".rows")),
    ]  # fmt: skip
    # PostgreSQL may read so few rows in less than /proc counts.
    assert all(one.value > 0 for row, one in found.items() if not row.endswith(".postgres"))
    initial, limit, incremental = (found[f"snapshot.{name}"] for name in ("initial", "limit", "incremental"))
    assert initial.value == limit.value == incremental.yardstick
    assert all(one.ratio == pytest.approx(one.value / one.yardstick, rel=0.01) for one in (initial, limit, incremental))
    assert found["latency.snapshot.200.p50"].value <= found["latency.snapshot.200.p99"].value


INDEXES = {
    "index.reader": ["", ".cpu.bridge", ".cpu.nats", ".cpu.stub", ".bound"],
    "index.rebuild.opensearch": ["", ".cpu.bridge", ".cpu.engine"],
    "index.rebuild.elasticsearch": ["", ".cpu.bridge", ".cpu.engine"],
    "latency.index.100": [".p50", ".p99"],
    "rss.index": ["", ".reindex"],
    "index.searcher": ["", ".asked"],
}


@pytest.mark.parametrize(
    ("only", "engine"),
    [
        ("index.reader", ""),
        pytest.param("index.rebuild.opensearch", "opensearch", marks=pytest.mark.engine),
    ],
)
async def test_rows_of_indexes_are_measured(tmp_path: Path, only: str, engine: str) -> None:
    if engine:
        servers.fetched(engine)
    file = tmp_path / "results.json"
    with running(tmp_path, "--only", only, "--scale", "0.001", "--runs", "1", "--json", str(file)) as (process, output):
        await until(lambda: process.poll() is not None, 280, "the benchmark has ended")
        assert process.returncode == 0, output.read_text()
    measured(only, msgspec.json.decode(file.read_bytes(), type=list[Result]))


NODE = servers.OpenSearch | servers.Elasticsearch


@pytest.fixture
def node(request: pytest.FixtureRequest) -> NODE:
    """The engine that tests share."""
    found: NODE = request.getfixturevalue(request.param)
    return found


# aiohttp would rather be given a file.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
@pytest.mark.engine
@pytest.mark.parametrize(
    ("only", "node"),
    [
        ("index.rebuild.elasticsearch", "elasticsearch"),
        ("latency.index.100", "opensearch"),
        ("rss.index,index.searcher", "opensearch"),
    ],
    indirect=["node"],
)
async def test_rows_of_indexes_are_measured_in_an_engine_that_runs(
    monkeypatch: pytest.MonkeyPatch, only: str, node: NODE
) -> None:
    @asynccontextmanager
    async def shared(kind: str) -> AsyncIterator[NODE]:
        assert documents.ENGINES[kind].title == node.name
        yield node

    monkeypatch.setattr(documents, "running", shared)
    found: list[Result] = []
    try:
        for measurement, rows in choose(measurements(runs=1, scale=0.001), only.split(",")):
            found += await measurement.measure(rows)
    finally:
        for name in (documents.INDEX, "posts", "posts0"):
            await emptied(node.url, name)
    measured(only, found)


def measured(only: str, results: list[Result]) -> None:
    """Asserts that these are the results of these rows, and can be true."""
    found = {one.row: one for one in results}
    assert list(found) == [row + part for row in only.split(",") for part in INDEXES[row]]
    # Of searches the first row counts those that failed, the second says that there were some.
    assert all(one.value > 0 for row, one in found.items() if row != "index.searcher")
    if "index.searcher" in found:
        assert found["index.searcher"].value == 0
    if only.startswith("index.rebuild"):
        assert found[only].ratio == pytest.approx(found[only].value / found[only].yardstick, rel=0.01)
    if only.startswith("latency"):
        assert found[f"{only}.p50"].value <= found[f"{only}.p99"].value


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_nothing_is_left_when_it_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "--only", "stream.batch.tx20", "--scale", "0.5", "--runs", "1") as (process, _):
        children: list[psutil.Process] = []

        def bridge_works() -> bool:
            children[:] = psutil.Process(process.pid).children(recursive=True)
            return any("bridge --config" in command(child) and connected(child) for child in children)

        await until(bridge_works, 120, "the benchmark's bridge is connected")
        process.send_signal(number)
        await until(lambda: process.poll() is not None, 60, "the benchmark has ended")
        await until(lambda: not any(command(child) for child in children), 60, f"nothing is left of {children}")
        assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL)
