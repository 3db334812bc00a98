"""Certificates of the tests' own, and a TLS front before a plain HTTP server.

The front ends TLS on a port of its own, may demand a client's certificate and a login, and passes bytes on.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REFUSAL = (
    b'{"error":{"type":"security_exception","reason":"unable to authenticate user [planted] for REST request"},'
    b'"status":401}'
)


class Authority:
    """A certificate authority in a folder; what it signs lies beside it as NAME.pem and NAME.key."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._name = name
        self.ca = str(folder / f"{name}.pem")
        _openssl("req", "-x509", *_key(folder / name), "-subj", f"/CN=bridge tests {name}", "-out", self.ca)

    def signs(self, name: str, names: str = "DNS:localhost,IP:127.0.0.1", *, days: int = 30) -> tuple[str, str]:
        """A certificate for `names` and so many days from now on (before now: one that has expired); the paths of
        certificate and key."""
        base = self._folder / f"{self._name}-{name}"
        request, extra = base.with_suffix(".csr"), base.with_suffix(".ext")
        extra.write_text(f"subjectAltName={names}\n")
        _openssl("req", "-new", *_key(base), "-subj", f"/CN={name}", "-out", request)
        authority = ("-CA", self.ca, "-CAkey", self._folder / f"{self._name}.key", "-CAcreateserial")
        period = ("-days", str(days), "-extfile", extra)
        _openssl("x509", "-req", "-in", request, *authority, *period, "-out", f"{base}.pem")
        return f"{base}.pem", f"{base}.key"


def _key(base: Path) -> tuple[str | Path, ...]:
    return "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", base.with_suffix(".key")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, stdin=subprocess.DEVNULL)


@contextmanager
def fronted(
    target: int, cert: tuple[str, str], *, clients: str = "", login: str = "", newest: ssl.TLSVersion | None = None
) -> Iterator[int]:
    """The port of a TLS front before `target` on 127.0.0.1.

    Args:
        cert: the server's certificate and key.
        clients: the authority of the certificates that clients must show; empty: they need none.
        login: the Authorization header that every request must carry; any other is answered with 401.
        newest: the newest version of TLS that it speaks.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=clients or None)
    context.load_cert_chain(*cert)
    if newest is not None:
        context.maximum_version = newest
    if clients:
        context.verify_mode = ssl.CERT_REQUIRED

    # Threads with blocking sockets: those of asyncio close without the alert that real servers send.
    class Connection(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            # A client that goes away, or that is refused, is what the tests are about.
            with contextlib.suppress(OSError):
                self.request.recv(1, socket.MSG_PEEK)  # wrap_socket leaves the socket open where the client has gone
                with context.wrap_socket(self.request, server_side=True) as client:
                    _requests(client, target, login)

    class Front(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Front(("127.0.0.1", 0), Connection) as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


def _requests(client: ssl.SSLSocket, target: int, login: str) -> None:
    """Each request of a connection, passed on over one of its own."""
    reading = client.makefile("rb")
    while request := reading.readline():
        lines = [request]
        while lines[-1] != b"\r\n":
            lines.append(reading.readline())
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
        body = reading.read(int(headers.get(b"content-length", b"0")))
        if login and headers.get(b"authorization") != login.encode():
            client.sendall(b"HTTP/1.1 401 Unauthorized\r\ncontent-type: application/json\r\n")
            client.sendall(b"content-length: %d\r\n\r\n%s" % (len(REFUSAL), REFUSAL))
            continue
        with socket.create_connection(("127.0.0.1", target)) as there:
            there.sendall(b"".join([*lines[:-1], b"Connection: close\r\n\r\n", body]))
            while data := there.recv(1 << 16):
                client.sendall(data)
        return
