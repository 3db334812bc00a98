"""The commands that compare an index with the log and see to its dead letters; `bridge.cli` has the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Literal

from cyclopts import App, Parameter

from bridge import console, errors
from bridge.config import Config
from bridge.errors import UsageError
from bridge.stream.server import Servers

Nats = Callable[[Config], AbstractAsyncContextManager[Servers]]
Flag = Annotated[bool, Parameter(negative=())]


async def _index_verified(
    settings: Config, servers: Servers, index: str, *, repair: bool, json: bool, limit: int
) -> bool:
    from bridge.index import verify as verifying
    from bridge.operate.show import index as show_index

    reports = await verifying.verify(settings, index, servers, repair=repair, limit=limit)
    with console.output():
        if json:
            sys.stdout.write(show_index.reports_as_json(reports))
        else:
            for report in reports:
                show_index.report(report, sys.stdout)
        sys.stdout.flush()
    return all(report.same for report in reports)


async def _tables_verified(
    settings: Config, servers: Servers, tables: Sequence[str], *, json: bool, values: bool, limit: int
) -> bool:
    from bridge.operate import verify as verifying
    from bridge.operate.progress import verify_progress
    from bridge.operate.show import verify as show_verify

    with verify_progress() as show:
        reports = await verifying.verify(settings, servers, tables, limit=limit, show=show)
    with console.output():
        if json:
            sys.stdout.write(show_verify.as_json(reports, values=values))
        else:
            for report in reports:
                show_verify.report(report, sys.stdout, values=values)
        sys.stdout.flush()
    return all(report.same for report in reports)


def add(app: App, settings_of: Callable[[], Config], nats: Nats) -> None:
    """Add the commands to `app`.

    Args:
        settings_of: reads the configuration.
        nats: the servers to connect to.
    """

    @app.command(usage="Usage: bridge verify [OPTIONS] [TABLES...]")
    def verify(
        *tables: str,
        index: str = "",
        repair: Flag = False,
        json: Flag = False,
        values: Flag = False,
        limit: int = 20,
    ) -> int:
        """Compare tables with the log, or an index with the log, while all are in use.

        Exit code 0 where nothing differs (any more), else 1. Keys are shown, values only where they are asked for.

        Parameters
        ----------
        tables
            Tables as schema.table, or patterns such as public.*; none for all that are published.
        index
            An index instead, as its section [index.NAME] is called.
        repair
            With --index: write what differs anew, as the log has it.
        json
            Print everything as one JSON object.
        values
            With tables: show what each side has.
        limit
            List so many rows or documents of each kind.
        """
        if index and (tables or values):
            raise UsageError("--index goes without tables and --values", "compare the two one after the other")
        if repair and not index:
            raise UsageError(
                "--repair is for an index", "bring a table's rows into the log again: bridge snapshot TABLE"
            )
        settings = settings_of()
        if index:
            known(settings, index)
        same: list[bool] = []

        async def work() -> None:
            async with nats(settings) as servers:
                same.append(
                    await _index_verified(settings, servers, index, repair=repair, json=json, limit=limit)
                    if index
                    else await _tables_verified(settings, servers, tables, json=json, values=values, limit=limit)
                )

        code = console.once(work)
        return code or (errors.EXIT_DONE if same == [True] else errors.EXIT_FOUND)

    @app.command(usage="Usage: bridge dlq [OPTIONS] NAME [ACTION] [LETTERS...]")
    def dlq(
        name: str,
        action: Literal["list", "show", "retry", "drop"] = "list",
        /,
        *letters: int,
        all: Flag = False,
        yes: Flag = False,
        json: Flag = False,
        values: Flag = False,
        limit: int = 100,
    ) -> int:
        """Show, retry or drop dead letters: the documents that an index refused.

        A retry writes the latest state of the rows, never the old event. Exit code 1 where letters remain refused.

        Parameters
        ----------
        name
            The index, as its section [index.NAME] is called.
        action
            list them; show one and its event; retry or drop some or --all.
        letters
            The letters' numbers, as `list` shows them.
        all
            Retry or drop all letters of the index.
        yes
            Drop without asking.
        json
            List as one JSON object.
        values
            Show the values of the event's row.
        limit
            List so many letters.
        """
        settings = settings_of()
        known(settings, name)
        if action in ("retry", "drop") and bool(letters) == all:
            raise UsageError(f"dlq {action} needs either numbers of letters or --all", f"see bridge dlq {name} list")
        if action == "show" and len(letters) != 1:
            raise UsageError("dlq show takes one letter's number", f"see bridge dlq {name} list")
        chosen = None if all else list(letters)
        if action == "drop":
            what = f"all dead letters of {name}" if all else f"dead letters {', '.join(map(str, letters))} of {name}"
            if not yes and not console.agreed([what]):
                sys.stdout.write("nothing was dropped\n")
                return errors.EXIT_DONE
        left: list[bool] = []

        async def work() -> None:
            from bridge.index import letters as letters_of
            from bridge.operate.show import index as show_index

            async with nats(settings) as servers:
                with console.output():
                    if action == "list":
                        found = [one async for one in letters_of.dead_letters(settings, name, servers)]
                        if json:
                            sys.stdout.write(show_index.letters_as_json(found))
                        else:
                            show_index.letters(found, name, limit, sys.stdout)
                    elif action == "show":
                        shown = await letters_of.shown(settings, name, servers, letters[0])
                        sys.stdout.write(show_index.letter(shown, values=values))
                    elif action == "retry":
                        retried = await letters_of.retried(settings, name, servers, chosen)
                        left.append(bool(retried.refused))
                        show_index.retried(retried, name, sys.stdout)
                    else:
                        count = await letters_of.dropped(settings, name, servers, chosen)
                        sys.stdout.write(f"{count:,} dead letters dropped\n")
                    sys.stdout.flush()

        code = console.once(work)
        return code or (errors.EXIT_FOUND if left == [True] else errors.EXIT_DONE)


def known(settings: Config, name: str) -> None:
    """Raise UsageError where no index of that name is configured."""
    if name not in settings.index:
        there = ", ".join(settings.index) or "none"
        raise UsageError(f"no index {name} is configured (there is: {there})", f"add a section [index.{name}]")


def having(settings: Config, names: Sequence[str]) -> Config:
    """The configuration, where it has the indexes `names`, or any at all.

    Raises:
        UsageError: it has not.
    """
    for name in names:
        known(settings, name)
    if not settings.index:
        raise UsageError("no index is configured", "add a section [index.NAME]; bridge.example.toml has one")
    return settings
