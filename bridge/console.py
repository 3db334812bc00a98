"""How a command runs: its streams, its signals, its questions, and what becomes of an error."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import errno
import gc
import io
import math
import os
import select
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator

import anyio
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from bridge import errors, log
from bridge.errors import ServerRefused, UsageError
from bridge.notify import notify
from bridge.structured import significant
from bridge.waiting import until


class Plain(Console):
    """Prints; where whoever reads has had enough, `BrokenPipeError` says so, which `cli.main` answers.

    Of what is printed a terminal takes nothing for a command of its own: a table may be called anything.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As rich does it, but for what is not printable, which becomes an escape."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            harmless = control is not None or text.replace("\n", "").isprintable()
            yield segment if harmless else Segment(escaped(text, but="\n"), style)

    def on_broken_pipe(self) -> None:
        """Rich itself would end the process as if it had failed."""
        raise BrokenPipeError


def escaped(text: str, *, but: str = "") -> str:
    """A text of which a terminal takes nothing for a command, `but` for these characters."""
    return "".join(c if c.isprintable() or c in but else ascii(c)[1:-1] for c in text)


def open_streams() -> None:
    """Open what the caller has closed: a socket of ours must not get the number of standard input or output. What the
    locale's encoding lacks (a table may be called anything) is written as an escape."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False))
    codecs.register_error("bridge", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="bridge")


PLAIN = {"→": "->", "✓": "ok", "✗": "x", "⚠": "!", "…": "...", "·": "-", "–": "-", "—": "-", "─": "-", "━": "-"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that a terminal's or file's encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join([PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found]), error.end


@contextlib.contextmanager
def output(remedy: str = "make room for it") -> Iterator[None]:
    """Standard output may be full; that a pipe's reader has left is nobody's error, and answered in `main`.

    Raises:
        ServerRefused: it takes no more; `remedy` says what to do then.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        # With a file's name it is that file's error. What is still buffered must not be written at exit.
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG) or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ServerRefused(f"standard output takes no more: {error.strerror}", remedy) from None


def told(line: str) -> None:
    """Print what was done, at once: what comes after it may fail."""
    with output():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


async def reader_left() -> None:
    """Raise BrokenPipeError once nobody reads standard output any more; else only the next write would."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)

    async def gone() -> bool:
        return any(event & select.POLLERR for _, event in poll.poll(0))

    await until(gone, seconds=math.inf, every=0.5)
    raise BrokenPipeError


def say(text: str) -> None:
    """A message for a person, on standard error."""
    Plain(stderr=True, highlight=False).print(f"bridge: {text}", markup=False, soft_wrap=True)


def serve(work: Callable[[anyio.Event], Awaitable[None]]) -> int:
    """Run until SIGTERM (exit 0) or SIGINT (exit 130), which set the event; a second signal does not wait. `work` hears
    SIGHUP itself: see `bridge.reload`."""
    code = [errors.EXIT_DONE]

    async def watch(stop: anyio.Event, scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                if stop.is_set():
                    scope.cancel()
                notify("STOPPING=1")
                log.get().info("stopping", signal=signal.Signals(number).name)
                code[0] = errors.EXIT_INTERRUPTED if number == signal.SIGINT else errors.EXIT_DONE
                stop.set()

    async def main() -> None:
        stop = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, stop, tasks.cancel_scope)
            # Its configuration is right. How long servers are waited for, and rows are read, has no limit.
            notify("READY=1")
            await work(stop)
            tasks.cancel_scope.cancel()

    _run(main)
    return code[0]


def once(work: Callable[[], Awaitable[None]]) -> int:
    """Run to the end (exit code 0), or until SIGINT or SIGTERM cancels it (130), without a word: what it leaves on a
    terminal is put right, and what it has on servers for itself is removed."""
    return _until(work, say=False)


def cancellable(work: Callable[[], Awaitable[None]]) -> int:
    """The same, and the signal is logged: to clean up may take a while."""
    return _until(work, say=True)


def _until(work: Callable[[], Awaitable[None]], *, say: bool) -> int:
    # Not the event loop's own handling of SIGINT: that cancels once, and a wait that ends in the same moment hides it.
    code = [errors.EXIT_DONE]

    async def watch(scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                if say:
                    log.get().info("cancelling", signal=signal.Signals(number).name)
                code[0] = errors.EXIT_INTERRUPTED
                scope.cancel()

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, tasks.cancel_scope)
            await work()
            tasks.cancel_scope.cancel()

    _run(main)
    return code[0]


def _run(work: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        # What libraries leave behind when a connection breaks under them is no news: the break itself is told.
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: log.get().debug("left behind", what=str(context.get("message")))
        )
        await work()

    # What is there by now stays for ever, and rows that pass through make no cycles: at its usual pace the collector
    # costs a third of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    try:
        anyio.run(run, backend_options={"use_uvloop": sys.platform != "win32"})
    except BaseExceptionGroup as group:
        raise significant(group) from None


def agreed(doomed: list[str]) -> bool:
    """Whether a person at the terminal says yes to removing these; UsageError where nobody can be asked."""
    return confirmed(f"Remove {', '.join(doomed)}?", _removal(doomed))


def can_agree(doomed: list[str]) -> None:
    """Raise UsageError where `agreed` would find nobody to ask: what is looked at before the question is in vain."""
    _can_ask(_removal(doomed))


def _removal(doomed: list[str]) -> str:
    return f"drop would remove {', '.join(doomed)}"


def confirmed(question: str, otherwise: str) -> bool:
    """Whether a person at the terminal says yes.

    Raises:
        UsageError: nobody can be asked; `otherwise` says what would be done.
    """
    _can_ask(otherwise)
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        sys.stdout.write("\n")
        return False
    return answer.strip().lower() in ("y", "yes")


def _can_ask(otherwise: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError(f"{otherwise}, and there is nobody to ask", "add --yes")
