"""A throwaway PostgreSQL cluster with wal2json: own folder, own port, trusted loopback connections."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from bridge.embedded.process import GRACE, Keeper, Server, alive, children, tail, throwaway_folder, until
from bridge.errors import ServerMissing, ServerRefused

StopMode = Literal["smart", "fast", "immediate"]
SETTINGS = {
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
}
SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
SOCKET_PATH_LIMIT = 80


class Postgres(Server):
    """One cluster. `Postgres.throwaway()` makes it; superuser `postgres`, database `postgres`."""

    name = "PostgreSQL"
    # What the keeper sends when this process is gone: the data are thrown away, no checkpoint is needed.
    stop_signal = signal.SIGQUIT

    def __init__(self, home: Path, keeper: Keeper, bindir: Path, port: int = 0) -> None:
        super().__init__(home, keeper, port)
        self.bindir = bindir
        self.data_dir = home / "data"

    @classmethod
    @asynccontextmanager
    async def throwaway(
        cls, *, settings: Mapping[str, str] | None = None, fsync: bool = True, bindir: Path | None = None
    ) -> AsyncIterator[Postgres]:
        """A new running cluster; stopped and deleted at the end.

        Args:
            settings: further lines of postgresql.conf.
            fsync: False for tests in which no crash of the machine is imitated.
            bindir: the folder of `initdb` and `postgres`; by default the newest installation with wal2json.
        """
        bindir = bindir or find_installation()
        user = server_user()
        home = throwaway_folder(user)
        keeper = Keeper(home, user)
        server = cls(home, keeper, bindir)
        try:
            await server._create({**SETTINGS, "fsync": "on" if fsync else "off", **(settings or {})})
            await server.start()
            yield server
        finally:
            await server.close()

    def dsn(self, dbname: str = "postgres", user: str = "postgres", **parameters: str) -> str:
        """A connection URI; `parameters` are further libpq parameters."""
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
        base = f"postgresql://{quote(user, safe='')}@{self.host}:{self.port}/{quote(dbname, safe='')}"
        return f"{base}?{query}" if query else base

    async def stop(self, deadline: float = GRACE, mode: StopMode = "fast") -> int:
        """As `pg_ctl stop -m`: "smart" waits for clients, "fast" for walsenders, "immediate" for nobody.

        Raises:
            TimeoutError: it had not stopped within `deadline` seconds, and still runs.
        """
        return await self._end(SIGNALS[mode], deadline)

    async def restart(self, mode: StopMode = "fast") -> None:
        """Stops and starts again: same port, same data."""
        await self.stop(mode=mode)
        await self.start()

    async def kill(self) -> None:
        """SIGKILL of the postmaster, and waits until its backends have noticed: they hold the shared memory."""
        backends = children(self.pid)
        await super().kill()
        await until(lambda: not any(map(alive, backends)), GRACE, "the backends have ended")

    async def _create(self, settings: dict[str, str]) -> None:
        await self._run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        if plugins := await self._output_plugins():
            settings = {"output_plugin_libraries": plugins, **settings}
        if len(str(self.home)) < SOCKET_PATH_LIMIT:
            settings = {"unix_socket_directories": str(self.home), **settings}
        else:
            settings = {"unix_socket_directories": "", **settings}
        quoted = [f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items()]
        with (self.data_dir / "postgresql.conf").open("a") as config:
            config.writelines(quoted)

    async def _output_plugins(self) -> str | None:
        """The value of output_plugin_libraries with wal2json in it, or None where the server has no such setting.

        From some minor releases on a plugin must be listed; older servers do not start with the unknown name.
        """
        listed = await self._run("postgres", "-C", "output_plugin_libraries", check=False)
        if listed is None:
            return None
        names = [name.strip() for name in listed.splitlines()[-1].split(",") if name.strip()] if listed else []
        return ", ".join(dict.fromkeys([*names, "wal2json"]))

    async def _run(self, program: str, *arguments: str, check: bool = True) -> str | None:
        """What the program printed, or None if it failed and `check` is False."""
        output = self.home / f"{program}.out"
        command = [str(self.bindir / program), "-D", str(self.data_dir), *arguments]
        environment = self._environment()
        await self._keeper.spawn(command, cwd=self.home, log=output, env=environment)
        if await self._keeper.wait() == 0:
            return tail(output)
        if check:
            raise ServerRefused(f"{program} failed: {tail(output)}", f"see whether {self.bindir / program} runs")
        return None

    def _command(self) -> list[str | Path]:
        listen = ["-c", f"listen_addresses={self.host}", "-p", str(self.port)]
        return [self.bindir / "postgres", "-D", self.data_dir, *listen]

    async def _ready(self) -> bool:
        # The eighth line of the pid file, as pg_ctl does it: no connection, no doubt about whose server answers.
        with contextlib.suppress(OSError):
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
            return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() in ("ready", "standby")
        return False

    def _environment(self) -> dict[str, str]:
        # PGDATA, PGPORT and their like are meant for other servers.
        return {name: value for name, value in super()._environment().items() if not name.startswith("PG")}


def server_user() -> tuple[int, int] | None:
    """Whom PostgreSQL runs as: it refuses root, so then `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise ServerMissing("PostgreSQL refuses to run as root, and there is no user to run it as", "useradd postgres")


def find_installation() -> Path:
    """The folder of the newest PostgreSQL's programs that has wal2json beside it.

    Raises:
        ServerMissing: there is none, or none with wal2json.
    """
    found: list[tuple[int, Path]] = []
    without: list[int] = []
    for bindir in _candidates():
        version = _major_version(bindir)
        if version is None:
            continue
        if any((folder / "wal2json.so").exists() for folder in _library_folders(bindir)):
            found.append((version, bindir))
        else:
            without.append(version)
    if found:
        return max(found)[1]
    if without:
        package = f"apt-get install postgresql-{max(without)}-wal2json"
        raise ServerMissing(f"PostgreSQL {max(without)} has no wal2json", package)
    raise ServerMissing(
        "no PostgreSQL server is installed", "apt-get install postgresql postgresql-NN-wal2json (NN: its version)"
    )


def _candidates() -> list[Path]:
    bindirs = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    if (config := shutil.which("pg_config")) and (bindir := _output(config, "--bindir")):
        bindirs.append(Path(bindir))
    if postgres := shutil.which("postgres"):
        bindirs.append(Path(postgres).resolve().parent)
    return [folder for folder in dict.fromkeys(bindirs) if (folder / "initdb").exists()]


def _library_folders(bindir: Path) -> list[Path]:
    folders = [bindir.parent / "lib"]
    if (bindir / "pg_config").exists():
        folders.append(Path(_output(str(bindir / "pg_config"), "--pkglibdir")))
    return folders


def _major_version(bindir: Path) -> int | None:
    words = _output(str(bindir / "postgres"), "--version").split()
    digits = words[2].split(".")[0] if len(words) > 2 else ""
    number = "".join(character for character in digits if character.isdigit())
    return int(number) if number else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
