"""Operator, account and users of a NATS server in operator mode, and the JWTs and .creds files that say so.

Source: NATS documentation, "JWT in depth"; ADR-14, "JWT library free jwt user generation" (header, claims and `jti`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import nkeys  # type: ignore[import-untyped]


class Key:
    """An nkey of a kind (nkeys.PREFIX_BYTE_USER, …)."""

    def __init__(self, kind: int) -> None:
        self.seed = nkeys.encode_seed(os.urandom(32), kind).decode()
        self.public: str = nkeys.from_seed(bytearray(self.seed.encode())).public_key.decode()

    def signs(self, subject: Key, name: str, claims: dict[str, Any]) -> str:
        """A JWT about `subject`."""
        body: dict[str, Any] = {
            "iat": int(time.time()),
            "iss": self.public,
            "name": name,
            "sub": subject.public,
            "nats": claims | {"version": 2},
        }
        digest = hashlib.new("sha512_256", json.dumps(body).encode()).digest()
        body["jti"] = base64.b32encode(digest).decode().rstrip("=")
        text = f"{_part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_part(body)}"
        signature = nkeys.from_seed(bytearray(self.seed.encode())).sign(text.encode())
        return f"{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def _part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


class Operator:
    """An operator with one account that has JetStream without limits, and the system account that JetStream needs."""

    def __init__(self) -> None:
        self._key, self._account, self._system = (
            Key(kind) for kind in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_ACCOUNT)
        )
        self._jwt = self._key.signs(self._key, "operator", {"type": "operator"})

    @property
    def settings(self) -> dict[str, str]:
        """Lines of nats-server.conf."""
        plain = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
        stored = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
        known = {
            account.public: self._key.signs(account, name, {"type": "account", "limits": {**limits, "wildcards": True}})
            for account, name, limits in ((self._account, "A", plain | stored), (self._system, "SYS", plain))
        }
        return {
            "operator": self._jwt,
            "system_account": self._system.public,
            "resolver": "MEMORY",
            "resolver_preload": f"{{ {', '.join(f'{name}: {jwt}' for name, jwt in known.items())} }}",
        }

    def credentials(self, file: Path) -> Path:
        """The .creds file of a new user who may do everything."""
        user = Key(nkeys.PREFIX_BYTE_USER)
        jwt = self._account.signs(user, file.stem, {"type": "user", "subs": -1, "data": -1, "payload": -1})
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
        return file
