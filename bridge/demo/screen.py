"""The board as a person wants to see it: live on a terminal, sparse plain lines everywhere else (logs of a CI run)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from bridge.demo.board import Board, Lags, Phase, Searches

REFRESH = 8
SAY_EVERY = 10.0
WIDTH = 80
BAR = 24
_MARK = re.compile(r"<em>(.*?)</em>")


class Screen:
    """Shows one board."""

    def __init__(self, board: Board, console: Console) -> None:
        self._board = board
        self._console = console
        self.live = console.is_terminal and not console.is_dumb_terminal
        self._fancy = console.encoding.lower().startswith("utf")
        self._spinner = Spinner("dots" if self._fancy else "line", style="cyan")
        self._said: set[str] = set()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the board for as long as the block lasts; its last state stays on the screen."""
        if not self.live:
            yield
            self._say_phases()
            return
        with Live(get_renderable=self.render, console=self._console, refresh_per_second=REFRESH):
            yield

    async def talk(self) -> None:
        """Where there is no terminal: a line for each phase that has ended, and the counts now and then."""
        if self.live:
            return
        spoken = 0.0
        while True:
            self._say_phases()
            if not self._board.writes.transactions:
                spoken = self._board.elapsed
            elif self._board.elapsed - spoken >= SAY_EVERY:
                spoken = self._board.elapsed
                for name, text in self._counts():
                    self._line(name, text.plain)
            await anyio.sleep(1 / REFRESH)

    def render(self) -> RenderableType:
        """The whole show, at most 80 columns wide."""
        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right")
        clock = f"{self._board.elapsed:.0f} s of about {self._board.seconds} s"
        head.add_row(Text("bridge demo", style="bold"), Text(clock, style="dim"))
        parts: list[RenderableType] = [head, Text(), self._phases()]
        if self._board.writes.transactions:
            parts += [Text(), self._grid(self._counts())]
        if self._board.sample.hits:
            parts += [Text(), *self._sample()]
        return Constrain(Group(*parts), WIDTH)

    # The phases

    def _phases(self) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=1)
        grid.add_column(width=9)
        grid.add_column(width=57)
        grid.add_column(justify="right", width=7)
        for phase in self._board.phases:
            style = "dim" if phase.state == "waiting" else ""
            took = "" if phase.state == "waiting" else f"{phase.elapsed:.1f} s"
            grid.add_row(self._mark(phase), Text(phase.name, style=style), self._text(phase), Text(took, style="dim"))
        return grid

    def _mark(self, phase: Phase) -> RenderableType:
        if phase.state == "running":
            return self._spinner
        good, bad, later = ("✓", "✗", "·") if self._fancy else ("+", "x", "-")
        mark, style = {"done": (good, "green"), "failed": (bad, "red")}.get(phase.state, (later, "dim"))
        return Text(mark, style=style)

    def _text(self, phase: Phase) -> RenderableType:
        if not (phase.total and phase.state == "running"):
            return Text(phase.text, style="dim" if phase.state == "waiting" else "")
        row = Table.grid(padding=(0, 1))
        row.add_column(width=BAR)
        row.add_column()
        count = Text(f"{phase.done:,} of {phase.total:,} {phase.unit}")
        row.add_row(ProgressBar(total=phase.total, completed=phase.done, width=BAR), count)
        return row

    # The counts

    def _counts(self) -> list[tuple[str, Text]]:
        board, writes, searches = self._board, self._board.writes, self._board.searches
        wrote = (
            f"{writes.posts:,} posts, {writes.edits:,} edits ({writes.toasted:,} TOASTed),"
            f" {writes.deletes:,} deletes, {writes.keys:,} new keys"
        )
        return [
            ("writer", Text(wrote)),
            ("stream", Text(f"{board.events:,} events, {board.rate:,.0f} a second")),
            ("lag", Text(f"from commit to search hit: {_lag(board.lag())}")),
            ("searcher", _answers(searches)),
        ]

    def _grid(self, rows: list[tuple[str, Text]]) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=11)
        grid.add_column(width=66)
        for name, text in rows:
            grid.add_row(Text(f"  {name}", style="dim"), text)
        return grid

    def _sample(self) -> list[RenderableType]:
        sample, board = self._board.sample, self._board
        head = Text.assemble(
            ("  search ", "dim"), (sample.word, "bold"), f": {sample.count:,} hits in {board.generation}"
        )
        if sample.before is not None:
            head.append(f" (before: {sample.before:,})", style="dim")
        lines: list[tuple[str, Text]] = [(author, _highlighted(text)) for author, text in sample.hits]
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=22, no_wrap=True, overflow="ellipsis")
        grid.add_column(width=55, no_wrap=True, overflow="ellipsis")
        for author, text in lines:
            grid.add_row(Text(f"    {author}", style="dim"), text)
        return [head, grid]

    # Plain lines

    def _say_phases(self) -> None:
        if self.live:
            return
        for phase in self._board.phases:
            if phase.state in ("done", "failed") and phase.name not in self._said:
                self._said.add(phase.name)
                self._line(phase.name, phase.text, "" if phase.state == "done" else "failed: ")

    def _line(self, name: str, text: str, before: str = "") -> None:
        self._console.print(f"{self._board.elapsed:5.1f} s  {name:9} {before}{text}", soft_wrap=True, markup=False)


