"""A search engine that lets nobody in, or in and no further: what Elasticsearch and OpenSearch answer then.

Source: both engines' security documentation; the answers' form is that of their REST errors.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
