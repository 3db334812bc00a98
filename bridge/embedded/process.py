"""Child servers of this process: started, watched, stopped, and gone with it whatever ends it.

Each server has a `Keeper` (keeper.py): a tiny process that holds the other end of a socket, stops the server and
deletes its folder when this process goes away. Children are in sessions of their own: Ctrl-C in a terminal
reaches only the parent, which then stops them in order.

This package handles servers only; it knows nothing of sources, streams and indexes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import anyio

from bridge import waiting
from bridge.embedded import keeper
from bridge.errors import ServerRefused

GRACE = 20.0
PORT_TRIES = 20
IN_USE = "address already in use"
# Below Linux's ephemeral range: there a client that tries again and again while its server restarts may be given
# the server's own port, and connect to itself.
PORTS = range(15_000, 32_000)


async def until(condition: Callable[[], object], deadline: float, what: str) -> None:
    """Polls until `condition` (plain or async) is true, more seldom the longer it takes.

    Raises:
        TimeoutError: it was not true within `deadline` seconds; `what` names the state that was waited for.
    """

    async def holds() -> bool:
        value = condition()
        return bool(await value if isinstance(value, Awaitable) else value)

    if not await waiting.until(holds, seconds=deadline, every=0.01, at_last=0.05):
        raise TimeoutError(f"not within {deadline:g} s: {what}")


_given: deque[int] = deque(maxlen=1_000)


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on at this moment, and none that was given just now: whom
    it was given to may not listen on it yet."""
    for port in random.sample(PORTS, 200):
        if port not in _given and port_is_free(port):
            _given.append(port)
            return port
    raise ServerRefused("no free TCP port was found on 127.0.0.1", "end what listens on so many ports")


def port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def alive(pid: int) -> bool:
    """Whether the process runs, whoever owns it; one that nobody has reaped yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with contextlib.suppress(OSError):
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    return True


def children(pid: int) -> list[int]:
    """The child processes of all threads of `pid`; none where there is no /proc."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in thread.read_text().split()]
    return found


def tail(log: Path, since: int = 0, size: int = 2000) -> str:
    """The end of what a server has logged from position `since` on, for an error message."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - size))
        return file.read().decode(errors="replace").strip()
    return ""


class Keeper:
    """The parent's end of a keeper process; the process is started when it is first needed.

    Args:
        folder: deleted when the keeper ends.
        user: (uid, gid) that children run as, or None for our own.
        inherit: descriptors that keeper and children hold as long as they live (a lock's).
    """

    def __init__(self, folder: Path | None, user: tuple[int, int] | None = None, inherit: Sequence[int] = ()) -> None:
        self._options = {"folder": folder and str(folder), "user": user, "inherit": list(inherit)}
        self._inherit = list(inherit)
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._buffer = b""
        self._reading = anyio.Lock()
        self._grace = GRACE
        self._failed: str | None = None
        self.pid: int | None = None
        self.exit_code: int | None = None

    @property
    def keeper_pid(self) -> int:
        """The keeper process; 0 while there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    @property
    def running(self) -> bool:
        """Whether the child lives, as far as has been reported."""
        self._read()
        return self.pid is not None and self.exit_code is None

    async def spawn(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path,
        log: Path,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace: float = GRACE,
    ) -> int:
        """Starts a child and returns its pid. The last one must have ended.

        Raises:
            ServerRefused: it could not be started.
        """
        if self._link is None or not self.keeper_pid:
            self._launch()
        self.pid = self.exit_code = self._failed = None
        self.pid, self.exit_code, self._failed = None, None, None
        self._grace = grace
        order = {"do": "start", "argv": [str(arg) for arg in argv], "cwd": str(cwd), "log": str(log)}
        self._send({**order, "env": env and dict(env), "stop": int(stop_signal), "grace": grace})
        await self._report(self._answered)
        return self._spawned(Path(argv[0]).name)

    async def wait(self) -> int:
        """Waits for the child's end and returns its exit code (negative: the signal that killed it)."""
        await self._report(lambda: self.exit_code is not None)
        assert self.exit_code is not None
        return self.exit_code

    def signal(self, number: int) -> None:
        """Sends a signal to the child; nothing happens if it has ended."""
        self._send({"do": "signal", "signal": int(number)})

    async def close(self) -> None:
        """Ends keeper and child, and waits until both and the folder are gone."""
        process = self._process
        if self._link is not None:
            self._link.close()
            self._link = None
        with anyio.CancelScope(shield=True):
            if process is not None:
                deadline = self._grace + keeper.FOLDER_DEADLINE + 5
                await until(lambda: process.poll() is not None, deadline, "a server's keeper has ended")
            self._process = None
            if folder := self._options["folder"]:
                shutil.rmtree(str(folder), ignore_errors=True)

    def _launch(self) -> None:
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._link, theirs = socket.socketpair()
        self._link.setblocking(False)
        self._buffer = b""
        with theirs:
            arguments = [str(theirs.fileno()), json.dumps(self._options)]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *self._inherit],
                start_new_session=True,
            )

    def _send(self, order: dict[str, Any]) -> None:
        if self._link is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._link.send(json.dumps(order).encode() + b"\n")

    def _spawned(self, name: str) -> int:
        if self.pid is None:
            reason = self._failed or "its keeper died"
            raise ServerRefused(f"cannot start {name}: {reason}", "see whether the program can be run by hand")
        return self.pid

    def _answered(self) -> bool:
        return bool(self.pid or self._failed or self.exit_code is not None)

    async def _report(self, condition: Callable[[], bool]) -> None:
        while True:
            # Only one task may wait for a descriptor; the others are served by what it reads.
            async with self._reading:
                self._read()
                if condition() or self._link is None:
                    return
                await anyio.wait_readable(self._link)

    def _read(self) -> None:
        while self._link is not None:
            try:
                data = self._link.recv(65536)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                # The keeper was killed, and by the kernel's hand the child with it.
                self._link.close()
                self._link = None
                if self.exit_code is None:
                    self.exit_code = -signal.SIGKILL
                return
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                report = json.loads(line)
                self.pid = report.get("pid", self.pid)
                self.exit_code = report.get("exit", self.exit_code)
                self._failed = report.get("failed", self._failed)


