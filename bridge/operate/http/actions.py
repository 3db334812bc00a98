"""What the page may do for who has the token: start and cancel a snapshot of a table, or a rebuild of an index.

A snapshot is asked for as `bridge snapshot` does it: the running bridge takes it up. A rebuild is the bridge's own
(`rebuilds`), one at a time.
"""

from __future__ import annotations

from typing import Any, Literal

import anyio
import msgspec
from aiohttp import web

from bridge import log
from bridge.config import Config
from bridge.errors import BridgeError, Unavailable
from bridge.operate import snapshot
from bridge.operate.http import site
from bridge.operate.http.answer import json
from bridge.operate.http.site import Refused, Request
from bridge.operate.rebuilds import Asked, Rebuild, Rebuilds
from bridge.stream.server import Servers

WITHIN = 20.0
LONGEST_NAME = 300


class Act(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /actions: what to do, to which table or index."""

    do: Literal["snapshot", "cancel-snapshot", "reindex", "cancel-reindex"]
    name: str


class Actions:
    """Does what is asked for."""

    def __init__(self, settings: Config, servers: Servers, rebuilds: Rebuilds) -> None:
        self._settings = settings
        self._servers = servers
        self._rebuilds = rebuilds

    def jobs(self) -> list[dict[str, Any]]:
        """The last rebuild of each index that this bridge was asked for, the newest last."""
        found = sorted(self._rebuilds.last.values(), key=lambda one: one.began_at)
        return [
            {"name": one.name, "since": one.began_at, "state": _state(one), "said": _last_words(one)} for one in found
        ]

    async def answer(self, request: Request) -> web.StreamResponse:
        """Do it; 202 where it is under way."""
        act: Act = await site.body(request, Act)
        if len(act.name) > LONGEST_NAME:
            raise Refused(400, "the name is too long")
        try:
            with anyio.fail_after(WITHIN):
                taken = await (self._rebuild(act) if act.do.endswith("reindex") else self._snapshot(act))
        except TimeoutError:
            raise Refused(504, f"it has not been taken up within {WITHIN:g} s") from None
        except BridgeError as error:
            raise Refused(503 if isinstance(error, Unavailable) else 409, str(error)) from None
        log.get().info("asked by the page", action=act.do, name=act.name)
        return taken

    async def _snapshot(self, act: Act) -> web.StreamResponse:
        asked = snapshot.Asked((act.name,), "ask" if act.do == "snapshot" else "cancel")
        if "*" in act.name or "?" in act.name:
            raise Refused(400, "name one table")
        told = await snapshot.snapshot(self._settings, self._servers, asked)
        if told.idle:
            raise Refused(409, f"{act.name} is not being read")
        return json({"said": f"{act.name}: {'asked for' if act.do == 'snapshot' else 'cancelled'}"}, 202)

    async def _rebuild(self, act: Act) -> web.StreamResponse:
        if act.do == "cancel-reindex":
            self._rebuilds.cancel(act.name)
            return json({"said": f"{act.name}: being cancelled"}, 202)
        found = await self._rebuilds.asked(Asked(act.name))
        said = "rebuild begun" if found.state == "running" else f"rebuild {found.state}"
        return json({"said": f"{act.name}: {said}"}, 202)


def _state(one: Rebuild) -> str:
    return one.phase if (one.state, one.phase) == ("running", "cancelling") else one.state


def _last_words(one: Rebuild) -> str:
    return f"{one.error} → {one.next}" if one.error else one.said
