"""Real servers for the tests beyond those that the package itself can start, and what they run against.

Everything fetched is kept in $BRIDGE_CACHE (default ~/.cache/bridge-tests), outside the checkout.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest

from bridge.embedded import Keeper, Server, until
from bridge.embedded.nats import find_program
from bridge.embedded.postgres import find_installation, server_user
from bridge.embedded.process import alive, children, throwaway_folder
from bridge.embedded.search import http_get
from bridge.errors import BridgeError

CACHE = Path(os.environ.get("BRIDGE_CACHE") or Path.home() / ".cache" / "bridge-tests")
ENGINES = Path(__file__).parent / "engines"


class OpenSearch(Server):
    """A real OpenSearch node in a Java process of its own; ready in 5 to 15 seconds, about 400 MB."""

    name = "OpenSearch"
    start_deadline = 120.0

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


class Elasticsearch(Server):
    """A real Elasticsearch node, in the form that Elastic publishes for integration tests: without by-query APIs,
    scripts and most analyzers. Ready in 10 to 20 seconds, about 500 MB."""

    name = "Elasticsearch"
    start_deadline = 120.0

    @classmethod
    @asynccontextmanager
    async def throwaway(cls) -> AsyncIterator[Elasticsearch]:
        """A running, empty node; stopped and deleted at the end."""
        user = server_user()  # it refuses root, too
        home = throwaway_folder(user)
        server = cls(home, Keeper(home, user))
        try:
            server._install()
            if user is not None:
                for folder in (home, *home.glob("[!e]*"), *(home / "config").rglob("*")):
                    os.chown(folder, *user)
            await server.start()
            yield server
        finally:
            await server.close()

    def _install(self) -> None:
        """The program where any user may read it, and the node's own folders."""
        shutil.copytree(CACHE / "elasticsearch", self.home / "elasticsearch", copy_function=_link)
        shutil.copytree(CACHE / "elasticsearch" / "config", self.home / "config")
        for name in ("data", "logs", "tmp", "elasticsearch/plugins"):
            (self.home / name).mkdir(exist_ok=True)
        (self.home / "elasticsearch").chmod(0o755)
        options = "-Xms512m\n-Xmx512m\n-XX:-UseG1GC\n-XX:+UseSerialGC\n-XX:TieredStopAtLevel=1\n-XX:-AlwaysPreTouch\n"
        folder = self.home / "config" / "jvm.options.d"
        folder.mkdir(exist_ok=True)
        (folder / "tests.options").write_text(options)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def _command(self) -> list[str | Path]:
        settings = {
            "discovery.type": "single-node",
            "network.host": self.host,
            "http.port": self.port,
            "transport.port": 0,
            "path.data": self.home / "data",
            "path.logs": self.home / "logs",
            "xpack.security.enabled": "false",
            "action.destructive_requires_name": "false",
            # A test machine's full disk would make every index read-only.
            "cluster.routing.allocation.disk.threshold_enabled": "false",
        }
        return [
            self.home / "elasticsearch" / "bin" / "elasticsearch",
            *(word for name, value in settings.items() for word in ("-E", f"{name}={value}")),
        ]

    def _environment(self) -> dict[str, str]:
        java = Path(shutil.which("java") or "java").resolve().parents[1]
        # What is set here for other programs that run on Java is not meant for this one.
        own = {name: value for name, value in super()._environment().items() if not name.startswith(("ES_", "JAVA_"))}
        return {
            **own,
            "ES_JAVA_HOME": str(java),
            "ES_PATH_CONF": str(self.home / "config"),
            "ES_TMPDIR": str(self.home / "tmp"),
            "HOME": str(self.home),
        }

    async def _ready(self) -> bool:
        status, body = await http_get(self.host, self.port, "/_cluster/health")
        return status == 200 and json.loads(body)["status"] in {"yellow", "green"}

    async def kill(self) -> None:
        """SIGKILL of the node, which is a child of the process that was started."""
        nodes = children(self.pid)
        for pid in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await super().kill()
        await until(lambda: not any(map(alive, nodes)), 20, "the node has ended")


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def postgres17() -> Iterator[Path]:
    """The folder of the programs of PostgreSQL 17 or newer with wal2json: this machine's own, or fetched ones, where
    any user may run them. Skips the test where there is neither: not every distribution has packages of that one."""
    with contextlib.suppress(BridgeError):
        if _major(own := find_installation()) >= 17:
            yield own
            return
    home = throwaway_folder(server_user())
    try:
        shutil.copytree(fetched("postgres17", must=False), home / "postgres", copy_function=_link, symlinks=True)
        (home / "postgres").chmod(0o755)
        yield home / "postgres" / "bin"
    finally:
        shutil.rmtree(home)


def fetched(what: str, *, must: bool = True) -> Path:
    """Where `what` (a name that engines/fetch knows) is in the cache, fetched now if it is not there yet.

    A test that needs it is skipped where it cannot be fetched; with CI set it fails if it must be there.
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
            why = f"{what} cannot be fetched: {(fetch.stderr or fetch.stdout)[-500:]}"
            if not must:
                pytest.skip(why)
            missing(why)
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
    major = _major(bindir)
    plugin = "version unknown"
    if shutil.which("dpkg-query"):
        query = ["dpkg-query", "-W", "-f=${Version}", f"postgresql-{major}-wal2json"]
        plugin = _first_line(query) or plugin
    return f"{server}, wal2json {plugin}"


def _major(bindir: Path) -> int:
    """The major version of a PostgreSQL; 0 where it does not say it."""
    words = _first_line([str(bindir / "postgres"), "--version"]).split()
    digits = words[2].split(".")[0] if len(words) > 2 else ""
    return int(digits) if digits.isdigit() else 0


def _nats_server() -> str:
    try:
        return _first_line([str(find_program()), "--version"]).replace(":", "")
    except BridgeError as error:
        return error.what


def _engines() -> str:
    jars = sorted((CACHE / "opensearch").glob("opensearch-core-*.jar"))
    real = jars[-1].stem.replace("opensearch-core-", "OpenSearch ") if jars else "no OpenSearch"
    jars = sorted((CACHE / "elasticsearch" / "lib").glob("elasticsearch-[0-9]*.jar"))
    other = jars[-1].stem.replace("elasticsearch-", "Elasticsearch ") if jars else "no Elasticsearch"
    return f"osmem-server {_version('osmem-server')}, {real}, {other}"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip()
