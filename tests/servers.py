"""Real servers for the tests beyond those that the package itself can start, and what they run against.

Everything fetched is kept in $BRIDGE_CACHE (default ~/.cache/bridge-tests), outside the checkout.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest

from bridge.embedded import Keeper, Server
from bridge.embedded.nats import find_program
from bridge.embedded.postgres import find_installation
from bridge.embedded.process import throwaway_folder
from bridge.embedded.search import http_get
from bridge.errors import BridgeError

CACHE = Path(os.environ.get("BRIDGE_CACHE") or Path.home() / ".cache" / "bridge-tests")
ENGINES = Path(__file__).parent / "engines"


class OpenSearch(Server):
    """A real OpenSearch node in a Java process of its own; ready in 5 to 15 seconds, about 400 MB."""

    name = "OpenSearch"

    @classmethod
    @asynccontextmanager
    async def throwaway(cls) -> AsyncIterator[OpenSearch]:
        """A running, empty node; stopped and deleted at the end."""
        home = throwaway_folder()
        async with cls(home, Keeper(home)) as server:
            yield server

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def _command(self) -> list[str | Path]:
        heap = ["-Xms512m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        quiet = ["-Dlog4j2.disable.jmx=true", "-Dlog4j.shutdownHookEnabled=false", f"-Djava.io.tmpdir={self.home}"]
        program = [str(ENGINES / "OpenSearchNode.java"), str(self.port), str(self.home / "node")]
        return ["java", *heap, *quiet, "-cp", f"{CACHE / 'opensearch'}/*", *program]

    async def _ready(self) -> bool:
        status, body = await http_get(self.host, self.port, "/_cluster/health")
        return status == 200 and json.loads(body)["status"] in {"yellow", "green"}


def fetched(what: str) -> Path:
    """Where `what` ("opensearch", "nats") is in the cache, fetched now if it is not there yet.

    A test that needs it is skipped where it cannot be fetched; with CI set it fails.
    """
    folder = CACHE / what
    if not folder.exists():
        fetch = subprocess.run(
            [ENGINES / "fetch", what],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "BRIDGE_CACHE": str(CACHE)},
            check=False,
        )
        if fetch.returncode != 0:
            missing(f"{what} cannot be fetched: {(fetch.stderr or fetch.stdout)[-500:]}")
    return folder


def missing(reason: str) -> NoReturn:
    """Skips the test, or fails it where CI is set: there everything must be installed."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def report() -> list[str]:
    """What the tests run against, for the header."""
    libpq = psycopg.pq.version()
    return [
        f"bridge: Python {platform.python_version()}, {', '.join(_packages())}",
        f"servers: {_postgres()}, libpq {libpq // 10000}.{libpq % 10000}, {_nats_server()}, {_engines()}",
    ]


def _packages() -> list[str]:
    return [f"{name} {_version(name)}" for name in ("nats-py", "psycopg", "msgspec", "anyio", "uvloop")]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _postgres() -> str:
    try:
        bindir = find_installation()
    except BridgeError as error:
        return error.what
    server = _first_line([str(bindir / "postgres"), "--version"]).replace("postgres (PostgreSQL)", "PostgreSQL")
    major = server.split()[1].split(".")[0] if len(server.split()) > 1 else ""
    plugin = "version unknown"
    if shutil.which("dpkg-query"):
        query = ["dpkg-query", "-W", "-f=${Version}", f"postgresql-{major}-wal2json"]
        plugin = _first_line(query) or plugin
    return f"{server}, wal2json {plugin}"


def _nats_server() -> str:
    try:
        return _first_line([str(find_program()), "--version"]).replace(":", "")
    except BridgeError as error:
        return error.what


def _engines() -> str:
    jars = sorted((CACHE / "opensearch").glob("opensearch-core-*.jar"))
    real = jars[-1].stem.replace("opensearch-core-", "OpenSearch ") if jars else "no OpenSearch"
    return f"osmem-server {_version('osmem-server')}, {real}"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip()
