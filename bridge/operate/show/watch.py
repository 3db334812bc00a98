"""`bridge status --watch`: each look of a `Live`, on a terminal in place of the last one, elsewhere one after another.

A terminal gets its former content back at the end. What does not fit on it is left out at the bottom, which says so;
what needs a look stands on top, and on a small one the figures that matter in a line or two. Without a terminal, or on
one that cannot move its cursor, a page ends with a line of dashes; JSON is one object a line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from rich import live as rich
from rich.console import Console, Group, RenderableType
from rich.segment import Segment, Segments

from bridge import structured
from bridge.operate.show import status as show
from bridge.operate.status.live import Live
from bridge.operate.status.parts import Status

LINE = "-" * 40


async def watch(live: Live, out: TextIO, *, json: bool) -> None:
    """Show every look until cancelled.

    Raises:
        OSError: `out` takes no more.
    """
    console = show.plain(out)
    if json:
        await _follow(live, lambda found: _write(out, f"{show.as_line(found).decode()}\n"))
    elif not console.is_terminal or console.is_dumb_terminal:
        await _follow(live, lambda found: _page(found, out))
    else:
        await _redraw(live, console)


async def _follow(live: Live, shown: Callable[[Status], None]) -> None:
    async with structured.group() as tasks:
        tasks.start_soon(live.run)
        number = 0
        while True:
            number = await live.next(number)
            assert live.latest is not None
            shown(live.latest)


def _page(found: Status, out: TextIO) -> None:
    show.page(found, out)
    _write(out, f"{LINE}\n")


def _write(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


async def _redraw(live: Live, console: Console) -> None:
    mark = show.signs(console)
    with rich.Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False) as terminal:
        await _follow(live, lambda found: terminal.update(_fitted(found, console, mark), refresh=True))


def _fitted(found: Status, console: Console, mark: show.Signs) -> RenderableType:
    """The page cut to the terminal's height."""

    def rendered(parts: list[RenderableType]) -> list[list[Segment]]:
        return console.render_lines(Group(*parts), pad=False)

    height = console.size.height
    lines = rendered(show.screen(found, mark))
    if len(lines) > height:
        lines = rendered(show.head(found, mark, remedies=True))
        if len(lines) >= height:
            lines = rendered(show.head(found, mark, remedies=False))
        lines += rendered(show.rest(found, mark))
        rest = f"{len(lines) - height + 1} more lines: make the terminal larger"
        lines = [*lines[: height - 1], [Segment(rest[: console.size.width])]]
    return Segments([segment for line in lines for segment in [*line, Segment.line()]][:-1])
