"""What the page may do for who has the token: start and cancel a snapshot of a table, or a rebuild of an index.

A snapshot is asked for as `bridge snapshot` does it: the running bridge takes it up. A rebuild is the command
`bridge reindex` itself, a process of its own, so that its work never holds up the stream; what it says goes to this
process's stderr, and its last words to the page. Stopping the bridge cancels it as SIGTERM does.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any, Literal

import anyio
import anyio.abc
import msgspec
from aiohttp import web
from anyio.streams.text import TextReceiveStream

from bridge import errors, log
from bridge.config import Config
from bridge.errors import BridgeError, Unavailable
from bridge.operate import site, snapshot
from bridge.operate.answer import json
from bridge.operate.site import Refused, Request
from bridge.stream.server import Servers

WITHIN = 20.0
TIDY_SECONDS = 15.0
KEPT = 10
LONGEST_NAME = 300
SAYS = "bridge: "


class Act(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /actions: what to do, to which table or index."""

    do: Literal["snapshot", "cancel-snapshot", "reindex", "cancel-reindex"]
    name: str


class Job(msgspec.Struct):
    """A rebuild that the page has begun; `said` are its last words."""

    name: str
    since: str
    state: Literal["running", "cancelling", "done", "failed", "cancelled"] = "running"
    said: str = ""


class Actions:
    """Does what is asked for; `tasks` run the rebuilds."""

    def __init__(self, settings: Config, servers: Servers, again: list[str], tasks: anyio.abc.TaskGroup) -> None:
        self._settings = settings
        self._servers = servers
        self._again = again
        self._tasks = tasks
        self._jobs: list[Job] = []
        self._processes: dict[str, anyio.abc.Process | None] = {}

    def jobs(self) -> list[dict[str, Any]]:
        """The rebuilds that were begun here, the newest last."""
        return [msgspec.to_builtins(job) for job in self._jobs]

    async def answer(self, request: Request) -> web.StreamResponse:
        """Do it; 202 where it is under way, 200 where it is done."""
        act: Act = await site.body(request, Act)
        if len(act.name) > LONGEST_NAME:
            raise Refused(400, "the name is too long")
        log.get().info("asked by the page", action=act.do, name=act.name)
        if act.do == "reindex":
            return self._rebuild(act.name)
        if act.do == "cancel-reindex":
            return self._cancel(act.name)
        return await self._snapshot(act)

    async def _snapshot(self, act: Act) -> web.StreamResponse:
        asked = snapshot.Asked((act.name,), "ask" if act.do == "snapshot" else "cancel")
        if "*" in act.name or "?" in act.name:
            raise Refused(400, "name one table")
        try:
            with anyio.fail_after(WITHIN):
                told = await snapshot.snapshot(self._settings, self._servers, asked)
        except TimeoutError:
            raise Refused(504, f"NATS has not answered within {WITHIN:g} s") from None
        except BridgeError as error:
            raise Refused(503 if isinstance(error, Unavailable) else 409, str(error)) from None
        if told.idle:
            raise Refused(409, f"{act.name} is not being read")
        return json({"said": f"{act.name}: {'asked for' if act.do == 'snapshot' else 'cancelled'}"}, 202)

    def _rebuild(self, name: str) -> web.StreamResponse:
        if name not in self._settings.index:
            raise Refused(409, f"no index {name} is configured here")
        if name in self._processes:
            raise Refused(409, f"{name} is being rebuilt already")
        job = Job(name, datetime.now(UTC).isoformat(timespec="seconds"))
        self._jobs = [*self._jobs[1 - KEPT :], job]
        self._processes[name] = None
        self._tasks.start_soon(self._run, job)
        return json({"said": f"{name}: rebuild begun"}, 202)

    def _cancel(self, name: str) -> web.StreamResponse:
        process = self._processes.get(name)
        if process is None:
            raise Refused(409, f"no rebuild of {name} was begun here: cancel it where it was begun")
        self._signal(name, process)
        return json({"said": f"{name}: being cancelled"}, 202)

    def _signal(self, name: str, process: anyio.abc.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        for job in self._jobs:
            if job.name == name and job.state == "running":
                job.state = "cancelling"

    async def _run(self, job: Job) -> None:
        command = [*self._again, "reindex", job.name]
        try:
            process = await anyio.open_process(command, stdin=subprocess.DEVNULL)
        except OSError as error:
            self._processes.pop(job.name, None)
            job.state, job.said = "failed", f"it could not be started: {error.strerror}"
            return
        self._processes[job.name] = process
        try:
            async with anyio.create_task_group() as both:
                both.start_soon(_words, job, process.stderr)
                both.start_soon(_words, job, process.stdout)
            code = await process.wait()
        finally:
            # The bridge is stopping: what was begun is taken away, as the command does it.
            if process.returncode is None:
                self._signal(job.name, process)
                with anyio.move_on_after(TIDY_SECONDS, shield=True):
                    await process.wait()
            with anyio.CancelScope(shield=True):
                if process.returncode is None:
                    process.kill()
                await process.aclose()
            self._processes.pop(job.name, None)
        cancelled = code == errors.EXIT_INTERRUPTED or job.state == "cancelling"
        job.state = "done" if code == errors.EXIT_DONE else "cancelled" if cancelled else "failed"


async def _words(job: Job, stream: anyio.abc.ByteReceiveStream | None) -> None:
    """Pass on what the command says; what it prints of its result or error is kept for the page."""
    assert stream is not None
    rest = ""
    async for part in TextReceiveStream(stream, errors="replace"):
        sys.stderr.write(part)
        sys.stderr.flush()
        *lines, rest = (rest + part).split("\n")
        for line in lines:
            if line.startswith(SAYS) or "→" in line:
                said = line.removeprefix(SAYS).strip()
                job.said = f"{job.said} {said}".strip() if line.startswith("  ") else said