def summary(board: Board, agreement: str, agrees: bool, console: Console) -> None:
    """The closing words, on a terminal and in a log alike."""
    words = Constrain(_summary(board, agreement, agrees), WIDTH)
    if console.is_terminal:
        console.print(words)
        return
    with console.capture() as captured:
        console.print(words)
    console.print("\n".join(line.rstrip() for line in captured.get().splitlines()), markup=False, soft_wrap=True)


def _summary(board: Board, agreement: str, agrees: bool) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=14)
    grid.add_column(width=64)
    changes = f"{board.writes.messages + board.writes.others:,} changes in {board.writes.transactions:,} transactions"
    rows: list[tuple[str, Text]] = [
        ("snapshot", Text(f"{board.rows:,} rows")),
        ("stream", Text(f"{board.events:,} events; the writer made {changes}")),
        ("lag", Text(f"from commit to search hit, {_timed(board.lag())}")),
        *[("", Text(line)) for line in _of_the_lag(board)],
        ("searches", _answers(board.searches)),
    ]
    if board.during is not None:
        rows.append(("in the rebuild", _answers(board.during)))
    if board.searches.failure:
        rows.append(("last failure", Text(board.searches.failure)))
    sample = board.sample
    if sample.before is not None and sample.after is not None:
        rows.append(
            ("hits", Text(f'"{sample.word}": {sample.before:,} just before the rebuild, {sample.after:,} after'))
        )
    rows.append(("duration", Text(f"{board.elapsed:.0f} s")))
    verdict = Text("agree" if agrees else "DIFFER", style="bold green" if agrees else "bold red")
    rows.append(("index, table", verdict.append(f": {agreement}", style="default not bold")))
    for name, text in rows:
        grid.add_row(Text(name, style="dim"), text)
    return Group(Text(), grid)


def _of_the_lag(board: Board) -> list[str]:
    """What the lag is made of, and what it leaves out."""
    lines = []
    if board.during is not None:
        lines.append(f"in the rebuild, {_timed(board.lag(rebuilding=True))}")
        lines.append(f"before and after, {_timed(board.lag(rebuilding=False))}")
    if board.unfound:
        lines.append(f"{board.unfound:,} more were not found in time")
    return [
        *lines,
        "osmem-server shows at once what it is given; Elasticsearch and",
        "OpenSearch with the next refresh, each second by default",
    ]


def _lag(found: Lags | None) -> str:
    return "not known yet" if found is None else f"p50 {_time(found.median)}, max {_time(found.longest)}"


def _timed(found: Lags | None) -> str:
    return "no post" if found is None else f"{found.posts:,} post{'s' * (found.posts != 1)}: {_lag(found)}"


def _answers(searches: Searches) -> Text:
    bad = "red" if searches.failed or searches.empty else "green"
    took = f": p50 {_time(searches.took[0])}, max {_time(searches.took[1])}" if searches.took else ""
    return Text.assemble(
        f"{searches.answered:,} answers", (f", {searches.failed:,} failed, {searches.empty:,} empty", bad), took
    )


def _highlighted(text: str) -> Text:
    out, end = Text(), 0
    for match in _MARK.finditer(text):
        out.append(text[end : match.start()]).append(match[1], style="bold yellow")
        end = match.end()
    return out.append(text[end:])


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
