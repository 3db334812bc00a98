"""The command that shows how everything is; `bridge.cli` has the others."""

from __future__ import annotations

import sys
from collections.abc import Callable

from cyclopts import App

from bridge import console, errors
from bridge.commands.index import Flag
from bridge.config import Config
from bridge.stream.server import Servers


def add(app: App, settings_of: Callable[[], Config], running: Callable[[Config], Servers]) -> None:
    """Add the command to `app`; `running` tells the servers that somebody else runs."""

    @app.command
    def status(*, json: Flag = False, watch: Flag = False) -> int:
        """Show how far each part is, and what needs a look: exit code 0 where nothing does, else 1.

        Asks PostgreSQL, the state bucket, JetStream and the search engines, whether a bridge is running or not.

        Parameters
        ----------
        json
            Print everything as one JSON object.
        watch
            Look again each second, until Ctrl-C (exit code 130); with --json one object a line.
        """
        settings = settings_of()
        return _watched(settings, running(settings), json) if watch else _once(settings, running(settings), json)


def _once(settings: Config, servers: Servers, json: bool) -> int:
    from bridge.operate.show import status as show
    from bridge.operate.status.collect import collect

    in_step: list[bool] = []

    async def work() -> None:
        found = await collect(settings, servers)
        in_step.append(found.in_step)
        with console.output():
            if json:
                sys.stdout.write(show.as_json(found))
            else:
                show.page(found, sys.stdout)
            sys.stdout.flush()

    code = console.once(work)
    return code or (errors.EXIT_DONE if in_step == [True] else errors.EXIT_FOUND)


def _watched(settings: Config, servers: Servers, json: bool) -> int:
    from bridge.operate.show.watch import watch
    from bridge.operate.status.live import Live

    async def work() -> None:
        with console.output():
            await watch(Live(settings, servers), sys.stdout, json=json)

    return console.once(work)
