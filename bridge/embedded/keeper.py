"""Keeps child servers for a parent and outlives that parent only long enough to clean up.

Run as `python -I -S keeper.py FD OPTIONS`; the standard library alone, so that it starts in milliseconds.
FD is a socket to the parent. When its other end closes, for whatever reason (SIGKILL included), the child is
stopped in order, then by force, and the folder named in OPTIONS is deleted. Should the keeper itself be killed,
Linux kills the child with it.

OPTIONS, JSON: {"folder": path to delete at the end or null, "user": [uid, gid] or null, "inherit": [fd, ...]}.
The parent sends one JSON object a line:
    {"do": "start", "argv", "cwd", "env", "log", "stop": signal, "grace": seconds}    one child at a time
    {"do": "signal", "signal": number}
and receives {"pid": n} or {"failed": text} for each start, and {"exit": code} when the child has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1
FOLDER_DEADLINE = 20.0


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None


def _before_exec(user: tuple[int, int] | None) -> Callable[[], None]:
    """What the forked child does before it becomes the server."""
    libc = _libc()
    keeper = os.getpid()

    def prepare() -> None:
        if user is not None:
            os.setgroups([])
            os.setgid(user[1])
            os.setuid(user[0])
        if libc is not None:
            # After setuid, which clears it. It is tied to the parent's thread: the keeper has only one.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:
                os.kill(os.getpid(), signal.SIGKILL)

    return prepare


class Keeper:
    def __init__(self, link: socket.socket, options: dict[str, Any]) -> None:
        self._link = link
        self._folder: str | None = options["folder"]
        self._user: tuple[int, int] | None = tuple(options["user"]) if options["user"] else None
        self._inherit: list[int] = options["inherit"]
        self._child: subprocess.Popen[bytes] | None = None
        self._stop_signal = int(signal.SIGTERM)
        self._grace = 0.0

    def run(self) -> None:
        try:
            self._serve()
        finally:
            self._end_child()
            self._remove_folder()

    def _serve(self) -> None:
        wake, woken = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        selector = selectors.DefaultSelector()
        selector.register(self._link, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        buffer = b""
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if wake in ready:
                with contextlib.suppress(BlockingIOError):
                    wake.recv(4096)
                self._reap()
            if self._link in ready:
                try:
                    data = self._link.recv(65536)
                except ConnectionResetError:
                    return
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))

    def _obey(self, order: dict[str, Any]) -> None:
        self._reap()
        if order["do"] == "start":
            self._start(order)
        elif self._child is not None:
            self._child.send_signal(order["signal"])

    def _start(self, order: dict[str, Any]) -> None:
        if self._child is not None:
            self._tell(failed="the child of the last start still runs")
            return
        self._stop_signal, self._grace = order["stop"], order["grace"]
        try:
            with open(order["log"], "ab") as log:
                self._child = subprocess.Popen(
                    order["argv"],
                    cwd=order["cwd"],
                    env=order["env"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=self._inherit,
                    process_group=0,
                    preexec_fn=_before_exec(self._user),
                )
        except (OSError, subprocess.SubprocessError) as error:
            self._tell(failed=f"{order['argv'][0]}: {error}")
        else:
            self._tell(pid=self._child.pid)

    def _reap(self) -> None:
        if self._child is not None and (code := self._child.poll()) is not None:
            self._child = None
            self._tell(exit=code)

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None or child.poll() is not None:
            return
        child.send_signal(self._stop_signal)
        child.send_signal(signal.SIGCONT)  # a stopped process would take notice of nothing but SIGKILL
        try:
            child.wait(self._grace)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _remove_folder(self) -> None:
        # Helpers of a killed server (PostgreSQL's backends) may write for some moments more.
        deadline = time.monotonic() + FOLDER_DEADLINE
        while self._folder is not None and os.path.lexists(self._folder) and time.monotonic() < deadline:
            shutil.rmtree(self._folder, ignore_errors=True)
            time.sleep(0.02)

    def _tell(self, **report: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._link.sendall(json.dumps(report).encode() + b"\n")


def _ignore(_signal: int, _frame: object) -> None:
    """Handlers, unlike SIG_IGN, are not inherited by the child."""


def main() -> None:
    # A service manager that stops a whole group of processes means the parent; the keeper follows when that ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ignore)
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    Keeper(link, json.loads(sys.argv[2])).run()


if __name__ == "__main__":
    main()
