"""Requests in, answers out: a fixed table of paths, the same headers on every answer, and whom to answer at all.

There is no path that is put together from what a client sends. A request must call this host by a name that only its
owner can give it (localhost, an IP address, one of `[operate] hosts`): a page from elsewhere whose name was made to
lead here gets nothing (DNS rebinding). What changes something must come from this page itself or from no page, in
JSON, with the token, which is compared in constant time.

Source: RFC 9110; Content Security Policy Level 3; Fetch (Origin, Sec-Fetch-Site); RFC 6750 (Bearer).
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
import msgspec
from aiohttp import web

from bridge import log
from bridge.config import Operate
from bridge.operate.http.answer import text
from bridge.operate.http.door import Door

Request = web.BaseRequest
Answer = Callable[[Request], Awaitable[web.StreamResponse]]

BODY_SECONDS = 5.0
LARGEST_BODY = 16 << 10


class Refused(Exception):
    """The request is answered with this status, and a line that says why."""

    def __init__(self, status: int, why: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.why = why
        self.headers = headers or {}


class Site:
    """Answers requests by a table of (method, path); `door` is told once a request has arrived."""

    def __init__(self, settings: Operate, routes: Mapping[tuple[str, str], Answer]) -> None:
        self._routes = routes
        self._paths = {path for _, path in routes}
        self._hosts = {"localhost", *(host.lower() for host in settings.hosts)}
        self._token = settings.token.encode()
        self.door = Door(self.answer)

    async def answer(self, request: Request) -> web.StreamResponse:
        """One request's answer; whatever fails is told without any of its values."""
        self.door.asked(request.transport)
        try:
            self._known_host(request)
            response = await self._route(request)(request)
        except Refused as error:
            response = text(f"{error.why}\n", error.status)
            response.headers.update(error.headers)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001 - a defect in an answer must not end the bridge
            log.get().error("page failed", path=request.path, error=type(error).__name__)
            response = text("this is a defect of bridge: see its log\n", 500)
        response.force_close()
        return response

    def _route(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        found = self._routes.get((method, request.path))
        if found is None and request.path in self._paths:
            allowed = sorted(verb for verb, path in self._routes if path == request.path)
            raise Refused(405, f"use {' or '.join(allowed)}", {"Allow": ", ".join(allowed)})
        if found is None:
            raise Refused(404, "there is nothing here")
        return found

    def _known_host(self, request: Request) -> None:
        if not owned(request.headers.get("Host", ""), self._hosts):
            raise Refused(421, "this host is not called so; [operate] hosts in bridge.toml names what it is called")

    def allowed(self, request: Request) -> None:
        """Raise Refused unless the request may change something."""
        if not self._token:
            raise Refused(403, "read-only: [operate] token_file in bridge.toml names the file with the token")
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("Host"):
            raise Refused(403, "the request comes from another page")
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise Refused(403, "the request comes from another page")
        shown = request.headers.get("Authorization", "")
        scheme, _, token = shown.partition(" ")
        good = hmac.compare_digest(token.strip().encode("utf-8", "surrogateescape"), self._token)
        if scheme.lower() != "bearer" or not good:
            raise Refused(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})


def owned(host: str, names: set[str]) -> bool:
    """Whether a Host header names localhost, an IP address or one of `names`, with any port."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+))(?::\d{1,5})?", host)
    if match is None:
        return False
    if match[2] is not None and match[2].lower().rstrip(".") in names:
        return True
    try:
        ipaddress.ip_address(match[1] or match[2])
    except ValueError:
        return False
    return True


async def body(request: Request, kind: type[msgspec.Struct]) -> Any:
    """What was sent, as JSON of a kind.

    Raises:
        Refused: it is not JSON, too large, too slow, or not of that kind.
    """
    if request.content_type != "application/json":
        raise Refused(415, "send JSON (Content-Type: application/json)")
    if (request.content_length or 0) > LARGEST_BODY:
        raise Refused(413, f"send {LARGEST_BODY:,} bytes at most")
    sent = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for part in request.content.iter_any():
                sent += part
                if len(sent) > LARGEST_BODY:
                    raise Refused(413, f"send {LARGEST_BODY:,} bytes at most")
    except TimeoutError:
        raise Refused(408, f"the body has not come within {BODY_SECONDS:g} s") from None
    except web.RequestPayloadError:
        raise Refused(400, "the body is broken") from None
    try:
        return msgspec.json.decode(bytes(sent), type=kind)
    except msgspec.DecodeError:
        raise Refused(400, "the body is not what is asked for here; see docs/operations.md") from None
