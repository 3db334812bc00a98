"""Rebuilds that a running bridge was asked for: each is a `bridge reindex` in a process of its own, one at a time.

A rebuild takes a core for minutes, holds documents in memory and runs the configuration's own transforms: none of that
may hold up the log. The process has the bridge's configuration, read anew, so that a mapping that was changed since
counts; it logs through the bridge, is cancelled as Ctrl-C would do it (what was begun is taken away), and ends with the
bridge.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import anyio
import msgspec
from anyio.abc import ByteReceiveStream, Process, TaskGroup

from bridge import log, reindex
from bridge.errors import EXIT_DONE, EXIT_INTERRUPTED, BridgeError, ConfigError, Contradiction, UsageError

# What a rebuild takes to end once it is told to: ten seconds to take away what it has begun, and then some.
ENDS_WITHIN = 15.0
# How long the answer to a request waits for the rebuild to have begun, or failed.
BEGINS_WITHIN = 3.0
LONGEST_LINE = 64 << 10
SAID_AT_MOST = 4000
# What a command says last that ends with an error.
FAILED = "command failed"
FLAGS = ("keep_old", "back", "drop_old", "replace_index")


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be done with an index; the options are those of `bridge reindex`. cancel: end the rebuild that runs;
    status: only say how far it is."""

    name: str
    until: str | int = ""
    keep_old: bool = False
    back: bool = False
    drop_old: bool = False
    replace_index: bool = False
    cancel: bool = False
    status: bool = False


class Rebuild(msgspec.Struct):
    """One that was asked for. done, total: events; rate: events a second; eta: seconds left, null where unknown. said:
    what it printed at its end; error and next: why it failed; code: its exit code."""

    name: str
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    phase: str = "starting"
    done: int = 0
    total: int = 0
    rate: float = 0.0
    eta: float | None = None
    began_at: str = ""
    ended_at: str = ""
    said: str = ""
    error: str = ""
    next: str = ""
    code: int = 0


class Busy(Contradiction):
    """Another rebuild runs; wait for it to end, or cancel it."""


class Failed(BridgeError):
    """A rebuild that has ended before it began; its exit code says what kind of error that was."""

    def __init__(self, what: str, remedy: str, exit_code: int) -> None:
        super().__init__(what, remedy)
        self.exit_code = exit_code


