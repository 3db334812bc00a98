"""WAL positions as PostgreSQL writes them ("16/B374D848") and as integers. Pure.

Source: PostgreSQL documentation, "pg_lsn Type": two hexadecimal numbers of up to 8 digits, divided by a slash.
"""

from __future__ import annotations

import re

_LSN = re.compile("([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


def parse(text: str) -> int:
    """The 64-bit position that `text` ("X/Y") names; ValueError if it is none."""
    found = _LSN.fullmatch(text)
    if found is None:
        raise ValueError(f"not an LSN: {text!r}")
    return int(found[1], 16) << 32 | int(found[2], 16)


def show(lsn: int) -> str:
    """`lsn` as PostgreSQL prints it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
