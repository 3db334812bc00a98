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


Searched = dict[str, list[str]]
"""By alias, the indexes that searches of it see; its own name where an index is called so."""


@contextlib.asynccontextmanager
async def opened(group: Group, seconds: float) -> AsyncIterator[Callable[[], Awaitable[Searched]]]:
    """What to ask with, by a client that is closed at the end; it returns what searches see where the engine answers
    within `seconds`. An alias of which it does not tell is not in there.

    Raises:
        Unavailable: it does not. ServerRefused: TLS, credentials or privileges.
    """
    async with engine.opened(group.index) as client:

        async def ask() -> Searched:
            seen: Searched = {}
            for some in portions(group.aliases):
                path = f"/{','.join(quote(alias, safe='') for alias in some)}/_alias?ignore_unavailable=true"
                with contextlib.suppress(engine.EngineError, *UNREADABLE):
                    answer = _answer.decode(await client.ask("GET", path, seconds=seconds))
                    seen |= {alias: _holders(alias, answer) for alias in some}
            return seen

        yield ask


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
