"""TLS with a search engine: its files, and why the engine's side or ours refuses a connection.

The HTTP client says only that a connection was lost where a server wants a certificate that it did not get; so a
connection of our own asks the same server again and reads the alert. What comes out names files and rules, no secret.
"""

from __future__ import annotations

import socket
import ssl

import anyio
import certifi

from bridge.config import Tls
from bridge.errors import ServerRefused

SECONDS = 5.0
# Said by a server that is starting, stopping or in trouble: not for ever.
_PASSING = ("INTERNAL_ERROR", "CLOSE_NOTIFY", "USER_CANCEL")


def context(tls: Tls) -> ssl.SSLContext:
    """What connections are made with. Without `ca`, the system's authorities and certifi's are trusted.

    Raises:
        ServerRefused: the files are no certificate, no key, or do not belong together.
    """
    file = tls.ca
    try:
        made = ssl.create_default_context(cafile=tls.ca or None)
        if not tls.ca:
            made.load_verify_locations(certifi.where())
        if tls.cert:
            file = tls.cert
            # Without an answer at hand OpenSSL would ask the terminal for an encrypted key's password.
            made.load_cert_chain(tls.cert, tls.key or None, password=lambda: b"")
    except (OSError, ValueError) as error:
        reason = (error.reason if isinstance(error, ssl.SSLError) else None) or type(error).__name__
        raise ServerRefused(
            f"the TLS file {file} of the index cannot be used ({reason})",
            "give PEM files: ca, and cert with its key, which may have no password",
        ) from None
    return made


async def objection(host: str, port: int, made: ssl.SSLContext, where: str) -> ServerRefused | None:
    """Why TLS with a server fails; None where it does not, or where the server is just away."""
    error = await anyio.to_thread.run_sync(_tried, host, port, made, abandon_on_cancel=True)
    if error is None or isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return None
    reason = error.reason or type(error).__name__
    if any(word in reason for word in _PASSING):
        return None
    what, remedy = _explained(error, reason, host)
    return ServerRefused(f"TLS with the search engine at {where} fails: {what}", remedy)


def _tried(host: str, port: int, made: ssl.SSLContext) -> ssl.SSLError | None:
    """One connection by hand; with TLS 1.3 a refused certificate is told only to who reads."""
    try:
        with (
            socket.create_connection((host, port), timeout=SECONDS) as plain,
            made.wrap_socket(plain, server_hostname=host) as secured,
        ):
            secured.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
            secured.recv(1)
    except ssl.SSLError as error:
        return error
    except OSError:
        return None
    return None


def _explained(error: ssl.SSLError, reason: str, host: str) -> tuple[str, str]:
    if isinstance(error, ssl.SSLCertVerificationError):
        # X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
        if error.verify_code in (62, 64):
            return (
                f"its certificate is not for {host}",
                "use in `url` a name that the certificate has, or give the server one for this name",
            )
        # X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED
        if error.verify_code in (9, 10):
            return (
                f"its certificate is not valid now ({error.verify_message})",
                "give the server a new certificate, or set this machine's clock",
            )
        return (
            f"its certificate is not trusted ({error.verify_message})",
            "set `tls = { ca = … }` of the index to the authority that signed the server's certificate",
        )
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return "the server speaks no TLS there", "begin `url` of the index with http://, or use the server's TLS port"
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return (
            f"the server wants a client certificate ({reason})",
            "set `tls = { cert = …, key = … }` of the index to one that the server accepts",
        )
    if "ALERT" in reason:
        return (
            f"the server does not accept the client's side ({reason})",
            "check `tls` cert and key of the index: is the certificate one that the server trusts, and not expired?",
        )
    return reason, "check `tls` and `url` of the index, and the server's certificate"
