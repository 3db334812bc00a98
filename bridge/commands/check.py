"""The command that looks for what is wrong, and mends what it can; `bridge.cli` has the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from cyclopts import App

from bridge import console, errors
from bridge.commands.index import Flag
from bridge.config import Config
from bridge.errors import UsageError
from bridge.stream.server import Servers

if TYPE_CHECKING:
    from bridge.operate.checks.finding import Checked


def add(app: App, settings_of: Callable[[], Config], running: Callable[[Config], Servers]) -> None:
    """Add the command to `app`.

    Args:
        settings_of: gives the configuration.
        running: the NATS servers that are there; none is started.
    """

    @app.command
    def check(
        *, json: Flag = False, quiet: Flag = False, strict: Flag = False, fix: Flag = False, yes: Flag = False
    ) -> int:
        """Look for everything that keeps the bridge from its work, or will one day, on all servers at once.

        Each finding says what was seen, why it matters and what to do. Exit code 1 where there is an error; warnings
        alone are no failure, except with --strict. docs/operations.md lists every finding.

        Parameters
        ----------
        json
            Print everything as one JSON object.
        quiet
            Leave out what is well.
        strict
            Exit code 1 for a warning, too.
        fix
            Run what mends findings without loss, after asking; then look again.
        yes
            With --fix: do not ask.
        """
        from bridge.operate.show import check as show_check

        if json and fix:
            raise UsageError(
                "--json and --fix exclude each other", "take one of them: --json shows what --fix would run"
            )
        if yes and not fix:
            raise UsageError("--yes answers what --fix asks", "add --fix, or leave --yes away")
        settings = settings_of()
        servers = running(settings)
        found, code = _look(settings, servers)
        if code or found is None:
            return code
        with console.output():
            if json:
                sys.stdout.write(show_check.as_json(found, quiet=quiet))
            else:
                show_check.report(found, sys.stdout, quiet=quiet)
            sys.stdout.flush()
        if fix:
            found, code = _mend(settings, servers, found, yes=yes, quiet=quiet)
            if code or found is None:
                return code
        failed = not found.sound or (strict and found.found)
        return errors.EXIT_FOUND if failed else errors.EXIT_DONE


def _look(settings: Config, servers: Servers) -> tuple[Checked | None, int]:
    from bridge.operate.check import check

    outcome: list[Checked] = []

    async def work() -> None:
        outcome.append(await check(settings, servers))

    code = console.once(work)
    return (outcome[0] if outcome else None), code


def _mend(settings: Config, servers: Servers, found: Checked, *, yes: bool, quiet: bool) -> tuple[Checked | None, int]:
    """What is found after mending; the same where there was nothing to mend, or it was not wanted."""
    from bridge.operate.checks import repair
    from bridge.operate.show import check as show_check

    mendable = repair.fixable(found.findings)
    if not mendable:
        sys.stdout.write("there is nothing that --fix could mend\n")
        return found, errors.EXIT_DONE
    show_check.plan(mendable, sys.stdout)
    sys.stdout.flush()
    count = sum(len(one.fix.runs) for one in mendable if one.fix is not None)
    steps = f"{count} step{'s' * (count != 1)}"
    if not yes and not console.confirmed(f"Run {steps}?", f"--fix would run {steps}"):
        sys.stdout.write("nothing was changed\n")
        return found, errors.EXIT_DONE

    def said(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    async def work() -> None:
        await repair.apply(settings, servers, mendable, said)

    code = console.once(work)
    if code:
        return None, code
    found_now, code = _look(settings, servers)
    if found_now is not None and not code:
        with console.output():
            show_check.report(found_now, sys.stdout, quiet=quiet)
            sys.stdout.flush()
    return found_now, code
