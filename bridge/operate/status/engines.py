"""Whether the search engines answer: each is asked once a look, however many indexes it holds.

The question is for an index's alias, which the reader's own role may ask for; that there is none is an answer, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import quote

import msgspec

from bridge.config import Config, Index, hide
from bridge.index import engine


class Group(msgspec.Struct, frozen=True):
    """The indexes that one client serves: same servers, same login. `where` names the servers, without credentials;
    `what` is what a status calls them, and each its own."""

    what: str
    where: str
    index: Index
    names: list[str]


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
        found.setdefault(key, Group(what, where, index, [])).names.append(name)
    return list(found.values())


@contextlib.asynccontextmanager
async def opened(group: Group, seconds: float) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """What to ask with, by a client that is closed at the end; it returns where the engine answers within `seconds`.

    Raises:
        Unavailable: it does not. ServerRefused: TLS, credentials or privileges.
    """
    async with engine.opened(group.index) as client:

        async def ask() -> None:
            with contextlib.suppress(engine.EngineError):
                await client.ask("GET", f"/{quote(group.index.alias)}/_alias", seconds=seconds)

        yield ask
