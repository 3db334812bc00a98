"""Whether the search engines answer, and what searches see: each is asked once a look, however many indexes it holds.

The question is for the indexes' aliases, which the reader's own role may ask for; that there is none is an answer, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import quote

import msgspec

from bridge.config import Config, Index, hide
from bridge.index import engine
from bridge.index.naming import UNREADABLE

# Both engines take 4,096 bytes as the first line of a request.
LONGEST_PATH = 3000


class _Aliases(msgspec.Struct):
    aliases: dict[str, Any] = {}


_answer = msgspec.json.Decoder(dict[str, _Aliases])


class Group(msgspec.Struct, frozen=True):
    """The indexes that one client serves: same servers, same login. `where` names the servers, without credentials;
    `what` is what a status calls them, and each its own; `aliases` are the indexes' as they are configured."""

    what: str
    where: str
    index: Index
    names: list[str]
    aliases: list[str]


def groups(config: Config) -> list[Group]:
    """All indexes, by their engines."""
    found: dict[object, Group] = {}
    for name, index in config.index.items():
        login = (index.user, str(index.password), index.password_file, str(index.api_key), index.api_key_file)
        key = (tuple(index.url), login, msgspec.json.encode(index.tls))
        where = ", ".join(hide(url) for url in index.url)
        what = f"search engine at {where}"
        if key not in found and any(group.what == what for group in found.values()):
            what += f" (as for index {name})"
        group = found.setdefault(key, Group(what, where, index, [], []))
        group.names.append(name)
        group.aliases.append(index.alias)
    return list(found.values())


class Seen(msgspec.Struct, frozen=True):
    """The indexes that searches of an alias see, its own name where an index is called so; and `there` the generations
    that exist, None where the engine does not tell."""

    holders: list[str]
    there: list[str] | None


Searched = dict[str, Seen]
"""By alias."""


@contextlib.asynccontextmanager
async def opened(group: Group, seconds: float) -> AsyncIterator[Callable[[], Awaitable[Searched]]]:
    """What to ask with, by a client that is closed at the end; it returns what searches see where the engine answers
    within `seconds`. An alias of which it does not tell is not in there.

    Raises:
        Unavailable: it does not. ServerRefused: TLS, credentials or privileges.
    """
    async with engine.opened(group.index) as client:

        async def ask() -> Searched:
            found, told = dict[str, _Aliases](), set[str]()
            for some in portions([*group.aliases, *map(_generations, group.names)]):
                path = f"/{','.join(quote(one, safe='*') for one in some)}/_alias?ignore_unavailable=true"
                with contextlib.suppress(engine.EngineError, *UNREADABLE):
                    found |= _answer.decode(await client.ask("GET", path, seconds=seconds))
                    told |= set(some)
            there = sorted(found)
            return {
                alias: Seen(_holders(alias, found), there if _generations(name) in told else None)
                for name, alias in zip(group.names, group.aliases, strict=True)
                if alias in told
            }

        yield ask


def _generations(name: str) -> str:
    """The pattern of an index's generations: no more than its reader's role covers."""
    return f"{name}-*"


def _holders(alias: str, answer: dict[str, _Aliases]) -> list[str]:
    return sorted(index for index, has in answer.items() if alias in has.aliases or alias == index)


def portions(aliases: list[str]) -> Iterator[list[str]]:
    """Aliases in as many parts as a path takes at a time."""
    some: list[str] = []
    for alias in aliases:
        if some and sum(len(quote(one, safe="")) + 1 for one in [*some, alias]) > LONGEST_PATH:
            yield some
            some = []
        some.append(alias)
    if some:
        yield some