class Server(ABC):
    """One server on a loopback port. The port is chosen at the first start and kept by all later ones.

    Use it as an async context manager, or call `start` and `close`. `home` is the server's own folder.

    Args:
        firm: whether it must be that port; else it is a wish, and another one where somebody has taken it.
    """

    name: str
    stop_signal = signal.SIGTERM
    start_deadline = 60.0
    grace = GRACE
    host = "127.0.0.1"

    def __init__(self, home: Path, keeper: Keeper, port: int = 0, *, firm: bool = True) -> None:
        self.home = home
        self.port = port
        self.log = home / "server.log"
        self._keeper = keeper
        self._fixed_port = port != 0 and firm
        self._started = False

    @property
    def pid(self) -> int:
        """The server process; 0 before the first start."""
        return self._keeper.pid or 0

    @property
    def keeper_pid(self) -> int:
        """The process that ends the server when this one is gone; 0 while there is none."""
        return self._keeper.keeper_pid

    @property
    def running(self) -> bool:
        return self._keeper.running

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Starts the server and waits until it serves.

        Raises:
            ServerRefused: it ended at once; the message has the end of its log.
            TimeoutError: it was not ready within `start_deadline` seconds, and still runs.
        """
        log_start = 0
        for attempt in range(PORT_TRIES):
            if not self.port or (attempt and not self._fixed_port and not self._started):
                self.port = free_port()
            log_start = self.log.stat().st_size if self.log.exists() else 0
            await self._keeper.spawn(
                self._command(),
                cwd=self.home,
                log=self.log,
                env=self._environment(),
                stop_signal=self.stop_signal,
                grace=self.grace,
            )

            async def ready() -> bool:
                return not self.running or await self._ready()

            await until(
                ready, self.start_deadline, f"{self.name} on port {self.port} is ready\n{tail(self.log, log_start)}"
            )
            if self.running:
                self._started = True
                return
            # Somebody may have taken the port between our choice and the server's bind.
            taken = not port_is_free(self.port) or IN_USE in tail(self.log, log_start).lower()
            if self._fixed_port or self._started or not taken:
                break
        raise ServerRefused(
            f"{self.name} ended with code {self._keeper.exit_code} while it started on port {self.port}:\n"
            f"{tail(self.log, log_start)}",
            f"look at the last lines of its log, {self.log}",
        )

    async def stop(self) -> int:
        """Stops the server in order and returns its exit code; its data stay.

        Raises:
            TimeoutError: it had not stopped within `grace` seconds, and still runs.
        """
        return await self._end(self.stop_signal, self.grace)

    async def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        await self._end(signal.SIGKILL, GRACE)

    async def restart(self) -> None:
        """Stops and starts again: same port, same data."""
        await self.stop()
        await self.start()

    def signal(self, number: int) -> None:
        """Sends any signal, SIGSTOP and SIGCONT for example."""
        self._keeper.signal(number)

    async def wait(self) -> int:
        """Waits for the server's end and returns its exit code."""
        return await self._keeper.wait()

    async def close(self) -> None:
        """Ends the server for good; nothing of it is left, its throwaway folder neither."""
        await self._keeper.close()

    async def _end(self, number: int, deadline: float) -> int:
        if not self.pid:
            return 0
        self._keeper.signal(number)
        try:
            with anyio.fail_after(deadline):
                return await self._keeper.wait()
        except TimeoutError:
            raise TimeoutError(f"{self.name} did not stop within {deadline:g} s\n{tail(self.log)}") from None

    @abstractmethod
    def _command(self) -> list[str | Path]: ...

    @abstractmethod
    async def _ready(self) -> bool: ...

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "LC_ALL": "C"}


def throwaway_folder(user: tuple[int, int] | None = None) -> Path:
    """A new folder for one server, owned by the user that the server runs as."""
    folder = Path(tempfile.mkdtemp(prefix="bridge-"))
    if user is not None:
        os.chown(folder, *user)
    return folder
