"""WAL positions as PostgreSQL writes them ("16/B374D848") and as integers. Pure.

Source: PostgreSQL documentation, "pg_lsn Type": two hexadecimal numbers of up to 8 digits, divided by a slash.
"""

from __future__ import annotations


def parse(text: str) -> int:
    """The 64-bit position that `text` ("X/Y") names; ValueError if it is none."""
    high, slash, low = text.partition("/")
    if not slash or not 1 <= len(high) <= 8 or not 1 <= len(low) <= 8:
        raise ValueError(f"not an LSN: {text!r}")
    return int(high, 16) << 32 | int(low, 16)


def show(lsn: int) -> str:
    """`lsn` as PostgreSQL prints it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
