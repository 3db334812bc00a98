"""Fixtures: real servers, each on a free port with its own folder, gone when its test is.

    pg          one PostgreSQL for the session        pg_db     dsn of a fresh database in it
    own_pg      a PostgreSQL of the test's own, to be stopped and killed
    bin17       the folder of PostgreSQL 17's programs, with wal2json 2.6 (marker: pg17)
    nats        one nats-server for the session       own_nats  one of the test's own
    nats_cluster   three nats-servers in one cluster, behind proxies (cluster.py)
    osmem       an in-memory search engine
    opensearch, elasticsearch   real nodes (marker: engine)
    natscli     path of the nats command line tool (marker: natscli)
    proxied     makes a `Proxy` to a port: cut, hold, strand, delay, refuse

Async tests say `pytestmark = pytest.mark.anyio`.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
from hypothesis import HealthCheck, settings

from bridge.embedded import NatsServer, Postgres, SearchEngine
from tests import servers
from tests.cluster import NatsCluster
from tests.databases import database
from tests.proxy import Proxy
from tests.scheduling import by_cost

MARKED_BY_FIXTURE = {"opensearch": "engine", "elasticsearch": "engine", "natscli": "natscli", "bin17": "pg17"}

# How fast a shared machine draws examples says nothing of the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_report_header() -> list[str]:
    return servers.report()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, marker in MARKED_BY_FIXTURE.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


def pytest_collection_finish() -> None:
    """What is there by now stays for ever, as a command does it (`console`): a collection goes through what a test
    made, not through all tests there are, and holds up what runs in this process no longer than it does there."""
    gc.collect()
    gc.freeze()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return by_cost(config, log) if config.getoption("dist") == "loadscope" else None


@pytest.fixture(autouse=True)
def log_defaults() -> Iterator[None]:
    """What a command run in this process says of logging ends with its test."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
async def pg() -> AsyncIterator[Postgres]:
    async with Postgres.throwaway(fsync=False) as server:
        yield server


@pytest.fixture
async def pg_db(pg: Postgres) -> AsyncIterator[str]:
    async with database(pg) as dsn:
        yield dsn


@pytest.fixture
async def own_pg() -> AsyncIterator[Postgres]:
    # A killed process loses nothing that it wrote: fsync matters only to a machine that loses power.
    async with Postgres.throwaway(fsync=False) as server:
        yield server


@pytest.fixture(scope="session")
def bin17() -> Iterator[Path]:
    with servers.postgres17() as bindir:
        yield bindir


@pytest.fixture(scope="session")
async def nats() -> AsyncIterator[NatsServer]:
    async with NatsServer.throwaway() as server:
        yield server


@pytest.fixture
async def own_nats() -> AsyncIterator[NatsServer]:
    async with NatsServer.throwaway() as server:
        yield server


@pytest.fixture(scope="session")
async def osmem() -> AsyncIterator[SearchEngine]:
    async with SearchEngine.throwaway() as server:
        yield server


@pytest.fixture(scope="session")
async def opensearch() -> AsyncIterator[servers.OpenSearch]:
    if shutil.which("java") is None:
        servers.missing("java is not installed")
    servers.fetched("opensearch")
    async with servers.OpenSearch.throwaway() as server:
        yield server


@pytest.fixture(scope="session")
async def elasticsearch() -> AsyncIterator[servers.Elasticsearch]:
    if shutil.which("java") is None:
        servers.missing("java is not installed")
    servers.fetched("elasticsearch")
    async with servers.Elasticsearch.throwaway() as server:
        yield server


@pytest.fixture(scope="session")
def natscli() -> Path:
    return servers.fetched("nats") / "nats"


@pytest.fixture
async def proxied() -> AsyncIterator[Callable[[int], Proxy]]:
    # One task group around the whole test: groups that a test opens close inside of it, whatever their order.
    async with anyio.create_task_group() as tasks:
        yield lambda target: Proxy(target, tasks)
        tasks.cancel_scope.cancel()


@pytest.fixture
async def nats_cluster(proxied: Callable[[int], Proxy]) -> AsyncIterator[NatsCluster]:
    async with NatsCluster.throwaway(proxied) as cluster:
        yield cluster
