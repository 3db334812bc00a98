"""The page's stream of events (SSE): what is known, and each second what is new of it.

Each look is written once, however many watch. A watcher that takes nothing for some seconds is let go; so many may
watch at a time.

Events: `history` (once), `state` (each look), `tables` and `recent` (where they differ from what was sent), `alive`
(where a look takes long). Source: the HTML standard, "Server-sent events".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import msgspec
from aiohttp import web

from bridge.operate.http import view
from bridge.operate.http.answer import HEADERS
from bridge.operate.http.recent import Recent
from bridge.operate.http.site import Refused, Request, Site
from bridge.operate.status.live import Live

WATCHERS = 16
TAKES_WITHIN = 10.0
# As long as the servers keep a look waiting, the page must still know that the bridge is alive.
ALIVE_EVERY = 1.5
AGAIN_MS = 1000
ALIVE = b"event: alive\ndata: {}\n\n"


class Streams:
    """Sends what `live` and `recent` have to whoever watches; `jobs` are those that the page has begun."""

    def __init__(self, live: Live, recent: Recent, jobs: Callable[[], list[dict[str, Any]]], *, actions: bool) -> None:
        self._live = live
        self._recent = recent
        self._jobs = jobs
        self._actions = actions
        self._number = 0
        self._state = self._tables = b""

    async def answer(self, request: Request, here: Site) -> web.StreamResponse:
        """Send until the watcher leaves."""
        if self._recent.watchers >= WATCHERS:
            raise Refused(503, f"{WATCHERS} pages are open already", {"Retry-After": "10"})
        response = web.StreamResponse(headers={**HEADERS, "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        response.force_close()
        self._recent.watchers += 1
        try:
            await response.prepare(request)
            here.door.stays(request.transport)
            await self._send(response)
        except TimeoutError:
            _cut(request)
        except Exception:
            # What has begun cannot be answered in another way.
            _cut(request)
            raise
        finally:
            self._recent.watchers -= 1
        return response

    async def _send(self, response: web.StreamResponse) -> None:
        tables, recent, number, sent = b"", list[dict[str, Any]](), 0, 0
        await self._live.fresh()
        out = b"retry: %d\n\n" % AGAIN_MS + _event("history", view.history(self._live.history))
        while True:
            with anyio.fail_after(TAKES_WITHIN):
                await response.write(out)
            with anyio.move_on_after(ALIVE_EVERY):
                number = await self._live.next(number)
            if number != self._number:
                self._write(number)
            if number == sent:
                out = ALIVE
                continue
            sent, out = number, self._state
            if self._tables != tables:
                tables = self._tables
                out += tables
            if self._recent.events != recent:
                recent = self._recent.events
                out += _event("recent", recent)

    def _write(self, number: int) -> None:
        found = self._live.latest
        if found is None:
            return
        self._number = number
        told = view.state(found, self._live.history.last, actions=self._actions, jobs=self._jobs())
        self._state, self._tables = _event("state", told), _event("tables", view.tables(found))


def _cut(request: Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _event(name: str, value: Any) -> bytes:
    # JSON has no line's end in it, and its text no way to end the event.
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(value))
