"""`bridge reindex`: which of its jobs the options ask for, and what it prints when that is done."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import NamedTuple

import anyio

from bridge import console
from bridge.config import Config
from bridge.errors import Unavailable, UsageError
from bridge.index import past
from bridge.index.back import back, drop_old
from bridge.index.past import There
from bridge.index.place import site
from bridge.index.plan import Options, Plan, plan
from bridge.index.rebuild import Summary, rebuild
from bridge.operate.awaited import awaited
from bridge.operate.progress import rebuild_progress
from bridge.replay import point_of
from bridge.stream.server import Servers

ANSWER_WITHIN = 60.0


class Asked(NamedTuple):
    """The command line, as it was written."""

    name: str
    until: str | None = None
    mapping: str = ""
    keep_old: bool = False
    back: bool = False
    drop_old: bool = False
    dry_run: bool = False
    replace_index: bool = False


def command(settings: Config, asked: Asked, servers: Servers) -> int:
    """Do what was asked for; the exit code.

    Raises:
        UsageError: the options do not go together.
    """
    point = checked(asked)
    work: Callable[[], Awaitable[str]]
    if asked.dry_run:
        work = _planned(settings, asked, servers, point)
    elif asked.back:
        work = _back(settings, asked, servers)
    elif asked.drop_old:
        work = _dropped(settings, asked, servers, point)
    else:
        work = _built(settings, asked, servers, point)

    async def said() -> None:
        text = await work()
        with console.output():
            sys.stdout.write(text)
            sys.stdout.flush()

    return console.cancellable(said)


def checked(asked: Asked) -> int | datetime | None:
    """The point that is named, if there is one; UsageError where it is none, or the options do not go together."""
    _go_together(asked)
    return None if asked.until is None else point_of(asked.until, "--until")


def _go_together(asked: Asked) -> None:
    given = [name for name, value in zip(Asked._fields[1:], asked[1:], strict=True) if value]
    allowed = {
        "back": ["back"],
        "drop_old": ["drop_old", "until"],
        "until": ["until", "mapping", "dry_run"],
    }
    for name, others in allowed.items():
        wrong = [f"--{other.replace('_', '-')}" for other in given if other not in others]
        if name in given and wrong:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} and {', '.join(wrong)} do not go together", "see `bridge reindex --help`")
        if name in given:
            return


def _built(
    settings: Config, asked: Asked, servers: Servers, point: int | datetime | None
) -> Callable[[], Awaitable[str]]:
    known = partial(awaited, settings, asked.name)

    async def work() -> str:
        with rebuild_progress(asked.name) as progress:
            if point is not None:
                made = await past.build_until(
                    settings, asked.name, servers, point, mapping=asked.mapping, progress=progress, awaited=known
                )
                return _there(made) if isinstance(made, There) else summed_up(made)
            summary = await rebuild(
                settings,
                asked.name,
                servers,
                keep_old=asked.keep_old,
                replace_index=asked.replace_index,
                mapping=asked.mapping,
                progress=progress,
                awaited=known,
            )
        return summed_up(summary)

    return work


def _back(settings: Config, asked: Asked, servers: Servers) -> Callable[[], Awaitable[str]]:
    async def work() -> str:
        made = await back(settings, asked.name, servers)
        return f"{made.alias} → {made.physical}: {made.documents:,} documents, back from {made.before}\n"

    return work


def _dropped(
    settings: Config, asked: Asked, servers: Servers, point: int | datetime | None
) -> Callable[[], Awaitable[str]]:
    async def work() -> str:
        if point is not None:
            gone = await past.drop_until(settings, asked.name, servers, point)
        else:
            gone = await drop_old(settings, asked.name, servers)
        return f"deleted: {', '.join(gone)}\n" if gone else "there is nothing to delete\n"

    return work


def _planned(
    settings: Config, asked: Asked, servers: Servers, point: int | datetime | None
) -> Callable[[], Awaitable[str]]:
    known = partial(awaited, settings, asked.name)
    options = Options(keep_old=asked.keep_old, replace_index=asked.replace_index, mapping=asked.mapping, awaited=known)

    async def work() -> str:
        found: Plan | There
        try:
            with anyio.fail_after(ANSWER_WITHIN):
                if point is None:
                    found = await plan(site(settings, asked.name), servers, options)
                else:
                    found = await past.plan_until(
                        settings, asked.name, servers, point, mapping=asked.mapping, awaited=known
                    )
        except TimeoutError:
            raise Unavailable(f"no answer within {ANSWER_WITHIN:g} s", "is the search engine up?") from None
        return _there(found) if isinstance(found, There) else planned(found, options)

    return work


def summed_up(summary: Summary) -> str:
    """What a rebuild has made, on one line."""
    before = "" if summary.before is None else f" ({summary.before:,} before)"
    return (
        f"{summary.alias} → {summary.physical}: {summary.documents:,} documents{before} from {summary.events:,} "
        f"events in {summary.seconds:.1f} s, {summary.rejected:,} rejected\n"
    )


def planned(found: Plan, options: Options) -> str:
    """What a rebuild would do, for people."""
    made = found.generation
    verb = "go on with" if found.resumed else "build"
    fate = "kept" if options.keep_old else "deleted"
    on = ", ".join(found.holders)
    if found.alias in found.holders:
        alias = f"an index has that name ({found.documents:,} documents); it would be replaced"
    elif found.holders:
        alias = f"on {on} ({found.documents:,} documents), which would be {fate}"
    else:
        alias = "is on nothing yet"
    lines = [
        f"would {verb} {made.physical} (generation {made.number})",
        f"log      {made.stream} from sequence {found.start:,}: {found.events:,} events; it reaches back far enough",
        f"alias    {found.alias}: {alias}",
    ]
    if found.former:
        lines.append(f"former   {found.former}: searches by that alias would find nothing from the switch on")
    lines += _listed("mapping", found.mapping) + _listed("settings", found.settings)
    lines += _listed("changed", [f"{', '.join(found.changed)} in the configuration"] if found.changed else [])
    return "\n".join(lines) + "\nnothing was done\n"


def _listed(name: str, lines: list[str]) -> list[str]:
    return [f"{name if n == 0 else '':<9}{line}" for n, line in enumerate(lines)]


def _there(found: There) -> str:
    return f"{found.alias} → {found.physical}: {found.documents:,} documents; it is there already\n"