class Rebuilds:
    """Those of one bridge: the one that runs, and the last one of each index.

    Args:
        tasks: where they run; they are cancelled with it.
        options: the options that every command takes, such as --config.
        indexes: the names of those that can be rebuilt.
    """

    def __init__(self, tasks: TaskGroup, options: Sequence[str], indexes: Sequence[str]) -> None:
        self._tasks = tasks
        self._options = list(options)
        self._indexes = list(indexes)
        self._running: Rebuild | None = None
        self._stop = anyio.Event()
        self._news = anyio.Event()
        self.last: dict[str, Rebuild] = {}

    async def asked(self, asked: Asked) -> Rebuild:
        """Do what was asked for; how it is once it has begun, or has ended.

        Raises:
            Busy: another one runs, or none that could be cancelled. ConfigError: no such index is configured.
            UsageError: the options do not go together. Failed: it has ended before it began.
        """
        if asked.name not in self._indexes:
            there = ", ".join(self._indexes) or "none"
            raise ConfigError(
                f"this bridge's configuration has no index {asked.name[:200]} (there is: {there})",
                "add a section [index.NAME], as the index reader has it, and start the bridge again",
            )
        if asked.status and not asked.cancel:
            return self._known(asked.name)
        if asked.cancel:
            found = self.cancel(asked.name)
            while found.state == "running":
                await self._news.wait()
            return found
        if self._running is not None:
            raise Busy(
                f"index {self._running.name} is being rebuilt since {self._running.began_at}",
                f'wait until it has ended, or cancel it: {{"name": "{self._running.name}", "cancel": true}}',
            )
        arguments = self._arguments(asked)
        found = Rebuild(asked.name, began_at=_now())
        self._running = self.last[asked.name] = found
        self._stop = anyio.Event()
        log.get().info("rebuild requested", index=asked.name, options=arguments[len(self._options) + 2 :])
        self._tasks.start_soon(self._run, found, arguments)
        with anyio.move_on_after(BEGINS_WITHIN):
            while found.state == "running" and found.phase == "starting":
                await self._news.wait()
        if found.state == "failed":
            raise Failed(found.error, found.next, found.code)
        return found

    def _known(self, name: str) -> Rebuild:
        if name not in self.last:
            raise UsageError(
                f"nobody has asked this bridge for a rebuild of {name} since it was started", "see `bridge status`"
            )
        return self.last[name]

    def cancel(self, name: str) -> Rebuild:
        """Tell the rebuild that runs to end, which takes a moment: what it had begun is taken away.

        Raises:
            Busy: this index is not being rebuilt here.
        """
        found = self._running
        if found is None or found.name != name:
            raise Busy(f"this bridge does not rebuild {name[:200]} now", "see `bridge status` for who does")
        log.get().info("rebuild cancelled by request", index=name)
        found.phase = "cancelling"
        self._stop.set()
        return found

    def _arguments(self, asked: Asked) -> list[str]:
        until = str(asked.until)
        if len(until) > 100:
            raise UsageError("until takes a sequence or a time", "such as 2026-01-31T12:00:00Z")
        reindex.checked(
            reindex.Asked(
                asked.name,
                until or None,
                keep_old=asked.keep_old,
                back=asked.back,
                drop_old=asked.drop_old,
                replace_index=asked.replace_index,
            )
        )
        flags = [f"--{flag.replace('_', '-')}" for flag in FLAGS if getattr(asked, flag)]
        # Names of indexes begin with a letter or digit: none is taken for an option.
        return [*self._options, "reindex", asked.name, *flags, *([f"--until={until}"] if until else [])]

    async def _run(self, found: Rebuild, arguments: list[str]) -> None:
        said, code = _Said(), -1
        command = [sys.executable, "-m", "bridge", "--log-format", "json", *arguments]
        try:
            async with await anyio.open_process(command, stdin=subprocess.DEVNULL) as process:
                code = await self._worked(found, process, said)
        except OSError as error:
            said.error = f"no process can be started: {error.strerror}\n  → make room for it"
        finally:
            self._ended(found, code, said)

    async def _worked(self, found: Rebuild, process: Process, said: _Said) -> int:
        """Read what it says until it has ended, also while it cleans up because it was told to end."""
        assert process.stdout is not None
        assert process.stderr is not None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_end, process, self._stop)
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as reading:
                    reading.start_soon(self._heard, found, process.stderr, said)
                    reading.start_soon(_read, process.stdout, said)
                code = await process.wait()
            tasks.cancel_scope.cancel()
        return code

    async def _heard(self, found: Rebuild, stream: ByteReceiveStream, said: _Said) -> None:
        """Its log lines go to the bridge's log, but for the last one, which tells why it ends; so do other lines where
        it could not even begin."""
        async for line in _lines(stream):
            event = _event(line)
            if event is None:
                said.error = (said.error + line + "\n")[:SAID_AT_MOST]
                continue
            name, level = str(event.pop("event", "")), str(event.pop("level", "info"))
            event.pop("timestamp", None)
            if name == FAILED:
                said.error = f"{event.get('what', '')}\n  → {event.get('next', '')}"[:SAID_AT_MOST]
                continue
            if name == "rebuilding":
                found.done, found.total = event.get("events", 0), event.get("of", 0)
                found.rate, found.eta = event.get("a_second", 0), event.get("seconds_left")
            if name in ("rebuild", "rebuilding") and not self._stop.is_set():
                found.phase = event.get("phase", "replaying")
            if level in ("debug", "info", "warning", "error"):
                getattr(log.get(), level)(name, **event)
            self._tell()

    def _ended(self, found: Rebuild, code: int, said: _Said) -> None:
        found.ended_at, found.phase, found.eta, found.code = _now(), "ended", None, code
        found.said = said.output.strip()
        # By the signal itself it ends where it was told to before it could begin, or when it was done already; killed,
        # where it would not end in time.
        killed = self._stop.is_set() and code == -signal.SIGKILL
        cancelled = killed or code in (EXIT_INTERRUPTED, -signal.SIGTERM)
        found.state = "done" if code == EXIT_DONE else "cancelled" if cancelled else "failed"
        if found.state == "failed":
            what, _, remedy = said.error.strip().removeprefix("bridge: ").partition("\n  → ")
            found.error = what or f"bridge reindex {found.name} has ended with exit code {code}"
            found.next = remedy or "see the log"
            log.get().error("rebuild failed", index=found.name, why=found.error, next=found.next)
        self._running = None
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()


class _Said:
    """What a process has printed."""

    def __init__(self) -> None:
        self.output = ""
        self.error = ""


async def _end(process: Process, stop: anyio.Event) -> None:
    """Tell a process to end as soon as `stop` is set, or this is cancelled; kill one that does not."""
    try:
        await stop.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            with anyio.move_on_after(ENDS_WITHIN, shield=True):
                await process.wait()
        if process.returncode is None:
            process.kill()


async def _read(stream: ByteReceiveStream, said: _Said) -> None:
    async for line in _lines(stream):
        said.output = (said.output + line + "\n")[:SAID_AT_MOST]


async def _lines(stream: ByteReceiveStream) -> AsyncIterator[str]:
    """Lines as text; of one that is too long its first part."""
    rest = b""
    async for data in stream:
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
        rest = rest[:LONGEST_LINE]
    if rest:
        yield rest.decode(errors="replace")


def _event(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
