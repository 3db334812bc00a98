"""How a client of NATS says who it is: password, token, nkey seed or .creds file, and with which certificates.

Files are looked at before the library reads them: it never returns from a .creds file that has no JWT in it.

Source: NATS documentation, "Authenticating with an NKey", "Authenticating with a Credentials File".
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any

import nkeys  # type: ignore[import-untyped]

from bridge.config import Stream
from bridge.errors import ServerRefused

_JWT = re.compile(r"-+BEGIN NATS USER JWT-+\r?\n[\w.-]+\r?\n")
_SEED = re.compile(r"-+BEGIN USER NKEY SEED-+\r?\n(\w+)\r?\n")


def login(config: Stream) -> dict[str, Any]:
    """The client's options.

    Raises:
        ServerRefused: a file cannot be read, or does not hold what it is named for.
    """
    found: dict[str, Any] = {}
    if config.user:
        found |= {"user": config.user, "password": str(config.password)}
    if config.token:
        found["token"] = str(config.token)
    if config.credentials:
        text = _read(config.credentials, "credentials")
        seed = _SEED.search(text)
        if not _JWT.search(text) or seed is None or not _is_seed(seed[1]):
            raise ServerRefused(
                f"{config.credentials} holds no JWT with its seed",
                "let [stream] credentials name a .creds file as `nsc generate creds` or `nats auth user credential` "
                "writes it",
            )
        found["user_credentials"] = config.credentials
    if config.nkey_seed_file:
        if not _is_seed(_read(config.nkey_seed_file, "nkey_seed_file").strip()):
            raise ServerRefused(
                f"{config.nkey_seed_file} holds no nkey seed",
                "let [stream] nkey_seed_file name a file with a user's seed, one line that begins with SU",
            )
        found["nkeys_seed"] = config.nkey_seed_file
    tls = config.tls
    if tls.ca or tls.cert:
        for key in ("ca", "cert", "key"):
            _open(getattr(tls, key), key)
        try:
            context = ssl.create_default_context(cafile=tls.ca or None)
            if tls.cert:
                # Without an answer at hand OpenSSL would ask the terminal for an encrypted key's password.
                context.load_cert_chain(tls.cert, tls.key or None, password=lambda: b"")
        except (OSError, ssl.SSLError) as error:
            raise ServerRefused(
                f"the TLS files of [stream] tls cannot be used: {error}",
                "give PEM files: ca, and cert with its key, which may have no password",
            ) from None
        found["tls"] = context
    return found


def _open(file: str, key: str) -> None:
    """Name a TLS file that cannot be read: the library does not say which one it is."""
    try:
        if file:
            Path(file).read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ServerRefused(
            f"[stream] tls.{key}: {file} cannot be read: {why}", f"let [stream] tls.{key} name a PEM file"
        ) from None


def _read(file: str, key: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ServerRefused(f"{file} cannot be read", f"check [stream] {key}") from None


def _is_seed(text: str) -> bool:
    try:
        nkeys.from_seed(bytearray(text.encode())).wipe()
    except (nkeys.NkeysError, ValueError, IndexError):
        return False
    return text.startswith("SU")
