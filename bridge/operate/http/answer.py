"""Answers over HTTP, all of them with the headers that keep browsers strict.

Source: Content Security Policy Level 3; RFC 9110.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "bridge",
}


def text(body: str, status: int = 200, kind: str = "text/plain") -> web.Response:
    """An answer in plain text, or in another kind of text."""
    return web.Response(text=body, status=status, content_type=kind, charset="utf-8", headers=HEADERS)


def json(value: Any, status: int = 200) -> web.Response:
    """An answer in JSON."""
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json", headers=HEADERS)
