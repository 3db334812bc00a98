"""The JSON Schema of events, as the tests apply it to every log that they read."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from importlib import resources
from typing import Any

import msgspec
from jsonschema import Draft202012Validator

SCHEMA: dict[str, Any] = json.loads(resources.files("bridge").joinpath("events.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
MOST = 20  # of each form; the others are alike, and validating is slow

_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_seen: Counter[tuple[object, ...]] = Counter()


def valid(data: bytes) -> bool:
    """Whether a payload is an event."""
    return bool(VALIDATOR.is_valid(_decoded(data)))


def conforms(data: bytes) -> None:
    """Asserts that a payload is an event. Of those with the same members of the same kinds only some are looked at,
    and none that is nested deeper than a decoder goes."""
    try:
        members = _members.decode(data)
        form = tuple(sorted((name, bytes(value)[:1]) for name, value in members.items())), bytes(members.get("op", b""))
        _seen[form] += 1
        if _seen[form] > MOST:
            return
        errors = list(VALIDATOR.iter_errors(_decoded(data)))
    except RecursionError:
        return
    assert not errors, f"{data[:2000].decode()} is no event: {errors[0].message[:2000]}"


def _decoded(data: bytes) -> Any:
    # Values are of any size: numbers of more digits than Python makes an int of, and those that overflow a float.
    return json.loads(data, parse_float=Decimal, parse_int=lambda digits: int(digits) if len(digits) < 20 else 0)
