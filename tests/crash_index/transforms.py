"""Transforms as users write them; the oracle calls the same ones with the rows of the tables."""

from __future__ import annotations

import hashlib
from typing import Any

POISON = "poison"


def post(row: dict[str, Any]) -> dict[str, Any] | None:
    """A post in other words; none of those seen so many times; one whose title is poison cannot be told."""
    if row["title"].startswith(POISON):
        raise ValueError(row["title"])
    if row["seen"] % 7 == 3:
        return None
    body = row["body"] or ""
    return {
        "id": row["id"],
        "headline": row["title"].upper(),
        "digest": hashlib.sha256(body.encode()).hexdigest(),
        "length": len(body),
        "price": str(row["price"]),
        "extra": type(row["extra"]).__name__,
    }


async def word(row: dict[str, Any]) -> dict[str, Any]:
    """A word with its length; asynchronous, as a transform may be."""
    return {
        "word": row["word"],
        "lang": row["lang"],
        "n": row["n"],
        "size": len(row["body"] or ""),
        "body": row["body"],
    }
