"""The command that asks for tables to be read again; `bridge.cli` has the others."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

from cyclopts import App

from bridge import console, errors
from bridge.commands.index import Flag, Nats
from bridge.config import Config
from bridge.errors import UsageError


def add(app: App, settings_of: Callable[[], Config], nats: Nats) -> None:
    """Add the command to `app`; arguments as for `index.add`."""

    @app.command(usage="Usage: bridge snapshot [OPTIONS] TABLES... | --all")
    def snapshot(
        *tables: str,
        all: Flag = False,
        where: str = "",
        wait: Flag = False,
        trim: Flag = False,
        force: Flag = False,
        status: Flag = False,
        pause: Flag = False,
        resume: Flag = False,
        cancel: Flag = False,
    ) -> int:
        """Read tables again while the stream goes on: the log then holds them whole from there on.

        The running bridge does it, or the next one that is started. With --wait: exit code 1 where a table failed.

        Parameters
        ----------
        tables
            Tables as schema.table, or patterns such as public.*.
        all
            Every table that is published.
        where
            Only the rows that this SQL condition chooses; what is gone from the table is not noticed then.
        wait
            Show how far it is until it has ended.
        trim
            With --all, once every table is read: remove what the log has from before. What a consumer has not acked
            stays.
        force
            With --trim: remove that, too.
        status
            Only say how far it is.
        pause
            Let what is being read rest where it is.
        resume
            Let it go on, also after a failure.
        cancel
            End it; what is in the log of it stays and does no harm.
        """
        from bridge.operate import snapshot as commands
        from bridge.operate.show import snapshot as show_snapshot

        flags: dict[commands.Action, bool] = {"status": status, "pause": pause, "resume": resume, "cancel": cancel}
        chosen: list[commands.Action] = [name for name, given in flags.items() if given]
        if len(chosen) > 1:
            raise UsageError(f"--{chosen[0]} and --{chosen[1]} exclude each other", "give one of them")
        action: commands.Action = chosen[0] if chosen else "ask"
        if tables and all:
            raise UsageError(
                "TABLES and --all exclude each other",
                f"bridge snapshot {shlex.join(tables)}, or: bridge snapshot --all",
            )
        if not tables and not all and not status:
            raise UsageError("snapshot needs either tables or --all", "such as: bridge snapshot public.users")
        if where and action != "ask":
            raise UsageError("--where is for asking", f"leave it out with --{action}")
        if trim and (not all or where or action != "ask"):
            raise UsageError("--trim goes with --all alone", "bridge snapshot --all --trim")
        if force and not trim:
            raise UsageError("--force is for --trim", "bridge snapshot --all --trim --force")
        settings = settings_of()
        failed: list[bool] = []

        async def work() -> None:
            async with nats(settings) as servers:
                told = await commands.snapshot(settings, servers, commands.Asked(tables, action, where, trim))
                found = told.tables
                if wait or trim:
                    with show_snapshot.progress() as show:
                        found = await commands.follow(settings, servers, list(found), show)
                failed.append(any(one.again is not None and one.again.state == "failed" for one in found.values()))
                with console.output():
                    show_snapshot.told(found, sys.stdout, asked=action == "ask" and not wait, running=told.running)
                    show_snapshot.idle(told.idle, action, found, sys.stdout)
                    sys.stdout.flush()
                if trim:
                    done = await commands.trimmed(settings, servers, force=force)
                    with console.output():
                        show_snapshot.trimmed(done, sys.stdout)
                        sys.stdout.flush()

        code = console.once(work)
        return code or (errors.EXIT_FOUND if (wait or trim) and failed == [True] else errors.EXIT_DONE)
