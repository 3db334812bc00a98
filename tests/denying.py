"""A search engine that lets nobody in, or in and no further: what Elasticsearch and OpenSearch answer then; and what
is no search engine at all.

Source: both engines' security documentation; the answers' form is that of their REST errors.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

REASONS = {
    401: "unable to authenticate with provided credentials [planted-key] for REST request",
    403: "action [indices:admin/aliases/get] is unauthorized for user [planted-user]",
}
ABOUT = {"version": {"number": "8.19.0", "build_flavor": "default"}, "tagline": "You Know, for Search"}


@contextmanager
def denying(status: Literal[401, 403]) -> Iterator[str]:
    """The url of one that answers everything with this status; with 403 it says what it is."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.path == "/" and status == 403:
                self._send(200, ABOUT)
                return
            cause = {"type": "security_exception", "reason": REASONS[status]}
            self._send(status, {"error": {"root_cause": [cause], **cause}, "status": status})

        def _send(self, code: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("x-elastic-product", "Elasticsearch")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the tests look at what the bridge says."""

        do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _answer  # noqa: N815 - the library's names

    with _served(Handler) as url:
        yield url


@contextmanager
def telling_nothing(engine: str) -> Iterator[str]:
    """The url of `engine` for a role that may ask of indexes alone: not even what the engine is."""
    behind = engine.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/" or self.path.startswith("/_"):
                cause = {"type": "security_exception", "reason": REASONS[403]}
                _send(self, 403, json.dumps({"error": cause, "status": 403}).encode())
                return
            with closing(HTTPConnection(behind, timeout=10)) as connection:
                connection.request("GET", self.path)
                answer = connection.getresponse()
                _send(self, answer.status, answer.read())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with _served(Handler) as url:
        yield url


@contextmanager
def one_page(status: int, *, root: bool = False) -> Iterator[str]:
    """The url of what answers everything with one page, as a site's front, or a proxy that has nothing behind it.

    Args:
        root: `GET /` alone is answered as by an engine.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if root and self.path == "/":
                _send(self, 200, json.dumps(ABOUT).encode())
                return
            _send(self, status, b"<!doctype html><title>Welcome</title>", "text/html")

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with _served(Handler) as url:
        yield url


def _send(to: BaseHTTPRequestHandler, status: int, body: bytes, kind: str = "application/json") -> None:
    to.send_response(status)
    to.send_header("content-type", kind)
    to.send_header("content-length", str(len(body)))
    to.end_headers()
    to.wfile.write(body)


@contextmanager
def _served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
